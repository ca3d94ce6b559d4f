"""Hashes of tensors: equal for equal bits, different for any difference that training could make."""

import numpy as np
import paddle
import pytest

from finetune.parallel.replica_hashes import check_replicas, tensor_hash
from finetune.processes.groups import ProcessGroups

VALUES = np.random.default_rng(0).standard_normal(20_001).astype("float32")


def changed(index: slice | int | list[int], function) -> paddle.Tensor:
    values = VALUES.copy()
    values[index] = function(values[index])
    return paddle.to_tensor(values)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_equal_bits_have_one_hash(dtype: str):
    first, second = (paddle.to_tensor(VALUES).astype(dtype) for _ in range(2))
    assert tensor_hash(first) == tensor_hash(second)
    assert -(2**63) <= tensor_hash(first) < 2**63


@pytest.mark.parametrize(
    "other",
    [
        changed(0, lambda value: np.nextafter(value, np.float32(9))),
        changed(20_000, lambda value: -value),  # in the part that fills no whole word
        changed([1, 3], np.negative),  # the highest bits of two words
        changed(slice(None), np.negative),
        changed(slice(None), lambda values: values[::-1]),
        changed(slice(0, 16384), lambda values: np.roll(values, 8192)),
        changed([4, 6], lambda values: values[::-1]),
        paddle.to_tensor(VALUES[:-1]),
    ],
)
def test_any_difference_shows(other: paddle.Tensor):
    assert tensor_hash(other) != tensor_hash(paddle.to_tensor(VALUES))


def test_odd_sizes_have_hashes():
    hashes = [tensor_hash(tensor) for tensor in (paddle.zeros([0]), paddle.zeros([1]), paddle.to_tensor(0.5))]
    assert len(set(hashes)) == 3


def test_a_transposed_view_is_hashed_as_what_it_shows():
    matrix = paddle.to_tensor(VALUES[:20_000].reshape(100, 200))
    assert tensor_hash(matrix.T) == tensor_hash(paddle.to_tensor(matrix.numpy().T.copy()))


def test_one_process_has_nothing_to_compare():
    check_replicas({"norm": paddle.ones([2])}, ProcessGroups(), "at the start", same_over_tensor={"norm"})
