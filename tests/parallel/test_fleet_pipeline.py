"""Fleet's pipelines over stages of ours: transfers in the shapes of their micro-batches, losses and gradients kept apart."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import paddle
import pytest
from paddle.distributed.fleet.meta_parallel import PipelineParallelWithInterleave
from paddle.distributed.fleet.meta_parallel.pp_utils.p2p_communication import P2pHelper

from benchmarks.pipeline_time import Program, RecordedGroup, RecordedStage, RecordedTopology, start_engine
from finetune.parallel.pipe.fleet_pipeline import FleetInterleavedPipeline
from finetune.parallel.pipe.stage_plan import StagePlan
from finetune.parallel.pipe.transfers import Transfers


class Stage(RecordedStage):
    """Hidden states of another length for every micro-batch; notes what is computed."""

    lengths = (3, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15)

    def __init__(self, plan, program):
        super().__init__(plan, program)
        self.computed = []

    def shape(self, number):
        return (1, self.lengths[number])

    def hidden_shape(self, batch_shape):
        return [batch_shape[1]]

    @contextmanager
    def computing(self, part, received):
        self._part = part
        with super().computing(part, received):
            yield

    def forward(self, number):
        super().forward(number)
        self.computed.append(("forward", self._part, number))
        self._output = self._input * paddle.ones([self.lengths[number]])
        return self._output

    def take_output(self):
        return self._output

    def finished(self, number):
        super().finished(number)
        self.computed.append(("backward", self._part, number))


class Group(RecordedGroup):
    """Notes the lengths of hidden states and their gradients that are sent and received."""

    def __init__(self, plan, program):
        super().__init__(plan, program)
        self.shapes = []

    def send_on_calc_stream(self, tensor, to):
        super().send_on_calc_stream(tensor, to)
        self.shapes.append(("send", to, tensor.shape[0]))

    def recv_on_calc_stream(self, tensor, source):
        super().recv_on_calc_stream(tensor, source)
        self._arrive(tensor, source)

    def send(self, tensor, to, sync_op=True):
        if tensor.dtype != paddle.int64:
            self.shapes.append(("send", to, tensor.shape[0]))
        return super().send(tensor, to, sync_op)

    def recv(self, tensor, source, sync_op):
        self._arrive(tensor, source)
        return super().recv(tensor, source, sync_op)

    def _arrive(self, tensor, source):
        tensor.set_value(paddle.ones(tensor.shape))
        self.shapes.append(("receive", source, tensor.shape[0]))


@dataclass(frozen=True)
class Trained:
    """A step of one rank."""

    stage: Stage
    group: Group
    loss: paddle.Tensor

    def lengths(self, kind: str, peer: int) -> list[int]:
        return [length for found, other, length in self.group.shapes if (found, other) == (kind, peer)]


class InFourDirections(Transfers):
    """The call of Fleet's that sends and receives hidden states and gradients in one batch."""

    def send_forward_backward_recv_forward_backward(self, output, gradient, recv_prev, recv_next, **options):
        self._expect_gradient(recv_next)
        return super().send_forward_backward_recv_forward_backward(
            output, gradient, recv_prev, recv_next, **options
        )


def train(
    plan: StagePlan, num_micro_batches: int = 3, *, in_batches: bool = False, kind: type[Stage] = Stage
) -> Trained:
    stage = kind(plan, Program())
    group = Group(stage.plan, stage.program)
    engine = start_engine(stage, group)
    if in_batches:
        engine._overlap_p2p_comm, engine._use_batch_p2p_comm = False, True
        engine._p2p_helper.__class__ = InFourDirections
    return Trained(stage, group, engine.train(stage, num_micro_batches))


VIRTUAL = [
    (2, 2, 1),
    (2, 2, 4),
    (2, 3, 5),
    (3, 2, 2),
    (3, 2, 3),
    (3, 2, 8),
    (4, 2, 3),
    (4, 2, 5),
    (4, 2, 12),
    (4, 3, 7),
]
"""Ranks, chunks on each, micro-batches."""


@pytest.mark.parametrize(("num_ranks", "num_chunks", "num_micro_batches"), [(3, 1, 2), (4, 1, 9), *VIRTUAL])
def test_every_rank_computes_its_parts_once_in_each_direction(num_ranks, num_chunks, num_micro_batches):
    for rank in range(num_ranks):
        trained = train(StagePlan(rank, num_ranks, num_chunks), num_micro_batches)
        numbers = range(num_micro_batches)
        parts = range(rank, num_ranks * num_chunks, num_ranks)
        assert sorted(trained.stage.computed) == [
            (kind, part, number) for kind in ("backward", "forward") for part in parts for number in numbers
        ]
        whole = sum(Stage.lengths[:num_micro_batches])
        assert trained.loss.item() == (whole if rank == num_ranks - 1 else 0)


