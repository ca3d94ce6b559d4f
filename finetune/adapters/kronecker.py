"""The matrices of LoKr, whose Kronecker product is the update of a weight: their shapes, and their draw. NumPy only.

    W^T + alpha / r * (w1 (x) w2),    w1 [l, m], w2 [k, n],    out = l k, in = m n
Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation" (2023). Where that
has fewer numbers, w2 is a product w2_a [k, r] w2_b [r, n], and with `decompose_both` w1 as well. Names and shapes are
those of peft and PaddleNLP.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")


def factor_pair(size: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of a size.

    Args:
        size: The product.
        factor: The first one where it divides the size; otherwise the most that the first may be, which is then the
            largest divisor up to that and up to the root. -1: up to the root.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor == -1 else min(math.isqrt(size), max(factor, 1))
    first = next(each for each in range(most, 0, -1) if size % each == 0)
    return first, size // first


def kronecker_shapes(
    num_in: int, num_out: int, *, rank: int, factor: int = -1, decompose_both: bool = False
) -> dict[str, tuple[int, int]]:
    """End of a tensor's name ("w1", or "w1_a" and "w1_b"; "w2" likewise) -> shape.

    Args:
        num_in: Rows of the weight [in, out].
        num_out: Its columns.
        rank: Of the products.
        factor: See `factor_pair`.
        decompose_both: Whether w1 may be a product, too.
    """
    (m, n), (l, k) = factor_pair(num_in, factor), factor_pair(num_out, factor)  # noqa: E741
    shapes: dict[str, tuple[int, int]] = {}
    for name, rows, columns, may_be_product in (("w1", l, m, decompose_both), ("w2", k, n, True)):
        if may_be_product and rank < max(rows, columns) / 2:
            shapes |= {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)}
        else:
            shapes[name] = (rows, columns)
    return shapes


def draw_matrix(name: str, shape: tuple[int, int], seed: int) -> NDArray[Any]:
    """What a matrix starts from: w1, or w1_a, zero, so that the update is; the others uniform as LoRA's A, float32."""
    if name in ("w1", "w1_a"):
        return np.zeros(shape, np.float32)
    bound = 1 / math.sqrt(shape[1])
    random = np.random.default_rng([seed, NAMES.index(name)])
    return random.uniform(-bound, bound, shape).astype(np.float32)
