"""What is under way while ranks compute: sums of gradients, updated weights, and who owns what."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer import DygraphShardingOptimizer

from finetune.parallel.sharding import flat_slices, updated_weights
from finetune.parallel.sharding.gradient_sums import GradientSums
from finetune.parallel.sharding.layer_units import divide
from finetune.parallel.sharding.owners import deal_out
from finetune.parallel.sharding.updated_weights import UpdatedWeights
from finetune.processes.groups import Group

WIDTH = 4


class Task:
    """Its result is there when it is waited for."""

    def __init__(self, events, name, output, value):
        self._events, self._name, self._output, self._value = events, name, output, value

    def wait(self):
        self._events.append(f"wait {self._name}")
        self._output.set_value(self._value)


class Pair(Group):
    """Two ranks of which this is the second; the first holds the same, with another sign."""

    def __init__(self):
        super().__init__((0, 1), 1)
        object.__setattr__(self, "events", [])
        object.__setattr__(self, "count", [])

    def begin_all_gather(self, output, tensor):
        return self._begin("gather", output, paddle.concat([-tensor, tensor]))

    def begin_reduce_scatter(self, output, source):
        return self._begin("scatter", output, paddle.split(source * 2, 2)[1])

    def _begin(self, kind, output, value):
        self.count.append(kind)
        name = f"{kind} {len(self.count)}"
        self.events.append(f"begin {name}")
        return Task(self.events, name, output, value.clone())


@pytest.mark.parametrize(("overlaps", "most"), [(True, 2), (False, 0)])
def test_sums_under_way_are_bounded_by_their_bytes(monkeypatch, overlaps, most):
    monkeypatch.setattr(flat_slices, "BUCKET_BYTES", 2 * 4 * WIDTH / 16)
    group = Pair()
    slices = {name: paddle.zeros([WIDTH // 2]) for name in "abcd"}
    sums, under_way = GradientSums(slices, group, Group(), overlaps=overlaps), []
    for number, name in enumerate("abcda"):
        sums.begin([name], [paddle.full([WIDTH], float(number + 1))])
        begun = [sum(event.startswith(word) for event in group.events) for word in ("begin", "wait")]
        under_way.append(begun[0] - begun[1])
    assert max(under_way) == most
    sums.finish()
    assert [event for event in group.events if event.startswith("wait")] == [
        f"wait scatter {number}" for number in range(1, 6)
    ]
    assert {name: piece.grad.tolist() for name, piece in slices.items()} == {
        "a": [12.0] * 2, "b": [4.0] * 2, "c": [6.0] * 2, "d": [8.0] * 2,
    }  # fmt: skip


class Copies(Pair):
    """Ranks that hold the same slices."""

    def __init__(self, events):
        super().__init__()
        object.__setattr__(self, "events", events)

    def begin_all_reduce(self, tensor):
        return self._begin("sum", tensor, tensor * 10)


@pytest.mark.parametrize("overlaps", [True, False])
def test_slices_are_summed_over_equal_replicas_once_when_those_of_the_last_micro_batch_arrive(
    monkeypatch, overlaps
):
    monkeypatch.setattr(flat_slices, "BUCKET_BYTES", 2 * 4 * WIDTH / 16)  # two buckets at most are under way
    group = Pair()
    copies = Copies(group.events)
    slices = {name: paddle.zeros([WIDTH // 2]) for name in "abcd"}
    sums = GradientSums(slices, group, copies, overlaps=overlaps)
    sums.begin_step(2)
    for _ in range(2):
        for number, name in enumerate("abcd"):
            sums.begin([name], [paddle.full([WIDTH], number + 1.0)])
        sums.end_pass()
    begun = [event for event in group.events if event.startswith("begin sum")]
    assert len(begun) == (2 if overlaps else 4)
    assert ("wait sum 1" in group.events) == (not overlaps)
    assert group.events.index("begin sum 1") > group.events.index("wait scatter 5")
    sums.finish()
    assert copies.count == ["sum"] * 4
    assert [piece.grad.tolist() for piece in slices.values()] == [[40.0 * n] * 2 for n in (1, 2, 3, 4)]


def test_what_comes_after_the_sum_over_equal_replicas_is_summed_besides():
    """A layer's last gradient may come after the rest of its bucket was sent."""
    group = Pair()
    slices = {"a": paddle.zeros([WIDTH // 2])}
    sums = GradientSums(slices, group, Copies(group.events))
    sums.begin_step(1)
    for value in (1.0, 2.0):
        sums.begin(["a"], [paddle.full([WIDTH], value)])
    sums.finish()
    assert slices["a"].grad.tolist() == [60.0] * 2


class Layered(nn.Layer):
    """Layers between tied embeddings that note the sums of their weights when they compute."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, WIDTH)
        self.layers = nn.LayerList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.seen = []

    def forward(self, ids):
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden)
            later = [float(each.weight.abs().sum()) for each in self.layers]
            self.seen.append([value == 3.0 * WIDTH * WIDTH for value in later])
        return hidden @ self.embedding.weight.T


@pytest.mark.parametrize("own_memory_bytes", [1, 1 << 20])
@pytest.mark.parametrize("overlaps", [True, False])
def test_updated_weights_arrive_layer_by_layer(monkeypatch, overlaps, own_memory_bytes):
    monkeypatch.setattr(updated_weights, "_OWN_MEMORY_BYTES", own_memory_bytes)
    model, group = Layered(), Pair()
    trained = dict(model.named_parameters())
    slices = {name: paddle.full([each.size // 2], 3.0) for name, each in trained.items()}
    weights = UpdatedWeights(model, list(model.layers), slices, group, overlaps=overlaps)
    weights.begin()
    num_begun = len(group.count)
    model(paddle.to_tensor([[1, 2]]))
    arrived = [[True] * (number + 1) + [False] * (2 - number) for number in range(3)]
    assert model.seen == (arrived if overlaps else [[True] * 3] * 3)
    assert len(group.count) == num_begun  # nobody begins anything in a hook
    for each in trained.values():
        halves = each.flatten().numpy()
        np.testing.assert_array_equal(halves, [-3.0] * (each.size // 2) + [3.0] * (each.size // 2))
    weights.finish()
    assert len([event for event in group.events if event.startswith("wait")]) == num_begun


def test_the_frame_has_what_no_layer_has_alone():
    model = Layered()
    model.layers[2].weight = model.layers[1].weight
    frame, units = divide(model, list(model.layers))
    assert sorted(frame) == ["embedding.weight", "layers.1.weight"]
    assert [sorted(unit) for unit in units] == [
        ["layers.0.bias", "layers.0.weight"], ["layers.1.bias"], ["layers.2.bias"],
    ]  # fmt: skip


def parameters(*sizes):
    return {
        f"weight {number}": paddle.create_parameter([size], "float32") for number, size in enumerate(sizes)
    }


def sizes_of(trained):
    return {name: int(each.size) for name, each in trained.items()}


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("sizes", [(5, 9, 2, 2, 7, 1), (1,), (4, 4, 4, 4), (100, 1, 1, 1)])
def test_owners_are_those_of_fleet(sizes, num_ranks):
    trained = parameters(*sizes)
    known = SimpleNamespace(_sharding_world_size=num_ranks, _parameter_list=list(trained.values()))
    theirs = DygraphShardingOptimizer._partition_parameters(known)
    owners = deal_out(sizes_of(trained), num_ranks)
    for rank, members in theirs.items():
        assert {each.name for each in members} == {
            trained[name].name for name, owner in owners.items() if owner == rank
        }


def test_what_stages_share_has_the_same_owner_on_all_of_them():
    first, last = parameters(6, 50, 3), parameters(6, 2, 1)
    shared = {
        "tied": paddle.create_parameter([20], "float32"),
        "prefix": paddle.create_parameter([20], "float32"),
    }
    owners = [deal_out(sizes_of(stage | shared), 2, shared) for stage in (first, last)]
    assert [[each["tied"], each["prefix"]] for each in owners] == [[1, 0], [1, 0]]
    assert deal_out(sizes_of(first | shared), 2)["tied"] != deal_out(sizes_of(last | shared), 2)["tied"]
