"""Slices, buckets and the data axis of one process."""

import numpy as np
import paddle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paddle import nn

from finetune.parallel.sharding.flat_slices import (
    FilledTensor,
    GatheredTensors,
    cut,
    join,
    plan_buckets,
    slice_length,
)
from finetune.parallel.sharding.gradient_sums import GradientSums
from finetune.parallel.sharding.start import start_replicas
from finetune.processes.cpu.process_group import Finished
from finetune.processes.groups import Group, ProcessGroups

shapes = st.lists(st.integers(1, 4), min_size=0, max_size=3)


class Late:
    """A task whose result is there when it is waited for."""

    def __init__(self, output, value):
        self._output, self._value = output, value.clone()

    def wait(self):
        self._output.set_value(self._value)


class FakeGroup(Group):
    """Two ranks of which this is the second and the first holds the same with another sign and size."""

    @property
    def size(self):
        return 2

    def begin_all_reduce(self, tensor):
        self.all_reduce(tensor)
        return Finished()

    def begin_all_gather(self, output, tensor):
        return Late(output, paddle.concat([tensor * -3, tensor]))

    def all_reduce(self, tensor, op="sum"):
        paddle.assign(tensor * -2, output=tensor)

    def begin_reduce_scatter(self, output, source):
        return Late(output, paddle.split(source * -2, 2)[1])


def numbers(shape, start=1.0):
    return paddle.arange(start, start + int(np.prod(shape)), dtype="float32").reshape(shape)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, num_slices=st.integers(1, 5))
def test_cut_then_join_is_identity(shape, num_slices):
    tensor = numbers(shape)
    pieces = cut(tensor, num_slices)
    assert pieces.shape == [num_slices, slice_length(tensor.size, num_slices)]
    np.testing.assert_array_equal(join(list(pieces), shape).numpy(), tensor.numpy())
    assert float(pieces.sum()) == float(tensor.sum())  # what fills up is zero


def test_buckets_keep_dtypes_apart_and_stay_below_their_size():
    tensors = [paddle.zeros([n], dtype) for n, dtype in [(4, "float32"), (2, "float64"), (4, "float32")]]
    assert plan_buckets(tensors) == [[0, 2], [1]]
    assert plan_buckets(tensors, max_bytes=31) == [[0], [1], [2]]
    assert plan_buckets(tensors, max_bytes=1) == [[0], [1], [2]]
    assert plan_buckets([]) == []


def sum_in_one_bucket(wholes, updated, sharding, copies):
    sums = GradientSums(updated, sharding, copies)
    sums.begin(list(updated), wholes)
    for whole in wholes:  # given up when the sums begin
        whole.zero_()
    sums.finish()
    return [each.grad for each in updated.values()]


def test_sums_are_of_each_tensor():
    wholes = [numbers([2, 3]), numbers([]), numbers([5])]
    expected = [whole.numpy() * -2 for whole in wholes]
    updated = dict(zip("abc", [paddle.zeros(whole.shape) for whole in wholes], strict=True))
    for sums, value in zip(sum_in_one_bucket(wholes, updated, Group(), FakeGroup()), expected, strict=True):
        np.testing.assert_array_equal(sums.numpy(), value)


@pytest.mark.parametrize(("copies", "factor"), [(Group(), 1), (FakeGroup(), -2)])
def test_reduce_scatter_gives_this_ranks_slices(copies, factor):
    wholes = [numbers([5]), numbers([2, 2], 10.0)]
    updated = {"a": paddle.zeros([3]), "b": paddle.zeros([2])}
    parts = sum_in_one_bucket(wholes, updated, FakeGroup(), copies)
    assert [part.tolist() for part in parts] == [
        [-8 * factor, -10 * factor, 0],
        [-24 * factor, -26 * factor],
    ]


def test_gather_takes_the_slices_of_a_bucket_apart():
    slices = [numbers([3]), numbers([2], 7.0)]
    gathered = GatheredTensors(slices, [[5], [2, 2]], FakeGroup())
    assert [whole.tolist() for whole in gathered.wait()] == [[-3, -6, -9, 1, 2], [[-21, -24], [7, 8]]]


def test_a_tensor_is_filled_in_place_when_it_is_waited_for():
    parameter = paddle.create_parameter([2, 3], "float32")
    before = parameter.tolist()
    filled = FilledTensor(parameter, numbers([3]), FakeGroup())
    assert parameter.tolist() == before
    filled.wait()
    assert parameter.tolist() == [[-3, -6, -9], [1, 2, 3]]


def small_model():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model[0].bias.stop_gradient = True
    return model


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_process_needs_no_slices(stage):
    model = small_model()
    replicas = start_replicas(model, ProcessGroups(), stage, layers=[model[0]])
    assert replicas.stage == 0
    assert [id(p) for p in replicas.optimizer_parameters()] == [
        id(p) for p in model.parameters() if not p.stop_gradient
    ]
    assert list(replicas.tensor_names().values()) == ["0.weight", "1.weight", "1.bias"]
    assert replicas.is_decayed(model[0].weight.name)
    assert not replicas.is_decayed(model[1].weight.name)


def test_norms_and_scaling_in_one_process():
    model = small_model()
    replicas = start_replicas(model, ProcessGroups(), 0)
    assert replicas.squared_norm(lambda name: True).tolist() == [0.0]
    (model[0](paddle.ones([1, 3])) * paddle.to_tensor([1.0, 2.0])).sum().backward()
    replicas.after_micro_batch()
    replicas.sum_gradients()
    assert replicas.squared_norm(lambda name: True).tolist() == [15.0]
    assert replicas.squared_norm(lambda name: name != "0.weight").tolist() == [0.0]
    replicas.drop_absent(replicas.presence().tolist())
    replicas.scale_gradients(2)
    assert {name: gradient.sum().item() for name, gradient in replicas.gradients()} == {"0.weight": 18.0}
    replicas.clear_gradients()
    assert list(replicas.gradients()) == []


def test_gradients_that_no_replica_has_are_dropped_when_that_is_known():
    model = small_model()
    replicas = start_replicas(model, ProcessGroups(data=FakeGroup()), 0)
    model[0](paddle.ones([1, 3])).sum().backward()
    replicas.sum_gradients()
    assert {name: gradient.sum().item() for name, gradient in replicas.gradients()} == {
        "0.weight": -12.0,  # the fake sum is -2 times the tensor
        "1.weight": 0.0,
        "1.bias": 0.0,
    }
    assert replicas.presence().tolist() == [-2.0, 0.0, 0.0]
    replicas.drop_absent([1.0, 0.0, 1.0])
    assert [name for name, _ in replicas.gradients()] == ["0.weight", "1.bias"]
    replicas.clear_gradients()
    replicas.sum_gradients()
    assert replicas.presence().tolist() == [0.0, 0.0, 0.0]


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="sharding stage 4: 0, 1, 2 and 3 exist"):
        start_replicas(small_model(), ProcessGroups(), 4)
