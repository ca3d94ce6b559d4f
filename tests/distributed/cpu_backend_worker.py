"""Runs every CPU stand-in on this rank's share of known inputs and saves what came out (see test_cpu_backend)."""

import sys

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.distributed import fleet
from paddle.distributed.fleet.layers.mpu import mp_ops
from paddle.distributed.fleet.recompute import recompute
from paddle.distributed.fleet.utils import sequence_parallel_utils as sequence

from finetune.processes.groups import start_groups
from finetune.processes.layout import Layout

groups = start_groups(Layout(tensor=2), device="cpu")
rank, group = groups.rank, groups.tensor.handle
inputs = np.load(sys.argv[1])
results: dict[str, np.ndarray] = {}


def leaf(name, axis=None):
    """An input, whole or this rank's slice of it, that gradients are kept of."""
    value = inputs[name] if axis is None else np.split(inputs[name], 2, axis)[rank]
    return paddle.to_tensor(np.ascontiguousarray(value), stop_gradient=False)


def keep(name, output, *leaves, weight="weight", axis=None):
    """Saves an output, and the gradients of the leaves for loss = sum(output * weight)."""
    results[name] = output.numpy()
    value = inputs[weight] if axis is None else np.split(inputs[weight], 2, axis)[rank]
    (output * paddle.to_tensor(np.ascontiguousarray(value))).sum().backward()
    for i, tensor in enumerate(leaves):
        results[f"{name}.grad{i}"] = tensor.grad.numpy()


def run_operators():
    x = leaf("x")
    branch = mp_ops._c_identity(x, group=group)
    keep("identity", branch * float(rank + 1), x)
    x = leaf("x")
    keep("all_reduce", mp_ops._mp_allreduce(x * float(rank + 1), group=group), x)
    part = leaf("x", axis=-1)
    keep("concatenate", mp_ops._c_concat(part, group=group), part)
    x = leaf("x")
    keep("split", mp_ops._c_split(x, group=group), x, axis=-1)


def run_cross_entropy():
    labels = paddle.to_tensor(inputs["labels"])
    logits = leaf("logits", axis=-1)
    loss = fleet.meta_parallel.ParallelCrossEntropy(ignore_index=-100)(logits, labels)
    keep("cross_entropy", loss, logits, weight="loss_weight")
    _, softmax = mp_ops._c_softmax_with_cross_entropy(
        leaf("logits", axis=-1), labels.unsqueeze(-1), group=group, return_softmax=True
    )
    results["softmax"] = softmax.numpy()


def set_weights(layer, axis, bias_axis=None):
    layer.weight.set_value(leaf(layer.table, axis))
    if getattr(layer, "bias", None) is not None:
        layer.bias.set_value(leaf("bias", bias_axis))


def run_layers():
    parallel = fleet.meta_parallel
    for gather in (False, True):
        column = parallel.ColumnParallelLinear(6, 8, has_bias=True, gather_output=gather)
        column.table = "columns"
        set_weights(column, 1, 0)
        x, name = leaf("x6"), f"column_gather_{gather}"
        keep(name, column(x), x, column.weight, column.bias, axis=None if gather else -1)
    for is_parallel in (True, False):
        row = parallel.RowParallelLinear(6, 8, has_bias=True, input_is_parallel=is_parallel)
        row.table = "columns"
        set_weights(row, 0)
        x = leaf("x6", axis=-1 if is_parallel else None)
        keep(f"row_parallel_{is_parallel}", row(x), x, row.weight, row.bias)
    embedding = parallel.VocabParallelEmbedding(10, 8)
    embedding.table = "table"
    set_weights(embedding, 0)
    keep("embedding", embedding(paddle.to_tensor(inputs["ids"])), embedding.weight)


