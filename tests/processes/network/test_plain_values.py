"""What ranks may tell each other, and nothing else."""

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.processes.network.plain_values import decode_value, encode_value

_KEYS = st.none() | st.booleans() | st.integers() | st.text() | st.tuples(st.text(), st.integers())
_VALUES = st.recursive(
    _KEYS | st.floats(allow_nan=False) | st.builds(Path, st.just("a/b")),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(_KEYS, inner),
    max_leaves=20,
)


@given(_VALUES)
def test_values_come_back_with_their_types(value):
    back = decode_value(encode_value(value))
    assert back == value and repr(back) == repr(value)


def test_numbers_of_numpy_and_odd_texts():
    assert decode_value(encode_value({np.int64(3): np.float32(0.5)})) == {3: 0.5}
    assert math.isnan(decode_value(encode_value(math.nan)))
    for text in ("中\udcff\0", Path("x/\udcff")):
        assert decode_value(encode_value(text)) == text


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", print, [np.zeros(2)], {"a": ValueError("x")}])
def test_anything_else_is_refused_before_it_is_sent(value):
    with pytest.raises(TypeError, match="is no plain value"):
        encode_value(value)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps({"a": 1}), b"", b"\xff\xfe", b'{"tuple": 3}', b'{"dict": [1]}', b'{"dict": [[[], 1]]}', b'{"path": 5}',
        b'{"tuple": [], "dict": []}', b"{}", b'{"__reduce__": []}', b"[" * 100_000, json.dumps({"dict": [["a"]]}).encode(),
    ],
)  # fmt: skip
def test_bytes_of_something_else_are_refused(data):
    with pytest.raises(ValueError):
        decode_value(data)
