"""Values of the options that the merge commands share."""

from __future__ import annotations

import argparse

import pytest

from finetune.merge.option_types import parse_bool, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("1.5GiB", 3 * 2**29), (" 5 gb ", 5 * 10**9), ("2MB", 2 * 10**6), ("1KiB", 1024), ("1.9", 1)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["0", "0.5", "", "GB", "-1", "5XB", "1 000", "0.0001KB"])
def test_what_is_no_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no size: write a number and KB"):
        parse_size(text)


def test_truth_values():
    assert [parse_bool(text) for text in ("true", "YES", "1", "false", "no", "0")] == [True] * 3 + [False] * 3
    with pytest.raises(argparse.ArgumentTypeError, match="'maybe' is neither true nor false"):
        parse_bool("maybe")
