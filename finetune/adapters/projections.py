"""VeRA's two random matrices, which all layers share: made from a key, never trained. NumPy only.

A layer's update is W + A[:in] diag(d) B[:, :out] diag(b) with A [most in, r] and B [r, most out], the sizes those of the
largest adapted layers; Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation" (2023). Both are uniform with
He et al.'s bound for ReLU, sqrt(6 / fan), the fan of A its rows and that of B the rank.

The numbers are those of peft to the last bit: a Mersenne Twister seeded by the key, the low 24 bits of each word,
A before B, each in the order of its transpose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.storage.checkpoints import TensorFiles
from finetune.storage.dtypes import as_float32
from finetune.storage.writer import ComputedTensor, Layout, write_tensors

PROJECTIONS_FILE = "vera_projections.safetensors"
"""Beside an adapter that was told to keep its matrices (`save_projection`): vera_A and vera_B."""
_NAMES = ("vera_A", "vera_B")


@dataclass(frozen=True)
class Projections:
    """Both matrices.

    Attributes:
        left: A [most in, r], float32.
        right: B [r, most out], float32.
    """

    left: NDArray[Any]
    right: NDArray[Any]

    def check(self, path: Path, *, rank: int, num_in: int, num_out: int) -> None:
        """They must be large enough for layers.

        Args:
            path: Where they come from, for the message.
            rank: Of the adapter.
            num_in: Rows of the largest layer.
            num_out: Columns of the largest layer.

        Raises:
            UserError: They are of another rank, or too small.
        """
        needs = (num_in, rank), (rank, num_out)
        fits = self.left.ndim == self.right.ndim == 2 and (
            self.left.shape[1] == self.right.shape[0] == rank
            and self.left.shape[0] >= num_in
            and self.right.shape[1] >= num_out
        )
        if not fits:
            raise UserError(
                f"{path} has vera_A and vera_B of {list(self.left.shape)} and {list(self.right.shape)}, but the layers of "
                f"this adapter need {list(needs[0])} and {list(needs[1])}: copy the adapter again"
            )


def draw_projections(key: int, *, rank: int, num_in: int, num_out: int) -> Projections:
    """The matrices of a key.

    Args:
        key: Seed; of more than 32 bits the lowest count.
        rank: Columns of A and rows of B.
        num_in: Rows of A.
        num_out: Columns of B.
    """
    words = np.random.RandomState(key % 2**32)
    left = _draw(words, (rank, num_in), fan=num_in).T
    right = _draw(words, (num_out, rank), fan=rank).T
    return Projections(np.ascontiguousarray(left), np.ascontiguousarray(right))


def _draw(words: np.random.RandomState, shape: tuple[int, int], *, fan: int) -> NDArray[Any]:
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(fan))  # so rounded as in peft
    low = np.float32(-bound)
    width = np.float32(np.float32(bound) - low)
    bits = words.randint(0, 2**32, size=shape, dtype=np.uint32) & np.uint32(2**24 - 1)
    # Rounded once, after product and sum, as a fused operation does.
    drawn: NDArray[Any] = (bits.astype(np.float64) * 2.0**-24 * width + low).astype(np.float32)
    return drawn


def read_projections(folder: Path) -> Projections | None:
    """The matrices that lie beside an adapter; None where none do."""
    path = folder / PROJECTIONS_FILE
    if not path.is_file():
        return None
    files = TensorFiles([path])
    if missing := [name for name in _NAMES if name not in files.names]:
        raise UserError(f"{path} lacks {missing[0]}: copy the adapter again")
    return Projections(*(as_float32(files.read(name)) for name in _NAMES))


def write_projections(folder: Path, projections: Projections) -> None:
    """Writes the matrices beside an adapter."""
    tensors = [
        ComputedTensor(name, np.dtype("<f4"), matrix.shape, _one_block(matrix))
        for name, matrix in zip(_NAMES, (projections.left, projections.right), strict=True)
    ]
    write_tensors(folder, tensors, Layout(PROJECTIONS_FILE.removesuffix(".safetensors"), 2**62))


def _one_block(matrix: NDArray[Any]) -> Callable[[], Iterator[NDArray[Any]]]:
    return lambda: iter([np.ascontiguousarray(matrix)])