class SequenceStage(Stage):
    """Of a model that restores rows from a length that it is told."""

    def __init__(self, plan, program):
        super().__init__(plan, program)
        self.model = SimpleNamespace(config=SimpleNamespace(sequence_parallel=True), sublayers=list)
        self.told = []

    def forward(self, number):
        self.told.append((self.model.config.seq_length, self.lengths[number]))
        return super().forward(number)

    def finished(self, number):
        super().finished(number)
        self.told.append((self.model.config.seq_length, self.lengths[number]))


@pytest.mark.parametrize(("num_ranks", "num_chunks"), [(3, 1), (3, 2)])
def test_rows_have_the_length_of_their_micro_batch_in_backward_passes_too(num_ranks, num_chunks):
    """Recomputation restores them there, when other micro-batches have had their forward passes."""
    for rank in range(num_ranks):
        stage = train(StagePlan(rank, num_ranks, num_chunks), 5, kind=SequenceStage).stage
        assert len(stage.told) == 2 * 5 * num_chunks
        assert all(told == length for told, length in stage.told), stage.told


@pytest.mark.parametrize(("num_ranks", "num_chunks", "num_micro_batches"), VIRTUAL)
def test_what_one_rank_sends_the_other_receives_in_the_same_order(num_ranks, num_chunks, num_micro_batches):
    ranks = [train(StagePlan(rank, num_ranks, num_chunks), num_micro_batches) for rank in range(num_ranks)]
    for sender in range(num_ranks):
        for receiver in range(num_ranks):
            sent = ranks[sender].lengths("send", receiver)
            assert sent == ranks[receiver].lengths("receive", sender)
            assert bool(sent) == ((sender - receiver) % num_ranks in (1, num_ranks - 1))


def test_between_two_ranks_batches_of_messages_would_be_mixed_up():
    """So virtual stages take single ones. Of a batch the first that is sent is the first that is received: here a
    gradient of length 3 would arrive as hidden states of length 4."""
    first, last = (train(StagePlan(rank, 2, 2), 8, in_batches=True) for rank in range(2))
    sent, received = first.lengths("send", 1), last.lengths("receive", 0)
    assert sorted(sent) == sorted(received) and sent != received
    assert next(pair for pair in zip(sent, received, strict=True) if pair[0] != pair[1]) == (3, 4)


def test_fleets_own_checks_refuse_two_ranks_and_few_micro_batches():
    class Checked(FleetInterleavedPipeline):
        _check_sanity = PipelineParallelWithInterleave._check_sanity

    for num_ranks, words in ((2, "pp degree > 2"), (3, "greater than or equal to 2")):
        stage = Stage(StagePlan(0, num_ranks, 2), Program())
        group = Group(stage.plan, stage.program)
        with pytest.raises(AssertionError, match=words):
            Checked(stage, group, RecordedTopology(stage.plan, group))


@pytest.mark.parametrize(
    ("rank", "shapes"),
    [
        (0, [("send", 1, 3), ("send", 1, 5), ("receive", 1, 3), ("send", 1, 4), ("receive", 1, 5), ("receive", 1, 4)]),
        (1, [("receive", 0, 3), ("receive", 0, 5), ("send", 0, 3), ("receive", 0, 4), ("send", 0, 5), ("send", 0, 4)]),
    ],
)  # fmt: skip
def test_micro_batches_of_several_lengths(rank, shapes):
    """And only the first tensor between two ranks is announced: what a stage computes in is told once."""
    trained = train(StagePlan(rank, 2))
    assert trained.group.shapes == shapes
    begun = sum(operation.kind in ("send", "receive") for operation in trained.stage.program.operations)
    assert begun == len(shapes) + 1
    assert trained.loss.dtype == paddle.float64


def train_with_fleets_own_transfers(*, use_cache: bool) -> Group:
    stage = Stage(StagePlan(0, 2), Program())
    group = Group(stage.plan, stage.program)
    engine = start_engine(stage, group)
    helper = P2pHelper(use_cache=use_cache)
    helper._send_recv_meta.send_meta = lambda *_, **__: None  # the message about the shape
    helper.begin = lambda *_, **__: None
    engine._p2p_helper = helper
    engine.train(stage, 3)
    return group


def test_fleets_own_transfers_take_no_micro_batches_of_several_lengths():
    """The difference that stands behind `_KnownShapes`: told once, shapes may not change; told every time, the first
    gradient, of length 3, is awaited in the length of the micro-batch that was sent last."""
    with pytest.raises(AssertionError, match="actual_shape"):
        train_with_fleets_own_transfers(use_cache=True)
    assert train_with_fleets_own_transfers(use_cache=False).shapes[2] == ("receive", 1, 5)


def test_what_is_not_trained_is_handed_on_and_its_gradient_is_dropped():
    class Frozen(Stage):
        def forward(self, number):
            return super().forward(number).detach()

        def take_output(self):
            return self._output.detach()

    stage = Frozen(StagePlan(0, 2), Program())
    group = Group(stage.plan, stage.program)
    assert start_engine(stage, group).train(stage, 3).item() == 0
    assert len(group.shapes) == 6 and stage._weight.grad is None
