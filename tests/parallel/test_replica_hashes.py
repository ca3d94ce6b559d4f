"""Hashes of tensors: equal for equal bits, different for any difference that training could make."""

import numpy as np
import paddle
import pytest

from finetune.parallel.replica_hashes import ReplicasDiverged, check_replicas, tensor_hash
from finetune.processes.groups import ProcessGroups
from finetune.processes.layout import Layout
from tests.processes.thread_groups import run_ranks

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


@pytest.mark.parametrize(("layout", "rank"), [(Layout(data=2), 1), (Layout(data=3), 0)])
def test_a_replica_that_differs_is_named_on_every_rank(layout, rank):
    """Of two the first rank's counts as usual, of three the one that two have."""

    def compare(groups: ProcessGroups) -> None:
        values = paddle.to_tensor(VALUES) if groups.rank else changed(7, lambda value: value + 1)
        check_replicas({"norm": values, "bias": paddle.ones([2])}, groups, "after step 12")

    for error in run_ranks(layout, compare):
        assert isinstance(error, ReplicasDiverged)
        assert f"values after step 12 where they must hold the same: norm (rank {rank}). In" in str(error)


def test_tensor_ranks_are_compared_in_what_they_hold_whole():
    def compare(groups: ProcessGroups) -> None:
        own = paddle.full([4], float(groups.rank))  # different parts of one tensor
        check_replicas({"part": own, "norm": paddle.ones([2])}, groups, "now", same_over_tensor={"norm"})
        check_replicas({"part": own, "norm": own}, groups, "now", same_over_tensor={"norm"})

    for error in run_ranks(Layout(tensor=2), compare):
        assert isinstance(error, ReplicasDiverged) and "norm" in str(error) and "part" not in str(error)
