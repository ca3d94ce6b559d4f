"""Trains a toy model on two replicas, with sums that begin early and with sums that do not.

Arguments: a folder for the results.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import paddle

from finetune.parallel.sharding.gradient_buckets import GradientBuckets
from finetune.parallel.sharding.gradient_sums import GradientSums
from finetune.parallel.sharding.local_gradients import ParameterGradients
from finetune.parallel.sharding.start import start_replicas
from finetune.processes.groups import Group, start_groups
from finetune.processes.layout import Layout
from tests.distributed.replicas_worker import batches, loss_of, make_model

NUM_STEPS = 4


def train(groups, case, *, overlaps):
    """Weights after some steps, and how many sums of the last step began early."""
    model = make_model(case)
    model.unused.stop_gradient = True  # or the bucket would wait for it
    replicas = start_replicas(model, groups, 0, overlaps=overlaps)
    optimizer = paddle.optimizer.AdamW(0.05, parameters=replicas.optimizer_parameters())
    for step in range(NUM_STEPS):
        mine = batches(step)[groups.data.position :: groups.data.size]
        replicas.begin_step(len(mine))
        for ids in mine:
            loss_of(model, ids).backward()
            replicas.after_micro_batch()
        replicas.sum_gradients()
        replicas.drop_absent(replicas.presence().tolist())
        optimizer.step()
        replicas.clear_gradients()
    return {name: each.numpy() for name, each in model.named_parameters()}, replicas.buckets.num_early


def is_summed_before_anybody_waits(group) -> bool:
    """Whether a sum that began in a backward pass is there though this process does something else."""
    weight = paddle.create_parameter([3], "float32")
    sums = GradientSums({"weight": weight}, Group(), group)
    buckets = GradientBuckets({"weight": weight}, ParameterGradients(), sums)
    for _ in range(2):
        weight.clear_gradient(False)
        buckets.begin_step(1)
        (weight * 2).sum().backward()
        task = sums._summed[0].task if sums._summed else None
        deadline = time.monotonic() + 30
        while task is not None and not task.is_completed() and time.monotonic() < deadline:
            time.sleep(0.01)
        is_there = task is not None and task.is_completed()
        buckets.finish()
    return is_there and weight.grad.tolist() == [4.0] * 3


def main():
    folder = Path(sys.argv[1])
    groups = start_groups(Layout(data=2), device="cpu")
    results = {}
    for name, case in (("plain", {}), ("reentrant", {"reentrant": True}), ("adapter", {"adapter": "lora"})):
        early, num_early = train(groups, case, overlaps=True)
        waited, num_waited = train(groups, case, overlaps=False)
        results[name] = {
            "num_early": [num_early, num_waited],
            "differing": [key for key in early if not np.array_equal(early[key], waited[key])],
        }
    results["beside"] = is_summed_before_anybody_waits(groups.data)
    (folder / f"results.{groups.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
