"""VeRA on PaddleNLP's LoRA layers: frozen A and B that all layers share, and two trained vectors of each layer.

    y = x W + bias + b * ((d * (x A)) B),    d [r], b [out]

See `projections.py` for A and B. d starts at `d_initial`, b at zero. A layer has A and B for the time of its
product only, with a vector in each: d stands at the one that is whole on every tensor-parallel rank, so that every rank
has its whole gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import paddle
from paddle.distributed.fleet.utils.sequence_parallel_utils import mark_as_sequence_parallel_parameter

from finetune.adapters.projections import Projections
from finetune.checkpoints.tensors_of_ranks import find_local_split

_classes: dict[type, type] = {}


class LocalProjections:
    """The parts of both matrices that this process's layers use; layers of one size and division share them.

    Args:
        whole: Both matrices.
        config: PaddleNLP's configuration of the model.
    """

    def __init__(self, whole: Projections, config: Any):
        self.whole = whole
        self._config = config
        self._parts: dict[Any, Any] = {}

    def parts_of(self, name: str, layer: Any) -> tuple[Any, Any]:
        """A [in, r] and B [r, out] of a layer, as this rank holds its weight, in the type of the adapter."""
        num_in, num_out = layer.weight.shape
        dtype = layer.lora_A.dtype
        left = self._part(f"{name}.lora_A", num_in, 0, dtype)
        return left, self._part(f"{name}.lora_B", num_out, 1, dtype)

    def _part(self, name: str, size: int, axis: int, dtype: Any) -> Any:
        degree = max(self._config.tensor_parallel_degree, 1)
        split = find_local_split(name, self._config)
        key = (axis, size, split, dtype)
        if key not in self._parts:
            num_whole = size * degree if split else size
            whole = self.whole.right[:, :num_whole] if axis else self.whole.left[:num_whole]
            part = split.part(whole, degree, max(self._config.tensor_parallel_rank, 0)) if split else whole
            self._parts[key] = paddle.to_tensor(part.copy()).astype(dtype)
        return self._parts[key]


def add_vectors(name: str, layer: Any, projections: LocalProjections, *, rank: int, d_initial: float) -> None:
    """Makes a VeRA layer of one of PaddleNLP's LoRA layers, whose matrices go.

    Args:
        name: Of the layer.
        layer: One whose matrices, of any rank, stand already.
        projections: The shared matrices.
        rank: Of these.
        d_initial: What d is filled with.
    """
    parts = projections.parts_of(name, layer)
    inner = layer.create_parameter([rank], dtype=layer.lora_A.dtype)
    outer = layer.create_parameter([parts[1].shape[1]], dtype=layer.lora_B.dtype)
    inner.set_value(paddle.full_like(inner, d_initial))
    outer.set_value(paddle.zeros_like(outer))
    inner.is_distributed = False
    outer.is_distributed = bool(getattr(layer.lora_B, "is_distributed", False))
    if outer.is_distributed:
        outer.split_axis = 0
    is_partial = [getattr(each, "sequence_parallel", False) for each in (layer.lora_A, layer.lora_B)]
    if any(is_partial):
        mark_as_sequence_parallel_parameter(inner)
    if is_partial[1]:
        mark_as_sequence_parallel_parameter(outer)
    layer.vera_lambda_d, layer.vera_lambda_b = inner, outer
    del layer._parameters["lora_A"], layer._parameters["lora_B"]
    layer.r, layer.scaling = rank, 1.0
    layer.projections = parts
    layer.__class__ = _vera_class(type(layer))


def _update_matrices(layer: Any) -> tuple[Any, Any]:
    """A and B of a layer with its vectors in them."""
    left, right = layer.projections
    right = right * layer.vera_lambda_b
    if hasattr(layer, "input_size_per_partition"):  # A is in parts
        return left, layer.vera_lambda_d.unsqueeze(1) * right
    return left * layer.vera_lambda_d, right


@contextmanager
def _matrices_in(layer: Any) -> Iterator[None]:
    layer._parameters["lora_A"], layer._parameters["lora_B"] = _update_matrices(layer)
    try:
        yield
    finally:
        del layer._parameters["lora_A"], layer._parameters["lora_B"]


def _vera_class(kind: type) -> type:
    """The class of layers like those of `kind` with shared matrices."""
    if kind not in _classes:
        product: Any = kind.forward  # type: ignore[attr-defined]

        def forward(layer: Any, x: Any, *_: Any, **__: Any) -> Any:
            if layer.disable_lora or layer.merged:
                return product(layer, x)
            with _matrices_in(layer):
                return product(layer, x)

        def merge(layer: Any) -> None:
            with _matrices_in(layer):
                kind.merge(layer)  # type: ignore[attr-defined]

        _classes[kind] = type(f"Vera{kind.__name__}", (kind,), {"forward": forward, "merge": merge})
    return _classes[kind]
