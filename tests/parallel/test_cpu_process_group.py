"""Collectives add in the order of ranks, half precision in float32, waited for or not; ranks are threads here."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict

import numpy as np
import paddle
import pytest
from paddle.base import core

from finetune.processes.cpu.links import PeerLostError
from finetune.processes.cpu.process_group import CpuProcessGroup
from tests.machine.half_precision.rounding import DTYPES, rounded
from tests.machine.half_precision.tensors import draw, values

WORLD = 3


class QueuedLinks:
    """Connections of one rank, as queues."""

    def __init__(self, rank: int, boxes):
        self.rank, self.world, self._boxes = rank, WORLD, boxes

    def send(self, peer: int, channel: int, data: memoryview) -> None:
        self._boxes[self.rank, peer, channel].put(bytearray(data))

    def receive(self, peer: int, channel: int, num_bytes: int) -> bytearray:
        data = self._boxes[peer, self.rank, channel].get(timeout=30)
        assert len(data) == num_bytes
        return data


def on_all_ranks(work) -> list:
    """What `work(group, rank)` returns, by rank."""
    boxes = defaultdict(queue.SimpleQueue)
    for sender in range(WORLD):
        for receiver in range(WORLD):
            for channel in (0, 1):
                boxes[sender, receiver, channel]
    results: list = [None] * WORLD

    def run(rank: int) -> None:
        results[rank] = work(CpuProcessGroup(QueuedLinks(rank, boxes), range(WORLD), 0), rank)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def shares(shape, dtype: str) -> list[np.ndarray]:
    return [rounded(draw(*shape, seed=rank, scale=10.0), dtype) for rank in range(WORLD)]


def summed(arrays: list[np.ndarray], dtype: str) -> np.ndarray:
    """One rank's after the other, rounded each time."""
    total = arrays[0]
    for array in arrays[1:]:
        total = rounded(total + array, dtype)
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (3, 20_000)], ids=["one round", "two rounds"])
def test_sums(dtype, shape):
    parts = shares(shape, dtype)

    def work(group, rank):
        tensor = paddle.to_tensor(parts[rank]).astype(dtype)
        group.all_reduce(tensor)
        return tensor

    for result in on_all_ranks(work):
        assert str(result.dtype).endswith(dtype)
        np.testing.assert_array_equal(values(result), summed(parts, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_and_smallest_and_shares_of_a_sum(dtype):
    parts = shares((6,), dtype)

    def work(group, rank):
        kinds = core.ReduceOp
        found = []
        for op in (kinds.MAX, kinds.MIN):
            tensor = paddle.to_tensor(parts[rank]).astype(dtype)
            group.all_reduce(tensor, op)
            found.append(values(tensor))
        share = paddle.zeros([2], dtype)
        group.reduce_scatter_tensor(share, paddle.to_tensor(parts[rank]).astype(dtype))
        return [*found, values(share)]

    for rank, (largest, smallest, share) in enumerate(on_all_ranks(work)):
        np.testing.assert_array_equal(largest, np.max(parts, axis=0))
        np.testing.assert_array_equal(smallest, np.min(parts, axis=0))
        np.testing.assert_array_equal(share, summed(parts, dtype)[2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_only_moved_keeps_every_bit(dtype):
    parts = shares((4,), dtype)

    def work(group, rank):
        mine = paddle.to_tensor(parts[rank]).astype(dtype)
        gathered = [paddle.zeros([4], dtype) for _ in range(WORLD)]
        group.all_gather(gathered, mine, True)
        group.broadcast(mine, 1)
        return [values(each) for each in (*gathered, mine)]

    for result in on_all_ranks(work):
        np.testing.assert_array_equal(result, [*parts, parts[1]])


def test_receives_are_filled_in_the_order_in_which_they_began():
    def work(group, rank):
        if rank == 0:
            for number in range(3):
                group.send(paddle.full([2], float(number)), 1, sync_op=False).wait()
            return None
        if rank == 2:
            return None
        tensors = [paddle.empty([2]) for _ in range(3)]
        tasks = [group.recv(tensor, 0, sync_op=False) for tensor in tensors[:2]]
        tasks[1].wait()  # the first message is for the first receive, whoever is waited for
        group.recv(tensors[2], 0)
        assert tasks[0].wait() and tasks[0].wait()
        return [tensor.tolist() for tensor in tensors]

    assert on_all_ranks(work)[1] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


def test_parts_of_a_tensor_are_sent_and_put_together():
    def work(group, rank):
        whole = paddle.arange(6, dtype="float32").reshape([2, 3])
        if rank == 0:
            group.send_partial_on_calc_stream(whole, 1, 3, 2)
        received = paddle.full([2, 3], -1.0)
        if rank == 1:
            group.recv_partial_on_calc_stream(received, 0, 3, 2)
        gathered = paddle.where(paddle.arange(6).reshape([2, 3]) // 2 == rank, whole, -whole)
        group.all_gather_partial_on_calc_stream(gathered, gathered, 3, rank)
        return received.tolist(), gathered.tolist()

    results = on_all_ranks(work)
    assert results[1][0] == [[-1.0, -1.0, -1.0], [-1.0, 4.0, 5.0]]
    assert [gathered for _, gathered in results] == [[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]] * 3


@pytest.mark.parametrize("dtype", [*DTYPES, "float32"])
def test_sums_that_run_beside_the_computation_have_the_bits_of_those_that_are_waited_for(dtype):
    parts = shares((3, 20_000), "float32" if dtype == "float32" else dtype)

    def work(group, rank):
        begun = [paddle.to_tensor(parts[rank] * factor).astype(dtype) for factor in (1, 2)]
        share, gathered = paddle.zeros([20_000], dtype), paddle.zeros([3 * 60_000], dtype)
        tasks = [group.all_reduce(tensor, sync_op=False) for tensor in begun]
        tasks.append(group.reduce_scatter_tensor(share, begun[0], sync_op=False))
        tasks.append(group.all_gather_into_tensor(gathered, begun[0], sync_op=False))
        untouched = values(begun[0])  # nothing is written before somebody waits
        waited = [paddle.to_tensor(parts[rank] * factor).astype(dtype) for factor in (1, 2)]
        for tensor in waited:  # comes after those that have begun
            group.all_reduce(tensor)
        for task in reversed(tasks):
            assert task.wait() and task.is_completed()
        return begun, waited, untouched, values(share), values(gathered)

    for rank, (begun, waited, untouched, share, gathered) in enumerate(on_all_ranks(work)):
        own = paddle.to_tensor(parts[rank]).astype(dtype)
        np.testing.assert_array_equal(untouched, values(own))
        for first, second in zip(begun, waited, strict=True):
            np.testing.assert_array_equal(values(first), values(second))
        np.testing.assert_array_equal(share, values(waited[0])[rank].reshape(-1))
        np.testing.assert_array_equal(gathered, np.concatenate([each.reshape(-1) for each in parts]))


def test_a_lost_rank_is_told_to_those_who_wait():
    class Broken(QueuedLinks):
        def receive(self, peer, channel, num_bytes):
            raise PeerLostError(f"rank {peer} ended")

    group = CpuProcessGroup(Broken(0, defaultdict(queue.SimpleQueue)), range(WORLD), 0)
    task = group.all_reduce(paddle.ones([2]), sync_op=False)
    task.finish()
    with pytest.raises(PeerLostError, match="rank 1 ended"):
        task.wait()
