"""Caches of keys and values whose rows come and go, of whatever form a model gives them.

PaddleNLP's models keep them as nested tuples or lists, with the axes of rows and of tokens in different places. Where
they are is found out by running the model over two batches of known sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CacheForm:
    """How a model lays its cache out.

    Attributes:
        row_axis: Axis of the rows of a batch.
        token_axis: Axis of the tokens.
        num_prefix: Columns of a trained prefix, which stand in front of everything, padding too.
    """

    row_axis: int
    token_axis: int
    num_prefix: int = 0

    def join(self, caches: Sequence[Any]) -> Any:
        """One cache with the rows of all, padded on the left to the longest."""
        import paddle

        width = max(self.num_columns(cache) for cache in caches)
        padded = [self.pad(cache, width - self.num_columns(cache)) for cache in caches]
        return map_tensors(lambda *parts: paddle.concat(parts, axis=self.row_axis), *padded)

    def keep(self, cache: Any, places: Sequence[int]) -> Any:
        """The rows at some places, one of them several times if it is named several times."""
        import paddle

        index = paddle.to_tensor(list(places), "int64")
        return map_tensors(lambda part: paddle.index_select(part, index, axis=self.row_axis), cache)

    def pad(self, cache: Any, num_columns: int) -> Any:
        """Zeros in front of every row, behind the prefix."""
        import paddle

        if not num_columns:
            return cache

        def padded(part: Any) -> Any:
            shape = list(part.shape)
            shape[self.token_axis] = num_columns
            zeros = paddle.zeros(shape, part.dtype)
            if not self.num_prefix:
                return paddle.concat([zeros, part], axis=self.token_axis)
            return paddle.concat([*self._cut(part, self.num_prefix)[:1], zeros, self._cut(part, self.num_prefix)[1]],
                                 axis=self.token_axis)  # fmt: skip

        return map_tensors(padded, cache)

    def trim(self, cache: Any, num_columns: int) -> Any:
        """Takes columns away in front of every row, behind the prefix."""
        import paddle

        if not num_columns:
            return cache

        def trimmed(part: Any) -> Any:
            rest = self._cut(part, self.num_prefix + num_columns)[1]
            if not self.num_prefix:
                return rest
            return paddle.concat([self._cut(part, self.num_prefix)[0], rest], axis=self.token_axis)

        return map_tensors(trimmed, cache)

    def num_columns(self, cache: Any) -> int:
        """Columns of tokens and padding, the prefix not counted."""
        return int(first_tensor(cache).shape[self.token_axis]) - self.num_prefix

    def _cut(self, part: Any, place: int) -> tuple[Any, Any]:
        import paddle

        first, second = paddle.split(part, [place, -1], axis=self.token_axis)
        return first, second


def find_form(run: Callable[[int, int], Any]) -> CacheForm:
    """Finds out how a model lays its cache out.

    Args:
        run: Number of rows and of tokens -> the cache of such a batch.

    Raises:
        ValueError: The cache has no axis, or several, that follow one of the numbers.
    """
    sizes = (2, 5), (3, 9)
    first, second = ([tensor.shape for tensor in tensors(run(*size))] for size in sizes)
    forms = {_compare(before, after) for before, after in zip(first, second, strict=True)}
    if len(forms) != 1:
        raise ValueError(
            f"the layers of this model keep caches of different forms: {sorted(map(str, forms))}"
        )
    row_axis, token_axis = forms.pop()
    return CacheForm(row_axis, token_axis, int(first[0][token_axis]) - sizes[0][1])


def _compare(before: Sequence[int], after: Sequence[int]) -> tuple[int, int]:
    """The axes that grew by the 1 row and by the 4 tokens by which the two batches differ."""
    grown = [int(new) - int(old) for old, new in zip(before, after, strict=True)]
    if grown.count(1) != 1 or grown.count(4) != 1 or grown.count(0) != len(grown) - 2:
        raise ValueError(f"caches of shapes {list(before)} and {list(after)} show no axes of rows and tokens")
    return grown.index(1), grown.index(4)


def map_tensors(function: Callable[..., Any], *caches: Any) -> Any:
    """Applies a function to the tensors at the same place of nested tuples and lists of one form."""
    first = caches[0]
    if isinstance(first, tuple | list):
        parts = [map_tensors(function, *each) for each in zip(*caches, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first if first is None else function(*caches)


def tensors(cache: Any) -> list[Any]:
    """The tensors of a nested cache, in its order."""
    found: list[Any] = []
    map_tensors(found.append, cache)
    return found


def first_tensor(cache: Any) -> Any:
    """Any tensor of a nested cache: all have the same number of rows and columns."""
    while isinstance(cache, tuple | list):
        cache = cache[0]
    return cache
