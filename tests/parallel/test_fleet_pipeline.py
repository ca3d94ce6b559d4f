"""Fleet's pipeline over stages of ours: transfers in the shapes of their micro-batches, losses and gradients kept apart."""

from __future__ import annotations

import paddle
import pytest
from paddle.distributed.fleet.meta_parallel.pp_utils.p2p_communication import P2pHelper

from benchmarks.pipeline_time import Program, RecordedGroup, RecordedStage, start_engine
from finetune.parallel.pipe.stage_plan import StagePlan


class Stage(RecordedStage):
    """Hidden states of another length for every micro-batch."""

    lengths = (3, 5, 4)

    def shape(self, number):
        return (1, self.lengths[number])

    def hidden_shape(self, batch_shape):
        return [batch_shape[1]]

    def forward(self, number):
        super().forward(number)
        return self._input * paddle.ones([self.lengths[number]])


class Group(RecordedGroup):
    """Notes the shapes of tensors."""

    def __init__(self, plan, program):
        super().__init__(plan, program)
        self.shapes = []

    def send_on_calc_stream(self, tensor, to):
        super().send_on_calc_stream(tensor, to)
        self.shapes.append(("send", to, tensor.shape[0]))

    def recv_on_calc_stream(self, tensor, source):
        super().recv_on_calc_stream(tensor, source)
        tensor.set_value(paddle.ones(tensor.shape))
        self.shapes.append(("receive", source, tensor.shape[0]))


class HiddenOf(Stage):
    """What leaves the layers is what the last forward pass gave."""

    def forward(self, number):
        self._output = super().forward(number)
        return self._output

    def take_output(self):
        return self._output


def train(rank: int, num_ranks: int):
    stage = HiddenOf(StagePlan(rank, num_ranks), Program())
    group = Group(stage.plan, stage.program)
    engine = start_engine(stage, group)
    return engine, engine.train(stage, 3), group.shapes


@pytest.mark.parametrize(
    ("rank", "shapes"),
    [
        (0, [("send", 1, 3), ("send", 1, 5), ("receive", 1, 3), ("send", 1, 4), ("receive", 1, 5), ("receive", 1, 4)]),
        (1, [("receive", 0, 3), ("receive", 0, 5), ("send", 0, 3), ("receive", 0, 4), ("send", 0, 5), ("send", 0, 4)]),
    ],
)  # fmt: skip
def test_micro_batches_of_several_lengths(rank, shapes):
    """And only the first tensor between two ranks is announced: what a stage computes in is told once."""
    engine, loss, found = train(rank, 2)
    assert found == shapes
    announced = sum(
        operation.kind in ("send", "receive") for operation in engine._passes.stage.program.operations
    )
    assert announced == len(shapes) + 1
    assert loss.dtype == paddle.float64
    assert loss.item() == (sum(Stage.lengths) if rank == 1 else 0)


def train_with_fleets_own_transfers(*, use_cache: bool) -> Group:
    stage = HiddenOf(StagePlan(0, 2), Program())
    group = Group(stage.plan, stage.program)
    engine = start_engine(stage, group)
    helper = P2pHelper(use_cache=use_cache)
    helper._send_recv_meta.send_meta = lambda *_, **__: None  # the message about the shape
    helper.begin = lambda shapes: None
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
    class Frozen(HiddenOf):
        def forward(self, number):
            return super().forward(number).detach()

        def take_output(self):
            return self._output.detach()

    stage = Frozen(StagePlan(0, 2), Program())
    group = Group(stage.plan, stage.program)
    assert start_engine(stage, group).train(stage, 3).item() == 0
    assert len(group.shapes) == 6 and stage._weight.grad is None
