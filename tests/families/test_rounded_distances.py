"""Distances (ALiBi) that a family's published code rounds."""

from __future__ import annotations

import numpy as np
import paddle

from finetune.families import attention


def _rounded(array: np.ndarray) -> np.ndarray:
    return paddle.to_tensor(array).astype("bfloat16").astype("float32").numpy()


def test_distances_of_falcon_are_rounded_as_its_published_code_rounds_them():
    """Positions, slopes and products to bfloat16, one after the other: from 256 on some keys share a position."""
    slopes = np.array([0.5, 0.3535534, 0.011], np.float32)
    positions = np.arange(600)
    factors = (_rounded(each) for each in (slopes[:, None], positions.astype(np.float32)))
    products = _rounded(np.prod([*np.broadcast_arrays(*factors)], axis=0))  # [heads, keys]
    assert (np.diff(products[0])[260:] == 0).any() and np.abs(products[1] - slopes[1] * positions).max() > 0.1
    visible = attention.dense_mask(None, (1, 2), 598)
    ids = paddle.to_tensor(positions).unsqueeze(0)
    bias = attention.distance_bias(paddle.to_tensor(slopes), ids, visible, rounded_divisor=3.0)[0].numpy()
    expected = (products[:, None] - products[:, -2:, None]) / np.float32(3)
    np.testing.assert_array_equal(
        bias[:, :, :-1], expected[:, :, :-1]
    )  # the last key is hidden from one query
