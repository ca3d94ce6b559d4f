"""What the matrices of LoRA start from; drawn or computed for the whole layer and then cut.

default    A uniform within +-1 / sqrt(in), B zero: PaddleNLP's and peft's, He et al.'s with a slope of sqrt(5)
gaussian   A normal with deviation 1 / r, B zero: peft's
pissa      A @ B the part of W along its r leading singular vectors; it leaves W (Meng et al., "PiSSA", 2024)
olora      W^T = Q R: A the first r rows of R turned, B the first r columns of Q turned; scaling * A @ B leaves W
           (Buyukakyuz, "OLoRA", 2024)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle.distributed.fleet.layers.mpu import mp_ops

from finetune.checkpoints.tensors_of_ranks import find_local_split

CHANGING = ("pissa", "olora")
"""Those that change the frozen weight."""


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


@dataclass(frozen=True)
class StartFactors:
    """What the matrices of a layer started from where that has left its weight; this rank's parts, float32.

    Attributes:
        left: Of A [in, r].
        right: Of B [r, out].
    """

    left: Any
    right: Any


def find_start(name: str, layer: Any, config: Any, *, kind: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both matrices [in, r] and [r, out] of the whole layer, float32; all ranks that share it must call it.

    Args:
        name: Of the layer.
        layer: One of PaddleNLP's LoRA layers, with the weight that nothing has left yet.
        config: PaddleNLP's configuration of the model.
        kind: "pissa" or "olora".
    """
    whole = _whole_weight(name, layer, config)
    rank = int(layer.r)
    if kind == "olora":
        ortho, upper = np.linalg.qr(whole.T)  # [out, k], [k, in]
        return np.ascontiguousarray(upper[:rank].T), np.ascontiguousarray(ortho[:, :rank].T)
    left, sizes, right = np.linalg.svd(whole, full_matrices=False)
    roots = np.sqrt(sizes[:rank])
    return left[:, :rank] * roots, roots[:, None] * right[:rank]


def take_start(name: str, layer: Any, config: Any, whole: tuple[NDArray[Any], NDArray[Any]]) -> StartFactors:
    """Takes what A and B start from out of a layer's weight, and gives it to A and B.

    Args:
        name: Of the layer.
        layer: One of PaddleNLP's LoRA layers.
        config: PaddleNLP's configuration of the model.
        whole: Both matrices of the whole layer.
    """
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
