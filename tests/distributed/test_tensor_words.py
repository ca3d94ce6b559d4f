"""Words of `tensor_parallel_config` change what Fleet's layers do, and no gradient."""

from __future__ import annotations

import json

import pytest

from tests.distributed.processes import launch_script

pytestmark = pytest.mark.distributed

BODY = """
import json, sys
import numpy as np
from finetune.processes.groups import start_groups
from finetune.processes.layout import Layout
groups = start_groups(Layout(tensor=2), device="cpu", tensor_words=sys.argv[1:])
import paddle
from paddle.distributed.fleet.layers.mpu import mp_layers
from paddle.distributed.fleet.utils import sequence_parallel_utils as rows

calls = []
for module, name in ((mp_layers, "InnerOverlapLinear"), (rows, "SPInnerOverlapLinear")):
    layer_class = getattr(module, name)
    def forward(ctx, *args, original=layer_class.forward, name=name):
        calls.append([name, *(value for value in args if isinstance(value, bool))])
        return original(ctx, *args)
    layer_class.forward = staticmethod(forward)

column = mp_layers.ColumnParallelLinear(4, 6, has_bias=True, gather_output=False)
row = mp_layers.RowParallelLinear(6, 4, input_is_parallel=True, has_bias=True)
scattered = rows.ColumnSequenceParallelLinear(4, 6, gather_output=False, has_bias=False)
weights = [*column.parameters(), *row.parameters(), *scattered.parameters()]

def gradients():
    # Hidden states are the same on all tensor ranks, or each rank has some of the rows.
    same = paddle.to_tensor(np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32"))
    own = paddle.to_tensor(np.random.default_rng(groups.rank).normal(size=(2, 1, 4)).astype("float32"))
    same.stop_gradient = own.stop_gradient = False
    (row(column(same)) ** 2).sum().backward()
    (scattered(own) ** 2).sum().backward()
    found = [tensor.grad.numpy() for tensor in (same, own, *weights)]
    for weight in weights:
        weight.clear_gradient(False)
    return found

told = gradients()
column.mp_skip_c_identity = False  # as without that word
whole = gradients()
column.mp_async_allreduce = row.mp_skip_c_identity = scattered.sp_async_reduce_scatter = False
num_calls, plain, reached = len(calls), gradients(), [*calls]
def find_failure(enabled):
    try:
        with paddle.amp.auto_cast(enable=enabled, dtype="bfloat16", level="O1"):
            outputs = column(paddle.ones([2, 4])).astype("float32")
        outputs.sum().backward()
    except (OSError, ValueError) as error:
        return str(error)
    return None

column.mp_async_allreduce = True
column.mp_skip_c_identity = True
mixed = find_failure(True)
column.weight.stop_gradient = True
out = {
    "fails": [bool(mixed), "should return None" in (find_failure(False) or "")],
    "calls": reached,
    "all": num_calls == len(reached),
    "same": [all(map(np.array_equal, each, plain)) for each in (told, whole)],
    "moved": all(gradient.any() for gradient in plain),
}
print("RESULT " + json.dumps(out), flush=True)
"""
COLUMN, SCATTER = "InnerOverlapLinear", "SPInnerOverlapLinear"


WORDS = ["enable_mp_async_allreduce", "enable_mp_skip_c_identity", "enable_sp_async_reduce_scatter"]


def test_words_reach_fleets_layers_and_change_no_bit():
    for output in launch_script(BODY, 2, WORDS, timeout=90).check().outputs:
        facts = json.loads(output.split("RESULT ", 1)[1].splitlines()[0])
        scatter = [SCATTER, False, False, False]
        # has a fused bias?, async, skips c_identity, adds gradients in a kernel
        assert facts.pop("calls") == [
            [COLUMN, False, True, True, False], scatter, [COLUMN, False, True, False, False], scatter
        ]  # fmt: skip
        # What refusals of settings rest on: two dtypes (level O1), and a weight that is not trained.
        assert facts.pop("fails") == [True, True]
        assert facts == {"all": True, "same": [True, True], "moved": True}
