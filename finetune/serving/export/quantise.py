"""Quantises the linear layers of a model's decoder layers after training, and measures what that costs.

To the nearest, or by GPTQ with texts for calibration: decoder layers are taken in their order, so that the inputs that a
layer is fitted to are those that the quantised layers before it give.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.families.family import Family
from finetune.models.layers import decoder_layers
from finetune.models.quantised.layers import linear_layers
from finetune.storage.quantisation.packed_weights import PackedMatrix, pack_matrix
from finetune.storage.quantisation.rounding import (
    relative_error,
    round_by_gptq,
    round_nearest,
)
from finetune.storage.quantisation.scheme import QuantisationScheme
from finetune.training.loss import logits_of

_SHORTEST_GROUP, _LONGEST_BLOCK = 8, 64
_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True, kw_only=True)
class QuantisationReport:
    """What quantising did.

    Attributes:
        method: "int8", "int4" or "nf4".
        group_size: Columns that share a scale; -1: all of a row.
        rounding: "nearest" or "gptq".
        num_layers: Linear layers that were quantised.
        num_bytes: Of their integers and scales.
        num_weights: Elements that they have.
        largest_error: Of a layer's weights, in units of their size (root of mean squares).
        mean_error: The same on average.
        perplexity_before: Of answers in the texts that were given, with the weights as they were; None without texts.
        perplexity_after: With the quantised ones.
        num_tokens: Tokens that perplexity was measured on.
    """

    method: str
    group_size: int
    rounding: str
    num_layers: int
    num_bytes: int
    num_weights: int
    largest_error: float
    mean_error: float
    perplexity_before: float | None
    perplexity_after: float | None
    num_tokens: int

    def to_json(self) -> dict[str, Any]:
        """For the folder of the result."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a person."""
        groups = "a scale for each row" if self.group_size == -1 else f"groups of {self.group_size}"
        lines = [
            f"quantised {self.num_layers} linear layers to {self.method}, {groups}, rounded {_ROUNDED[self.rounding]}: "
            f"{self.num_bytes / self.num_weights:.3g} bytes per weight; weights changed by {100 * self.mean_error:.2g} % "
            f"of their size, at most {100 * self.largest_error:.2g} %"
        ]
        if self.perplexity_before is not None and self.perplexity_after is not None:
            lines.append(
                f"perplexity of {self.num_tokens} answer tokens: {self.perplexity_before:.4f} before, "
                f"{self.perplexity_after:.4f} after"
            )
        else:
            lines.append("perplexity was not measured: give texts with --perplexity_data")
        return lines


_ROUNDED = {"nearest": "to the nearest", "gptq": "by GPTQ"}


def layers_by_depth(model: Any, family: Family) -> list[dict[str, Any]]:
    """Name -> linear layer, of every decoder layer."""
    names = {id(layer): name for name, layer in linear_layers(model, family.head_module).items()}
    return [
        {names[id(each)]: each for each in layer.sublayers() if id(each) in names}
        for layer in decoder_layers(model)
    ]


def quantise_model(
    model: Any,
    family: Family,
    method: str,
    *,
    group_size: int,
    calibration: Sequence[Any] = (),
    measured: Sequence[Any] = (),
) -> tuple[dict[str, PackedMatrix], QuantisationReport]:
    """Packs the linear layers of a float32 model, which then holds what they stand for.

    Args:
        model: PaddleNLP's.
        family: Its record.
        method: "int8", "int4" or "nf4".
        group_size: Columns that share a scale; -1: all. Where it does not divide the width of every layer, the largest
            size that divides it and all of them takes its place.
        calibration: Samples that GPTQ fits to; none: to the nearest.
        measured: Samples that perplexity is measured on.

    Returns:
        Name of the layer -> packed weight, and the report.

    Raises:
        UserError: No blocks or groups that are long enough divide the width of a layer.
    """
    model.eval()
    depths = layers_by_depth(model, family)
    group_size = _size_that_fits(_LONGEST_BLOCK if method == "nf4" else group_size, method, depths)
    before = _perplexity(model, measured)
    packed: dict[str, PackedMatrix] = {}
    errors = []
    for number, layers in enumerate(depths):
        hessians = _input_products(model, number, layers, calibration) if calibration else {}
        for name, layer in layers.items():
            matrix = np.ascontiguousarray(layer.weight.numpy().T)  # [out, in]
            made = _pack(name, matrix, method, group_size, hessians.get(name))
            values = made.values()
            errors.append(relative_error(matrix, values))
            layer.weight.set_value(paddle.to_tensor(np.ascontiguousarray(values.T)))
            packed[name] = made
    after = _perplexity(model, measured)
    return packed, QuantisationReport(
        method=method,
        group_size=group_size,
        rounding="gptq" if calibration else "nearest",
        num_layers=len(packed),
        num_bytes=sum(_num_bytes(each) for each in packed.values()),
        num_weights=sum(math.prod(each.shape) for each in packed.values()),
        largest_error=max(errors),
        mean_error=float(np.mean(errors)),
        perplexity_before=before[0],
        perplexity_after=after[0],
        num_tokens=before[1],
    )


