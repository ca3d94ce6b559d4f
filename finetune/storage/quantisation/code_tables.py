"""The values that a code of 4 or 8 bits can stand for, and how the nearest is found.

nf4: the quantiles of a normal distribution between -1 and 1 (Dettmers et al., "QLoRA: Efficient Finetuning of
Quantized LLMs", 2023). fp4: sign, two bits of exponent, one of mantissa, over its largest value 12. The dynamic
table: seven decades of exponents with up to 64 steps each and a sign (Dettmers et al., "8-bit Optimizers via
Block-wise Quantization", 2021). All of them as bitsandbytes has them, to the last bit.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]

_NF4_BITS = (
    0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A24D, 0xBE3D353F, 0xBDBA7871, 0x00000000,
    0x3DA2FAFF, 0x3E24CAE3, 0x3E7C04DD, 0x3EAD033A, 0x3EE1A4B8, 0x3F1007AB, 0x3F3913B3, 0x3F800000,
)  # fmt: skip
_FP4_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3)
_NUM_DECADES = 7
_NUM_BUCKETS = 2**16
TINY = np.float32(1e-38)
"""Stands in for the largest value of a block of zeros, so that it can be divided by."""


@functools.cache
def four_bit_values(kind: str) -> Floats:
    """The 16 values of "nf4" or "fp4", float32, in the order of their codes."""
    if kind == "nf4":
        return np.array(_NF4_BITS, np.uint32).view(np.float32)
    magnitudes = np.array(_FP4_TWELFTHS, np.float32) / np.float32(12)
    return np.concatenate([magnitudes, np.float32(0) - magnitudes])


@functools.cache
def _sorted_codes(kind: str) -> tuple[Floats, Codes]:
    """Borders between neighbouring values [15], and the code of each interval [16]."""
    values = four_bit_values(kind)
    order = np.argsort(values, kind="stable")
    rising = values[order]
    return (rising[1:] + rising[:-1]) / np.float32(2), order.astype(np.uint8)


def nearest_four_bit(scaled: Floats, kind: str) -> Codes:
    """Codes of the values nearest to numbers within -1 and 1; halfway between two, the smaller value."""
    borders, codes = _sorted_codes(kind)
    return codes[np.searchsorted(borders, scaled, side="left")]


@functools.cache
def dynamic_values() -> Floats:
    """The 256 values of the dynamic table, float32, rising from about -0.993 to 1."""
    values = [0.0, 1.0]
    for decade in range(_NUM_DECADES):
        edges = _even_steps(2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (decade + 1 - _NUM_DECADES)) * middles
        values += [*scaled.tolist(), *(-scaled).tolist()]
    return np.sort(np.array(values, np.float32))


def _even_steps(count: int) -> Floats:
    """`count` numbers from 0.1 to 1 as torch computes them.

    The step is a float32 and the lower half counts up from the start, the upper half down from the end, each
    product and sum rounded once together.
    """
    first, last = np.float32(0.1), np.float32(1.0)
    step = np.float64((last - first) / np.float32(count - 1))
    places = np.arange(count)
    rising = (np.float64(first) + step * places).astype(np.float32)
    falling = (np.float64(last) - step * (count - 1 - places)).astype(np.float32)
    return np.where(places < count // 2, rising, falling)


def nearest_dynamic(scaled: Floats) -> Codes:
    """Codes of the dynamic table for numbers within -1 and 1.

    As on bitsandbytes' CPU: the range is divided into 65,536 buckets, and a number gets the code that is nearest to
    its bucket, which next to a border may be the second nearest to the number.
    """
    bucket = (scaled + np.float32(1)) * np.float32(0.5) * np.float32(_NUM_BUCKETS - 1) + np.float32(0.5)
    codes: Codes = _bucket_codes()[bucket.astype(np.uint16)]
    return codes


@functools.cache
def _bucket_codes() -> Codes:
    centres = np.arange(_NUM_BUCKETS, dtype=np.float32) / np.float32(_NUM_BUCKETS - 1)
    centres = centres * np.float32(2) - np.float32(1)
    values = dynamic_values()
    below = np.clip(np.searchsorted(values, centres, side="right") - 1, 0, len(values) - 2)
    is_above_nearer = np.abs(centres - values[below + 1]) < np.abs(centres - values[below])
    codes: Codes = (below + is_above_nearer).astype(np.uint8)
    return codes
