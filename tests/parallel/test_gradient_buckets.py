"""Sums of plain replicas: which begin while a backward pass computes, and that they are plain sums."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.base import core
from paddle.distributed.fleet.recompute import recompute

from finetune.errors import RunError
from finetune.parallel.sharding.gradient_buckets import ArrivalCounts, GradientBuckets
from finetune.parallel.sharding.gradient_sums import GradientSums
from finetune.parallel.sharding.local_gradients import MasterGradients, ParameterGradients
from finetune.processes.groups import Group

WIDTH, VOCAB = 4, 6


class Tripled(Group):
    """Three ranks with equal gradients; a sum is there when it is waited for."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "events", [])

    @property
    def size(self):
        return 3

    def begin_all_reduce(self, tensor):
        self.events.append(f"begin {tensor.size}")
        return _Sum(tensor, tensor.numpy() * 3)


class _Sum:
    def __init__(self, tensor, value):
        self._tensor, self._value = tensor, value

    def wait(self):
        self._tensor.set_value(self._value)


class Tied(nn.Layer):
    """Layers between tied embeddings; `spare` has gradients in some micro-batches only."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.LayerList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.spare = self.create_parameter([WIDTH])
        self.frozen = self.create_parameter([WIDTH])
        self.frozen.stop_gradient = True
        self.reentrant = reentrant

    def forward(self, ids, *, uses_spare=False):
        hidden = self.embedding(ids) * self.frozen
        for layer in self.layers:
            if self.reentrant is None:
                hidden = layer(hidden)
            else:
                hidden = recompute(layer, hidden, use_reentrant=self.reentrant)
        return (hidden + self.spare if uses_spare else hidden) @ self.embedding.weight.T


def make(reentrant=None, *, masters=False, overlaps=True):
    """A model, its buckets of one parameter or two each, and their group."""
    paddle.seed(2)
    model, group = Tied(reentrant), Tripled()
    trained = {name: each for name, each in model.named_parameters() if not each.stop_gradient}
    local = MasterGradients(trained.values()) if masters else ParameterGradients()
    sums = GradientSums(trained, Group(), group, overlaps=overlaps)
    buckets = GradientBuckets(trained, local, sums, overlaps=overlaps, max_bytes=4 * (WIDTH * WIDTH + WIDTH))
    return model, buckets, group


def train(model, buckets, group, num_micro_batches, *, spare_in=(), step=0):
    """A step; the sums by name, and which parameters had a gradient."""
    buckets.begin_step(num_micro_batches)
    source = np.random.default_rng(step)
    for number in range(num_micro_batches):
        ids = paddle.to_tensor(source.integers(0, VOCAB, (2, 3)))
        loss = (model(ids, uses_spare=number in spare_in) ** 2).mean()
        group.events.append(f"backward {number}")
        loss.backward()
    group.events.append("passes done")
    present = buckets.finish()
    sums = {name: each.grad.numpy() for name, each in model.named_parameters() if each.grad is not None}
    for each in model.parameters():
        each.clear_gradient(False)
    return sums, present


def plain(reentrant, num_micro_batches, *, spare_in=(), step=0):
    """Gradients of the same step without buckets."""
    paddle.seed(2)
    model = Tied(reentrant)
    source = np.random.default_rng(step)
    for number in range(num_micro_batches):
        ids = paddle.to_tensor(source.integers(0, VOCAB, (2, 3)))
        (model(ids, uses_spare=number in spare_in) ** 2).mean().backward()
    return {name: each.grad.numpy() for name, each in model.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_sums_are_plain_and_begin_in_the_last_backward_pass(reentrant, masters):
    model, buckets, group = make(reentrant, masters=masters)
    for step, num_micro_batches in enumerate((2, 1, 3)):
        group.events.clear()
        sums, present = train(model, buckets, group, num_micro_batches, spare_in=range(9), step=step)
        expected = plain(reentrant, num_micro_batches, spare_in=range(9), step=step)
        assert present == set(expected) == set(sums)
        for name, value in expected.items():  # no mean: a loss is divided by the label tokens beforehand
            np.testing.assert_allclose(sums[name], value * 3, rtol=2e-6, err_msg=name)
        begun = [place for place, event in enumerate(group.events) if event.startswith("begin")]
        last_backward = group.events.index(f"backward {num_micro_batches - 1}")
        assert len(begun) == 5
        assert all(place > last_backward for place in begun)
        done = group.events.index("passes done")
        # Nothing is known in the first step; the embedding's own gradient is the last thing of a backward pass.
        assert [place < done for place in begun] == ([False] * 5 if step == 0 else [True] * 5)
        assert buckets.num_early == (0 if step == 0 else 5)


def test_overlap_and_waiting_give_the_same_bits():
    results = []
    for overlaps in (True, False):
        model, buckets, group = make(overlaps=overlaps)
        sums = [train(model, buckets, group, 2, spare_in=(0, 1), step=step)[0] for step in range(3)]
        results.append(sums)
        assert buckets.num_early == (5 if overlaps else 0)
    for early, waited in zip(*results, strict=True):
        assert early.keys() == waited.keys()
        for name, value in early.items():
            np.testing.assert_array_equal(value, waited[name])


@pytest.mark.parametrize("spare_in", [(), (0,), (1,)])
def test_what_has_no_gradient_in_some_micro_batch_is_waited_for(spare_in):
    model, buckets, group = make()
    for step in range(4):
        sums, present = train(model, buckets, group, 2, spare_in=spare_in, step=step)
        for name, value in plain(None, 2, spare_in=spare_in, step=step).items():
            np.testing.assert_allclose(sums[name], value * 3, rtol=2e-6)
        assert ("spare" in present) == bool(spare_in)
        if not spare_in:
            assert sums["spare"].tolist() == [0.0] * WIDTH  # another replica may have one
        assert buckets.num_early == (4 if step else 0)  # its bucket is the last


def test_backward_passes_of_a_pipeline_come_in_another_order_than_forward_passes():
    """Two micro-batches are under way at a time, and the last backward pass is the one that counts."""
    model, buckets, group = make()
    for step in range(3):
        group.events.clear()
        buckets.begin_step(3)
        source = np.random.default_rng(step)
        ids = [paddle.to_tensor(source.integers(0, VOCAB, (2, 3))) for _ in range(3)]
        under_way = [(model(each, uses_spare=True) ** 2).mean() for each in ids[:2]]
        for number in range(3):
            group.events.append(f"backward {number}")
            under_way[number].backward()
            if number == 0:
                under_way.append((model(ids[2], uses_spare=True) ** 2).mean())
        buckets.finish()
        for name, value in plain(None, 3, spare_in=range(3), step=step).items():
            np.testing.assert_allclose(
                dict(model.named_parameters())[name].grad.numpy(), value * 3, rtol=5e-6
            )
        last = group.events.index("backward 2")
        assert all(place > last for place, event in enumerate(group.events) if event.startswith("begin"))
        assert buckets.num_early == (5 if step else 0)
        for each in model.parameters():
            each.clear_gradient(False)


def test_a_rank_without_micro_batches_sums_zeros():
    model, buckets, group = make()
    for step in range(2):
        train(model, buckets, group, 2, spare_in=(0, 1), step=step)
    sums, present = train(model, buckets, group, 0)
    assert present == set() and all(not value.any() for value in sums.values()) and len(sums) == 8
    sums, _ = train(model, buckets, group, 2, spare_in=(0, 1), step=3)
    np.testing.assert_allclose(sums["spare"], plain(None, 2, spare_in=(0, 1), step=3)["spare"] * 3, rtol=2e-6)
    assert buckets.num_early == 5


def test_a_gradient_after_its_sum_is_never_lost_silently():
    model, buckets, _ = make()
    for _ in range(2):
        buckets.begin_step(1)
        model(paddle.to_tensor([[1, 2]]), uses_spare=True).sum().backward()
        if buckets._num_begun:
            model.spare.sum().backward()
            with pytest.raises(
                RunError, match=r"spare got a gradient after .*gradient_sync_after_accumulate"
            ):
                buckets.finish()
            return
        buckets.finish()
    pytest.fail("no sum began early")


def test_counts_are_learned_from_the_step_before():
    counts = ArrivalCounts(["once", "twice", "odd"])
    counts.begin_step(2)
    assert not any(counts.note(name) for name in ("once", "once", "twice", "twice", "twice", "twice", "odd"))
    counts.begin_step(3)
    assert [counts.note("once") for _ in range(3)] == [False, False, True]
    assert [counts.note("twice") for _ in range(6)] == [False] * 5 + [True]
    assert not any(counts.note("odd") for _ in range(6))


def test_paddles_reducer_takes_no_group_of_ours():
    """Why the buckets are ours: `paddle.DataParallel` sums over groups written in C++ only."""

    class OurGroup(core.ProcessGroup):
        pass

    with pytest.raises(TypeError, match="No constructor defined"):
        OurGroup()
    parameters = list(nn.Linear(2, 2).parameters())
    with pytest.raises(TypeError, match="incompatible constructor arguments"):
        core.EagerReducer(parameters, [[0, 1]], [False, False], object(), [1, 1], False)
