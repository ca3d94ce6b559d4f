"""Tables of rotary positions stay float32 when a model is loaded in half precision, as training with O2 does."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from finetune.families.family import families
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.models.tiny.checkpoint import build_tiny


def tables_of(model) -> list[np.ndarray]:
    layers = [layer.rotary_emb for layer in model.sublayers() if hasattr(layer, "rotary_emb")]
    like = paddle.zeros([1, 8, 2, 4])
    found = [layer(like, seq_len=8) for layer in layers]
    assert all(table.dtype == paddle.float32 for pair in found for table in pair)
    return [table.numpy() for pair in found for table in pair]


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_tables_are_the_same_whatever_the_type_of_the_weights(name, tmp_path):
    assert name in families()
    build_tiny(name, tmp_path / "model", num_layers=2)
    whole, half = (
        load_model(resolve_model(tmp_path / "model"), dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    expected, found = tables_of(whole), tables_of(half)
    assert expected, "this family has no such layer"
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)
