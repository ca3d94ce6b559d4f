"""The leading singular vectors of a weight, from which PiSSA starts, without a decomposition of the whole. NumPy only.

A random block is multiplied again and again by W^T W (or W W^T, whichever is smaller), and what comes of all rounds
spans the space in which the vectors are looked for (Halko, Martinsson, Shkolnisky, Tygert, "An Algorithm for the
Principal Component Analysis of Large Data Sets", 2011; Musco and Musco, "Randomized Block Krylov Methods", 2015). The
weight is read in blocks of rows, in float64. Rounds go on until the error of W V V^T is known to be below `TOLERANCE`
of its size: the residuals of the vectors over the distance to the next singular value. Where the two are too close for
that, the whole is decomposed after all. 4096 x 4096 at rank 16 takes 0.4 s of a core where singular
values fall as a trained weight's do, 4 s for random numbers, and 13 s as a whole.

With a number of rounds, as in peft's `pissa_niter_N`, it is the plain method of Halko, Martinsson and Tropp, "Finding
Structure with Randomness" (2011), algorithm 4.4, whose error nobody bounds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.storage.dtypes import as_float32

TOLERANCE = 1e-4
"""Largest relative error of the part of a weight along its leading singular vectors."""
_SMALL = 512
"""Matrices up to this side are decomposed as a whole."""
_MAX_SHARE = 0.4
"""Columns of the searched space over the smaller side, beyond which decomposing the whole is cheaper."""
_FIRST_ROUNDS = 4
"""Rounds before the vectors are looked for; every time in vain, half as many again are added."""
_BLOCK_ITEMS = 2**21

Vectors = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


def leading_vectors(
    weight: NDArray[Any], rank: int, *, num_rounds: int | None = None, seed: int = 0
) -> Vectors:
    """Left vectors [rows, rank], singular values [rank] and right vectors [rank, columns], float32.

    Args:
        weight: [rows, columns]; bfloat16 as uint16.
        rank: How many; at most the smaller side.
        num_rounds: Rounds of the plain method; None: as many as `TOLERANCE` takes.
        seed: Of the random block.
    """
    if weight.shape[0] < weight.shape[1]:
        right, sizes, left = leading_vectors(weight.T, rank, num_rounds=num_rounds, seed=seed)
        return left.T, sizes, right.T
    if num_rounds is not None:
        vectors = _plain(weight, rank, num_rounds, seed)
    else:
        vectors = _searched(weight, rank, seed)
    images = np.concatenate([block @ vectors for block in _row_blocks(weight)])  # [rows, rank]
    # The vectors are those of W^T W, so that their images are orthogonal but for rounding.
    sizes = np.linalg.norm(images, axis=0)
    left = images / np.maximum(sizes, np.finfo(np.float64).tiny)
    return left.astype(np.float32), sizes.astype(np.float32), np.ascontiguousarray(vectors.T, np.float32)


def num_rounds_of(kind: str) -> int | None:
    """Rounds that a word for PiSSA asks for; None for as many as it takes."""
    match = re.fullmatch(r"pissa_niter_([1-9]\d{0,2})", kind)
    return int(match[1]) if match else None


def _searched(weight: NDArray[Any], rank: int, seed: int) -> NDArray[Any]:
    """Right vectors [columns, rank] to `TOLERANCE`, float64."""
    num_columns = weight.shape[1]
    width = 2 * rank + 8
    if num_columns <= _SMALL or width * _FIRST_ROUNDS > _MAX_SHARE * num_columns:
        return _decomposed(weight, rank)
    found = _krylov(weight, rank, width, seed)
    return _decomposed(weight, rank) if found is None else found


def _krylov(weight: NDArray[Any], rank: int, width: int, seed: int) -> NDArray[Any] | None:
    """The vectors from the space of all rounds; None where they are not settled in a space worth searching."""
    num_columns = weight.shape[1]
    drawn = np.random.default_rng(seed).standard_normal((num_columns, width))
    newest = np.linalg.qr(drawn)[0]
    space, images = newest, np.empty((num_columns, 0))  # [columns, searched], and W^T W of it
    num_rounds = _FIRST_ROUNDS
    while space.shape[1] + num_rounds * width <= _MAX_SHARE * num_columns:
        for _ in range(num_rounds):
            image = _gram_product(weight, newest)
            images = np.concatenate([images, image], axis=1)
            rest = image - space @ (space.T @ image)
            rest -= space @ (space.T @ rest)  # what rounding left of it
            newest = np.linalg.qr(rest)[0]
            space = np.concatenate([space, newest], axis=1)
        known = space[:, : images.shape[1]]
        values, turns = np.linalg.eigh(known.T @ images)
        best = turns[:, ::-1][:, : rank + 1]
        values = values[::-1][: rank + 1]
        vectors: NDArray[Any] = known @ best[:, :rank]
        residual = np.linalg.norm(images @ best[:, :rank] - vectors * values[:rank])
        if residual <= TOLERANCE * (values[rank - 1] - values[rank]):
            return vectors
        num_rounds = max(2, images.shape[1] // width // 2)
    return None


def _plain(weight: NDArray[Any], rank: int, num_rounds: int, seed: int) -> NDArray[Any]:
    """Right vectors [columns, rank] after a number of rounds, float64."""
    space = np.linalg.qr(np.random.default_rng(seed).standard_normal((weight.shape[1], rank)))[0]
    for _ in range(num_rounds + 1):
        space = np.linalg.qr(_gram_product(weight, space))[0]
    _, turns = np.linalg.eigh(space.T @ _gram_product(weight, space))
    vectors: NDArray[Any] = space @ turns[:, ::-1]
    return vectors


def _decomposed(weight: NDArray[Any], rank: int) -> NDArray[Any]:
    """Right vectors [columns, rank] from all of W^T W, float64."""
    gram = np.zeros((weight.shape[1],) * 2)
    for block in _row_blocks(weight):
        gram += block.T @ block
    return np.ascontiguousarray(np.linalg.eigh(gram)[1][:, ::-1][:, :rank])


def _gram_product(weight: NDArray[Any], vectors: NDArray[Any]) -> NDArray[Any]:
    """W^T W of vectors [columns, n]."""
    total = np.zeros_like(vectors)
    for block in _row_blocks(weight):
        total += block.T @ (block @ vectors)
    return total


def _row_blocks(weight: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The rows in blocks, float64."""
    step = max(1, _BLOCK_ITEMS // weight.shape[1])
    for begin in range(0, weight.shape[0], step):
        yield as_float32(weight[begin : begin + step]).astype(np.float64)
