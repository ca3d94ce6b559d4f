"""Matrices from the tensors of PaddleNLP's quantised layers, each with quant_weight int8 [out, in] and quant_scale [out].

    llm.int8            integers around 0, in place
    weight_only_int8    integers + 128, in an order that the matrix products of the GPU want:
        sm75 to sm90    pairs of outputs in stretches of 64 inputs, and in each 16 of these
                        0 8 1 9 2 10 3 11 4 12 5 13 6 14 7 15
        sm70            [in, out], and in each 4 outputs 0 2 1 3

Nothing in a folder tells the GPU. But an output's scale is its largest weight divided by 127, so that in the right order
every output has an integer of 126 or more; in another one its integers are those of several outputs, and of many none is as
large. Both orders are those of Paddle's own operator (`paddle.nn.quant.weight_quantize`), which tests compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.storage.quantisation.grouped_matrix import Bytes, GroupedMatrix
from finetune.storage.quantisation.integer_tensors import Parts, check_shapes, grouped
from finetune.storage.quantisation.stored_format import StoredFormat

_MIDDLE = 128
_LARGEST = 126
_STRETCH, _TILE = 64, 16
_TILE_ORDER = np.arange(_TILE).reshape(2, _TILE // 2).T.reshape(-1)
"""Input of every place of a tile."""


def read_paddlenlp(name: str, parts: Parts, form: StoredFormat) -> GroupedMatrix:
    """A layer that PaddleNLP quantised to 8 bits; see the module's text.

    Raises:
        UserError: The tensors do not fit together, or no order of bytes, or more than one, fits them.
    """
    codes, scales = parts["quant_weight"], parts["quant_scale"]
    num_rows, num_columns = codes.shape
    check_shapes(name, {"quant_scale": (scales, (num_rows,))})
    if form.form == "llm.int8":
        integers: Bytes = codes.view(np.uint8) ^ np.uint8(_MIDDLE)
    else:
        integers = _in_place(name, codes, np.asarray(scales) != 0)
    zeros = np.full((num_rows, 1), _MIDDLE, np.uint8)
    return grouped(8, integers, scales[:, None], zeros, None, num_columns)


def _in_place(name: str, stored: NDArray[Any], is_used: NDArray[np.bool_]) -> Bytes:
    """The integers from 0 on, [out, in], in the one order in which they reach the bounds of their scales."""
    shape, flat = (stored.shape[0], stored.shape[1]), np.ascontiguousarray(stored).view(np.uint8)
    found = {title: made for title, order in _ORDERS.items() if (made := order(flat, shape)) is not None}
    if not is_used.any():
        return np.full(shape, _MIDDLE, np.uint8)
    fitting = [title for title, made in found.items() if _reaches_bounds(made[is_used])]
    if len(fitting) != 1:
        seen = " and ".join(fitting) if fitting else "none"
        raise UserError(
            f"{name}: the bytes of weight_only_int8 lie in an order of the GPU that wrote them, which shows in the largest "
            f"integers of its {shape[0]} outputs; of {', '.join(found) or 'the known orders'} here fits {seen}. Give the "
            "model that it was made from, or one quantised by llm.int8"
        )
    return found[fitting[0]]


def _reaches_bounds(integers: Bytes) -> bool:
    """Whether every row has an integer that is as large as its scale allows."""
    lowest, highest = integers.min(axis=1, initial=_MIDDLE), integers.max(axis=1, initial=_MIDDLE)
    return bool(((lowest <= _MIDDLE - _LARGEST) | (highest >= _MIDDLE + _LARGEST)).all())


def _from_tiles(stored: Bytes, shape: tuple[int, int]) -> Bytes | None:
    num_rows, num_columns = shape
    if num_rows % 2 or num_columns % _STRETCH:
        return None
    tiles = stored.reshape(num_rows // 2, num_columns // _STRETCH, 2, _STRETCH // _TILE, _TILE)
    placed = np.empty_like(tiles)
    placed[..., _TILE_ORDER] = tiles
    return np.ascontiguousarray(placed.transpose(0, 2, 1, 3, 4)).reshape(shape)


def _from_rows(stored: Bytes, shape: tuple[int, int]) -> Bytes | None:
    num_rows, num_columns = shape
    if num_rows % 4:
        return None
    placed = stored.reshape(num_columns, num_rows // 4, 4)[:, :, [0, 2, 1, 3]]
    return np.ascontiguousarray(placed.reshape(num_columns, num_rows).T)


_ORDERS: dict[str, Callable[[Bytes, tuple[int, int]], Bytes | None]] = {
    "sm75 to sm90": _from_tiles,
    "sm70": _from_rows,
}