def run_sequence_parallel():
    x = leaf("x6")
    keep("scatter", sequence.ScatterOp.apply(x), x, weight="weight6", axis=0)
    part = leaf("x6", axis=0)
    keep("gather", sequence.GatherOp.apply(part), part, weight="weight6")
    part = leaf("x6", axis=0)
    keep("all_gather", sequence.AllGatherOp.apply(part) * float(rank + 1), part, weight="weight6")
    x = leaf("x6")
    keep("reduce_scatter", sequence.ReduceScatterOp.apply(x * float(rank + 1)), x, weight="weight6", axis=0)
    column = sequence.ColumnSequenceParallelLinear(6, 8, has_bias=True, gather_output=False)
    column.table = "columns"
    set_weights(column, 1, 0)
    part = leaf("x6", axis=0)
    keep("sequence_column", column(part), part, column.weight, column.bias, axis=-1)
    row = sequence.RowSequenceParallelLinear(6, 8, has_bias=True, input_is_parallel=True)
    row.table = "columns"
    set_weights(row, 0)
    part = leaf("x6", axis=-1)
    keep("sequence_row", row(part), part, row.weight, axis=0)


def run_recompute():
    """A block with dropout, recomputed in the backward pass: the mask must be the same twice."""
    column = fleet.meta_parallel.ColumnParallelLinear(6, 8, has_bias=False, gather_output=True)
    column.table = "columns"
    set_weights(column, 1)

    def block(value):
        return paddle.nn.functional.dropout(column(value), 0.5)

    for name, call in (("plain", block), ("recomputed", lambda value: recompute(block, value))):
        column.clear_gradients()
        paddle.seed(5)
        x = leaf("x6")
        keep(name, call(x), x, column.weight)


def run_stream_calls():
    process_group = group.process_group
    total = paddle.to_tensor([float(rank + 1)])
    process_group.all_reduce_on_calc_stream(total)
    results["stream_all_reduce"] = total.numpy()
    value = paddle.to_tensor([float(rank + 5)])
    process_group.broadcast_on_calc_stream(value, 1)
    results["stream_broadcast"] = value.numpy()
    received = paddle.zeros([2])
    if rank == 0:
        dist.stream.send(paddle.to_tensor([3.0, 4.0]), dst=1, group=group, use_calc_stream=True)
    else:
        dist.stream.recv(received, src=0, group=group, use_calc_stream=True)
    results["stream_receive"] = received.numpy()
    gathered = paddle.zeros([2])
    dist.stream.all_gather(gathered, paddle.to_tensor([float(rank)]), group=group, use_calc_stream=True)
    results["stream_all_gather"] = gathered.numpy()


def run_half_precision():
    """Collectives on this rank's row of the inputs; bfloat16 results are saved as their bits."""
    for dtype in ("bfloat16", "float16"):
        for size in ("small", "large"):  # one round or two
            own = paddle.to_tensor(inputs[f"half_{size}"][rank]).astype(dtype)
            for name, op in (
                ("sum", dist.ReduceOp.SUM),
                ("max", dist.ReduceOp.MAX),
                ("min", dist.ReduceOp.MIN),
            ):
                total = own.clone()
                dist.all_reduce(total, op=op, group=group)
                results[f"{dtype}_{size}_{name}"] = total.numpy()
            part = paddle.zeros([own.shape[0] // 2], dtype)
            dist.reduce_scatter(part, list(own.split(2)), group=group)
            results[f"{dtype}_{size}_scatter"] = part.numpy()
            gathered = []
            dist.all_gather(gathered, own, group=group)
            results[f"{dtype}_{size}_gather"] = paddle.stack(gathered).numpy()
            shared = own.clone()
            dist.broadcast(shared, src=1, group=group)
            results[f"{dtype}_{size}_broadcast"] = shared.numpy()
        scalar = paddle.to_tensor(float(rank + 1)).astype(dtype)
        dist.all_reduce(scalar, group=group)
        results[f"{dtype}_scalar"] = scalar.numpy()
        columns = paddle.to_tensor(inputs["half_large"][rank]).astype(dtype).reshape([2, -1])[:, 1:5]
        process_view = columns
        dist.all_reduce(process_view, group=group)
        results[f"{dtype}_view"] = process_view.contiguous().numpy()


run_operators()
run_cross_entropy()
run_layers()
run_sequence_parallel()
run_recompute()
run_stream_calls()
run_half_precision()
np.savez(f"{sys.argv[2]}.{rank}.npz", **results)
