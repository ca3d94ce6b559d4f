"""Plain values out of pickles, beside Python's own reader, which may run anything."""

from __future__ import annotations

import io
import pickle

import pytest

from finetune.storage.pickles import PickleReader


def read(content: bytes) -> object:
    return PickleReader(io.BytesIO(content), len(content), {}, "copy it again").load()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        {"zero": 0, "byte": 255, "short": 65535, "long": 2**31, "least": -(2**63), "most": 2**63 - 1},
        {"sixty-four bits": 2**64 - 1},  # nine bytes, the sign among them
        {
            "text": "上衣" * 200,
            "none": None,
            "flags": [True, False],
            "pair": (1, 2.5),
            "bytes": b"\x00" * 300,
        },
        {"nested": {"a": [{"b": ()}]}, "empty": [{}, [], ""]},
    ],
    ids=["integers", "large", "kinds", "nested"],
)
def test_plain_values_are_those_of_pythons_reader(value, protocol):
    content = pickle.dumps(value, protocol=protocol)
    assert read(content) == pickle.loads(content) == value


def test_an_integer_of_more_than_nine_bytes_is_refused():
    with pytest.raises(ValueError, match="an integer of 10 bytes"):
        read(pickle.dumps({"large": 2**72}, protocol=2))


def test_one_object_twice_stays_one():
    shared = ["x"]
    first, second = read(pickle.dumps([shared, shared], protocol=2))
    assert first is second


@pytest.mark.parametrize("length", [0, 1, 5, 20])
def test_a_pickle_that_ends_too_early_is_no_value(length):
    with pytest.raises(EOFError):
        read(pickle.dumps({"text": "a red dress"}, protocol=4)[:length])
