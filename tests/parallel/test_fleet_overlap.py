"""Why stage 1 does not take Fleet's own ways of going on while it communicates."""

from __future__ import annotations

from types import SimpleNamespace

import paddle
import pytest
from paddle import nn
from paddle.distributed.communication.group import Group as PaddleGroup
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer import DygraphShardingOptimizer
from paddle.distributed.fleet.utils import tensor_fusion_helper
from paddle.distributed.fleet.utils.tensor_fusion_helper import HOOK_ACTION, FusedCommBuffer
from paddlenlp.peft.lora.lora_layers import LoRALinear


class NotedTask:
    def __init__(self, waited, tensor):
        self._waited, self._tensor = waited, tensor

    def wait(self):
        self._waited.add(id(self._tensor))


class NotingGroup:
    """The first of two ranks: notes which tensors somebody waits for."""

    def __init__(self):
        self.waited = set()

    def rank(self):
        return 0

    def broadcast(self, tensor, *_):
        return NotedTask(self.waited, tensor)

    reduce = broadcast


@pytest.fixture
def group():
    return PaddleGroup(0, 78, [0, 1], NotingGroup(), "noting")


def test_its_buckets_want_a_gradient_of_every_parameter(group, monkeypatch):
    """An expert without tokens on a rank, or a layer that a batch leaves out, ends the run."""
    monkeypatch.setattr(tensor_fusion_helper, "get_current_device_type", lambda: "gpu")
    used, unused = (paddle.create_parameter([64], "float32") for _ in range(2))
    buffer = FusedCommBuffer(0, [used, unused], group, act=HOOK_ACTION.REDUCE, dst=0, release_grads=True)
    (used * 2).sum().backward()
    buffer.add_grad(used)
    with pytest.raises(AssertionError, match="Task is not initialized"):
        buffer.scale_grads()


@pytest.mark.parametrize(("dropout", "is_waited_for"), [(0.0, True), (0.1, False)])
def test_nobody_waits_for_the_weights_of_a_layer_with_sublayers(group, dropout, is_waited_for):
    """As those of LoRA are with dropout: it computes with whatever stands there."""
    model = nn.Sequential(LoRALinear(4, 4, r=2, lora_dropout=dropout))
    trained = [model[0].lora_A, model[0].lora_B]
    known = SimpleNamespace(
        _broadcast_overlap=True,
        _broadcast_order_params=trained,
        _forward_pre_hook_function=lambda tasks: DygraphShardingOptimizer._forward_pre_hook_function(
            None, tasks
        ),
        _forward_pre_hook_remove_helper=[],
        _hcg=SimpleNamespace(get_sharding_parallel_group=lambda: group),
        _layers=model,
        _param2rank={each.name: 0 for each in trained},
        _rank2params={0: trained, 1: []},
        tensor_fusion=False,
    )
    DygraphShardingOptimizer._sharding_sync_parameters(known)
    model(paddle.ones([1, 4]))
    assert group.process_group.waited == ({id(each) for each in trained} if is_waited_for else set())
