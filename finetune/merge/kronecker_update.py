"""The update of a weight that is a Kronecker product (LoKr), a few rows at a time. NumPy only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError

Matrices = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class KroneckerUpdate:
    """What is added to a weight [in, out]: the transpose of w1 (x) w2.

    Attributes:
        shape: Of the weight.
        matrices: Reads w1 [l, m], with the factor in it, and w2 [k, n], float32; out = l k and in = m n.
        path: The adapter's file, for messages.
        chosen: The columns of the whole weight that this one has; None for all in their order.
        is_turned: Whether it is the update of the transposed weight, [out, in].
    """

    shape: tuple[int, int]
    matrices: Callable[[], Matrices]
    path: Path
    chosen: NDArray[Any] | None = None
    is_turned: bool = False
    lengths: None = None

    def turned(self) -> KroneckerUpdate:
        """The update of the transposed weight."""
        return replace(self, shape=(self.shape[1], self.shape[0]), is_turned=not self.is_turned)

    def columns(self, chosen: NDArray[Any]) -> KroneckerUpdate:
        """The update of some columns of the weight."""
        assert not self.is_turned
        all_of_it = np.arange(self.shape[1]) if self.chosen is None else self.chosen
        return replace(self, shape=(self.shape[0], len(chosen)), chosen=all_of_it[chosen])

    def rows_reader(self) -> Callable[[int, int], NDArray[Any]]:
        """A function that gives the rows from one number on, and how many.

        Raises:
            UserError: Not all values are finite.
        """
        first, second = self.finite_matrices()
        if not self.is_turned:
            first, second = first.T, second.T  # [m, l], [n, k]
        num_second = second.shape[0]

        def read(begin: int, count: int) -> NDArray[Any]:
            numbers = np.arange(begin, begin + count)
            if self.is_turned and self.chosen is not None:
                numbers = self.chosen[begin : begin + count]
            left, right = first[numbers // num_second], second[numbers % num_second]
            rows: NDArray[Any] = (left[:, :, None] * right[:, None, :]).reshape(count, -1)
            return rows if self.is_turned or self.chosen is None else rows[:, self.chosen]

        return read

    def whole(self) -> NDArray[Any]:
        """All of it, by NumPy's own product."""
        dense: NDArray[Any] = np.kron(*self.finite_matrices())  # [out, in]
        dense = dense if self.chosen is None else dense[self.chosen]
        return np.ascontiguousarray(dense if self.is_turned else dense.T)

    def finite_matrices(self) -> Matrices:
        """w1 and w2.

        Raises:
            UserError: Not all values are finite.
        """
        first, second = self.matrices()
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            raise UserError(
                f"{self.path} holds values that are not finite: the training diverged. Merge an earlier checkpoint"
            )
        return first, second