def _size_that_fits(size: int, method: str, depths: Sequence[Mapping[str, Any]]) -> int:
    """The largest size that divides the given one and the width of every layer; -1 stays."""
    if size == -1:
        return -1
    widths = {name: layer.weight.shape[0] for layers in depths for name, layer in layers.items()}
    fitting = math.gcd(size, *widths.values())
    if fitting < _SHORTEST_GROUP:
        name = min(widths, key=lambda name: math.gcd(size, widths[name]))
        raise UserError(
            f"{name} has {widths[name]} inputs: {method} in groups of {size} would need groups of {fitting}, fewer than "
            f"{_SHORTEST_GROUP}. Quantise to int8, which has a scale for each output"
        )
    return fitting


def _pack(
    name: str, matrix: NDArray[np.float32], method: str, group_size: int, hessian: NDArray[np.float64] | None
) -> PackedMatrix:
    if method == "nf4":
        return pack_matrix(matrix, QuantisationScheme(algorithm="nf4", block_size=group_size), name=name)
    if hessian is None:
        return round_nearest(matrix, _BITS[method], group_size, dtype="float32")
    return round_by_gptq(matrix, hessian, _BITS[method], group_size, dtype="float32")


def _num_bytes(packed: PackedMatrix) -> int:
    arrays = [each for each in vars(packed).values() if isinstance(each, np.ndarray)]
    return sum(each.nbytes for each in arrays)


class _EnoughError(Exception):
    """Ends a forward pass whose rest nobody needs."""


def _input_products(
    model: Any, number: int, layers: Mapping[str, Any], samples: Sequence[Any]
) -> dict[str, NDArray[np.float64]]:
    """X^T X [in, in] of the inputs of every linear layer of one depth, per token."""
    products = {name: np.zeros((layer.weight.shape[0],) * 2, np.float64) for name, layer in layers.items()}
    count = 0

    def collect(name: str) -> Any:
        def hook(layer: Any, inputs: Any) -> None:
            rows = inputs[0].reshape([-1, inputs[0].shape[-1]]).numpy().astype(np.float64)
            products[name] += rows.T @ rows

        return hook

    def stop(*_: Any) -> None:
        raise _EnoughError

    hooks = [layer.register_forward_pre_hook(collect(name)) for name, layer in layers.items()]
    hooks.append(decoder_layers(model)[number].register_forward_post_hook(stop))
    try:
        for ids, _ in _batches(samples):
            count += ids.shape[1]
            with contextlib.suppress(_EnoughError):
                model(input_ids=ids)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: product / max(count, 1) for name, product in products.items()}


def _perplexity(model: Any, samples: Sequence[Any]) -> tuple[float | None, int]:
    """Exp of the mean loss of a label token, and how many there are."""
    total, count = 0.0, 0
    for ids, labels in _batches(samples):
        logits = logits_of(model(input_ids=ids)).astype("float32")[0]  # [length, vocabulary]
        places = np.flatnonzero(labels >= 0)
        chosen = paddle.gather(logits, paddle.to_tensor(places))
        losses = paddle.nn.functional.cross_entropy(chosen, paddle.to_tensor(labels[places]), reduction="sum")
        total, count = total + float(losses), count + places.size
    return (math.exp(total / count) if count else None), count


def _batches(samples: Iterable[Any]) -> Iterator[tuple[Any, NDArray[np.int64]]]:
    """Ids [1, length] and labels [length] of one sample after the other."""
    with paddle.no_grad():
        for sample in samples:
            ids = paddle.to_tensor(np.asarray(sample.input_ids, np.int64)[None])
            yield ids, np.asarray(sample.labels, np.int64)
