"""What the matrices of LoRA start from; drawn or computed for the whole layer and then cut.

default    A uniform within +-1 / sqrt(in), B zero: PaddleNLP's and peft's, He et al.'s with a slope of sqrt(5)
gaussian   A normal with deviation 1 / r, B zero: peft's
pissa      A @ B the part of W along its r leading singular vectors; it leaves W (Meng et al., "PiSSA", 2024)
pissa_niter_N  The same from N rounds of the randomised decomposition, as peft has it (`leading_vectors.py`)
olora      W^T = Q R: A the first r rows of R turned, B the first r columns of Q turned; scaling * A @ B leaves W
           (Buyukakyuz, "OLoRA", 2024)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle.distributed.fleet.layers.mpu import mp_ops

from finetune.adapters.leading_vectors import leading_vectors, num_rounds_of
from finetune.checkpoints.tensors_of_ranks import find_local_split
from finetune.errors import UserError
from finetune.models.quantised.layers import is_packed

CHANGING = ("pissa", "olora")
"""Those that change the frozen weight, and "pissa_niter_<rounds>" besides."""


def draw_input_matrix(matrix: Any, config: Any, *, kind: str, seed: int) -> None:
    """Sets A [in, r] to a draw, or to this tensor rank's rows of one.

    Args:
        matrix: The parameter.
        config: PaddleNLP's configuration of the model.
        kind: "gaussian", or the default for any other.
        seed: Of this layer alone.
    """
    degree = max(config.tensor_parallel_degree, 1) if matrix.is_distributed else 1
    num_rows, rank = matrix.shape
    random = np.random.default_rng(seed)
    shape = (num_rows * degree, rank)  # of all ranks
    if kind == "gaussian":
        whole = random.normal(0, 1 / rank, shape)
    else:
        bound = 1 / math.sqrt(shape[0])
        whole = random.uniform(-bound, bound, shape)
    first = max(config.tensor_parallel_rank, 0) * num_rows if degree > 1 else 0
    matrix.set_value(_as_tensor(whole[first : first + num_rows], matrix.dtype))


WholeFactors = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class StartFactors:
    """What the matrices of a layer started from where that has left its weight; this rank's parts, float32.

    Attributes:
        left: Of A [in, r].
        right: Of B [r, out].
    """

    left: Any
    right: Any


def find_starts(
    layers: Mapping[str, Any], config: Any, *, kind: str, seeds: Mapping[str, int]
) -> Iterator[tuple[str, WholeFactors]]:
    """Both matrices [in, r] and [r, out] of every whole layer, float32; all ranks that share the layers must call it.

    Tensor-parallel ranks find those of one layer each at a time, and tell the others.

    Args:
        layers: Name -> one of PaddleNLP's LoRA layers, with the weight that nothing has left yet.
        config: PaddleNLP's configuration of the model.
        kind: "pissa", "pissa_niter_<rounds>" or "olora".
        seeds: Name -> seed of a layer.
    """
    degree, rank = max(config.tensor_parallel_degree, 1), max(config.tensor_parallel_rank, 0)
    names = list(layers)
    for first in range(0, len(names), degree):
        found: dict[str, WholeFactors] = {}
        some = names[first : first + degree]
        for number, name in enumerate(some):
            whole = _whole_weight(name, layers[name], config)
            if number == rank or not _is_shared(name, config):
                found[name] = _find_factors(whole, int(layers[name].r), kind, seeds[name])
        for name in some:
            if _is_shared(name, config):
                found[name] = _tell(found.get(name), name, layers[name], config)
            yield name, found[name]


def _is_shared(name: str, config: Any) -> bool:
    return find_local_split(f"{name}.weight", config) is not None


def _find_factors(whole: NDArray[Any], rank: int, kind: str, seed: int) -> WholeFactors:
    if kind == "olora":
        ortho, upper = np.linalg.qr(whole.T)  # [out, k], [k, in]
        return np.ascontiguousarray(upper[:rank].T), np.ascontiguousarray(ortho[:, :rank].T)
    left, sizes, right = leading_vectors(whole, rank, num_rounds=num_rounds_of(kind), seed=seed)
    roots = np.sqrt(sizes)
    return left * roots, roots[:, None] * right


def _tell(mine: WholeFactors | None, name: str, layer: Any, config: Any) -> WholeFactors:
    """The matrices of a layer from the one rank that has found them."""
    split = find_local_split(f"{name}.weight", config)
    assert split is not None
    num_in, num_out = split.whole_shape(tuple(layer.weight.shape), config.tensor_parallel_degree)
    shapes = (num_in, int(layer.r)), (int(layer.r), num_out)
    told = []
    for number, shape in enumerate(shapes):
        own = paddle.zeros(shape, "float32") if mine is None else _as_tensor(mine[number], "float32")
        total = mp_ops._mp_allreduce(
            own, group=layer.model_parallel_group, use_calc_stream=True, use_model_parallel=True
        )
        told.append(total.numpy())
    return told[0], told[1]


def take_start(name: str, layer: Any, config: Any, whole: WholeFactors) -> StartFactors:
    """Takes what A and B start from out of a layer's weight, and gives it to A and B.

    Args:
        name: Of the layer.
        layer: One of PaddleNLP's LoRA layers.
        config: PaddleNLP's configuration of the model.
        whole: Both matrices of the whole layer.

    Raises:
        UserError: The weight is packed.
    """
    if is_packed(layer):
        raise UserError(
            f"the adapter starts from parts of the weight of {name} (pissa, olora), which leave it, and the base holds "
            "it in packed form: merge the adapter into the base that it was trained on (merge_lora_params.py)"
        )
    parts = []
    for end, array in zip(("lora_A", "lora_B"), whole, strict=True):
        split = find_local_split(f"{name}.{end}", config)
        mine = (
            split.part(array, config.tensor_parallel_degree, config.tensor_parallel_rank) if split else array
        )
        parts.append(_as_tensor(mine, "float32"))
    start = StartFactors(*parts)
    with paddle.no_grad():
        weight = layer.weight.astype("float32") - layer.scaling * start.left @ start.right
        layer.weight.set_value(weight.astype(layer.weight.dtype))
        layer.lora_A.set_value(start.left.astype(layer.lora_A.dtype))
        layer.lora_B.set_value(start.right.astype(layer.lora_B.dtype))
    return start


def _whole_weight(name: str, layer: Any, config: Any) -> NDArray[Any]:
    """A layer's weight [in, out] of all tensor-parallel ranks, float32."""
    own = layer.weight.astype("float32")
    split = find_local_split(f"{name}.weight", config)
    if split is None:
        alone: NDArray[Any] = own.numpy()
        return alone
    degree, shape = config.tensor_parallel_degree, tuple(own.shape)
    # One row, joined along its last axis: the stretches of all ranks in their order.
    flat = (
        mp_ops._c_concat(own.reshape([1, -1]), group=layer.model_parallel_group).numpy().reshape(degree, -1)
    )
    whole = np.empty(split.whole_shape(shape, degree), np.float32)
    for rank, part in enumerate(flat):
        split.put(whole, part.reshape(shape), degree=degree, rank=rank)
    return whole


def _as_tensor(array: NDArray[Any], dtype: Any) -> Any:
    return paddle.to_tensor(array.astype(np.float32)).astype(dtype)
