"""Why sharding stages 2 and 3 are not Fleet's: what its classes send, and when, seen in one process."""

from __future__ import annotations

from collections import Counter

import paddle
import pytest
from paddle import nn
from paddle.distributed.communication.group import Group as PaddleGroup

from benchmarks.exposed_communication import fleet_time_of_step, time_of_step
from benchmarks.fleet_group_sharded import cpu_as_accelerator, wrap_stage_2, wrap_stage_3
from tests.parallel.test_exposed_communication import COSTS, own_fleet  # noqa: F401

WIDTH, NUM_LAYERS = 4, 3


class Finished:
    """The task of a call that is over."""

    def wait(self, *_):
        pass

    synchronize = wait


class CountingGroup:
    """The first of two ranks: counts calls and their elements, and leaves tensors alone."""

    def __init__(self):
        self.calls = Counter()

    def rank(self):
        return 0

    def all_gather(self, tensor, output):
        output[: tensor.size] = tensor
        return self._count("all_gather", output)

    def __getattr__(self, name):
        call = name.removesuffix("_on_calc_stream")
        if call not in ("reduce", "all_reduce", "broadcast"):
            raise AttributeError(name)
        return lambda tensor, *_: self._count(call, tensor)

    def _count(self, call, tensor):
        self.calls[call] += 1
        self.calls[f"{call} elements"] += tensor.size
        return Finished()


def make(wrap, *, unused=0, **options):
    """Linear layers under one of Fleet's stages; a group that counts."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias_attr=False) for _ in range(NUM_LAYERS)))
    if unused:
        model.add_parameter("unused", model.create_parameter([unused]))
    group = CountingGroup()
    handle = PaddleGroup(0, 77, [0, 1], group, "counting")
    wrapped, optimizer = wrap(
        model, paddle.optimizer.AdamW(1e-3, parameters=model.parameters()), handle, **options
    )
    return wrapped, optimizer, group.calls


def loss_of(wrapped):
    return wrapped(paddle.ones([2, WIDTH])).sum()


def test_stage_2_reduces_only_what_follows_each_forward_pass():
    with cpu_as_accelerator():
        wrapped, _, calls = make(wrap_stage_2, buffer_elements=0)
        for _ in range(2):
            loss_of(wrapped).backward()
        assert calls["reduce"] == 2 * NUM_LAYERS
        calls.clear()
        losses = [loss_of(wrapped) for _ in range(2)]  # as a pipeline has them
        for loss in losses:
            loss.backward()
        assert calls["reduce"] == NUM_LAYERS  # the gradients of one of two micro-batches are left out


def test_stage_3_stops_at_a_parameter_without_gradient():
    with cpu_as_accelerator():
        wrapped, optimizer, _ = make(wrap_stage_3, unused=8, whole_elements=0)
        loss_of(wrapped).backward()
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'shape'"):
            optimizer.step()


def test_stage_3_sums_whole_gradients_on_all_ranks():
    with cpu_as_accelerator():
        wrapped, _, calls = make(wrap_stage_3, whole_elements=0)
        loss_of(wrapped).backward()
    assert calls["all_reduce elements"] == calls["all_reduce"] * WIDTH * WIDTH == NUM_LAYERS * WIDTH * WIDTH


def test_fleets_stages_wait_longer_than_ours(own_fleet):  # noqa: F811
    stages = {2: {"waits": True}, 3: {}}
    for stage, options in stages.items():
        theirs = fleet_time_of_step(stage, 2, COSTS, **options)
        ours = time_of_step(stage, 2, COSTS)
        assert theirs.computed == pytest.approx(ours.computed)
        assert theirs.exposed > 1.25 * ours.exposed
