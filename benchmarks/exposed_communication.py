"""What a step of replicas waits for, on a virtual clock: plain replicas and sharding stages 1 to 3.

    python benchmarks/exposed_communication.py [--replicas 16] [--copies 4] [--micro-batches 4] [--bandwidth 25] [--latency-us 20]
        [--forward-ms 270] [--json]

The run's own classes train a small model, whose layers stand for larger ones, on one replica of many. In the place of
the process groups stands a recorder: a call of the engine, ours or Fleet's, that computes nothing and takes its time on
a link. Layers take theirs on the clock when Paddle runs their forward and backward passes, so that whatever begins in
a hook of a backward pass begins at its moment. A call that is waited for at once stops the clock until it is over; one
that is not runs beside what is computed until somebody waits for it. The link carries one call after the other.

A sum over n replicas takes 2 (n - 1) / n of its bytes through each one's link and 2 (n - 1) latencies (a ring), a
scattered sum and a gathering half of both, a broadcast or a reduction to one its bytes and n - 1 latencies. The defaults
are 7B parameters in bfloat16 (32 layers of 7 matrices between two embeddings), 16 replicas with 25 GB/s (200 Gbit/s)
each, and 4 micro-batches of 4096 tokens; a backward pass takes twice a forward pass, and the optimizer no time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paddle
from paddle import nn
from paddle.autograd import PyLayer
from paddle.distributed import fleet
from paddle.distributed.communication.group import Group as PaddleGroup
from paddle.distributed.fleet.utils import log_util

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fleet_group_sharded import cpu_as_accelerator, wrap_stage_2, wrap_stage_3
from finetune.parallel.parallel_model import ParallelModel
from finetune.parallel.sharding import flat_slices
from finetune.processes.groups import Group, ProcessGroups
from finetune.processes.layout import Layout

NUM_LAYERS = 32
UNIT = 256
"""Elements that stand for one attention matrix of 4096 x 4096."""
BYTES_PER_ELEMENT = 2 * 4096 * 4096 / UNIT
MATRICES = (1, 1, 1, 1, 2.6875, 2.6875, 2.6875)
"""Sizes of a layer's matrices, in attention matrices: a Llama 7B's."""
EMBEDDING = 7.8125
NUM_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Costs:
    """Seconds of what a step does.

    Attributes:
        forward: A forward pass of the model; a backward pass takes twice as long.
        latency: Of a message.
        bandwidth: Bytes a second through a replica's link.
        num_replicas: How many there are.
    """

    forward: float = 0.27
    latency: float = 20e-6
    bandwidth: float = 25e9
    num_replicas: int = 16

    def ring(self, num_bytes: float, rounds: int) -> float:
        """A collective that goes round `rounds` times with a part of the bytes for each replica."""
        steps = rounds * (self.num_replicas - 1)
        return steps * (self.latency + num_bytes / self.num_replicas / self.bandwidth)

    def through_one(self, num_bytes: float) -> float:
        """A collective from one replica, or to one."""
        return (self.num_replicas - 1) * self.latency + num_bytes / self.bandwidth


class Clock:
    """The time of the computing and of the link beside it."""

    def __init__(self) -> None:
        self.now = self.computed = self._link_is_free = 0.0

    def compute(self, seconds: float) -> None:
        """Computes."""
        self.now += seconds
        self.computed += seconds

    def begin(self, seconds: float) -> float:
        """Begins a call on the link; the time at which it is over."""
        self._link_is_free = max(self.now, self._link_is_free) + seconds
        return self._link_is_free

    def wait(self, end: float) -> None:
        """Waits for the end of a call."""
        self.now = max(self.now, end)


class RecordedGroup:
    """In the place of Paddle's process group: calls take time on the link, and leave tensors alone."""

    def __init__(self, clock: Clock, costs: Costs, position: int):
        self._clock, self._costs, self._position = clock, costs, position

    def rank(self) -> int:
        return self._position

    def all_reduce(self, tensor: Any, op: Any = None, sync_op: bool = True) -> RecordedTask:
        return self._call(self._costs.ring(_bytes(tensor), 2), sync_op)

    def reduce_scatter_tensor(
        self, output: Any, tensor: Any, op: Any = None, sync_op: bool = True
    ) -> RecordedTask:
        return self._call(self._costs.ring(_bytes(tensor), 1), sync_op)

    def all_gather(self, outputs: Any, tensor: Any, sync_op: bool | None = None) -> RecordedTask:
        if sync_op is None:  # as Fleet's stage 3 calls it: the tensor first, and nobody waits
            return self._call(self._costs.ring(_bytes(tensor), 1), False)
        for output in outputs:
            output.set_value(tensor)
        return self._call(self._costs.ring(_bytes(tensor) * self._costs.num_replicas, 1), sync_op)

    def all_gather_into_tensor(self, output: Any, tensor: Any, sync_op: bool = True) -> RecordedTask:
        return self._call(self._costs.ring(_bytes(output), 1), sync_op)

    def broadcast(self, tensor: Any, src: int, sync_op: bool = True) -> RecordedTask:
        return self._call(self._costs.through_one(_bytes(tensor)), sync_op)

    def reduce(self, tensor: Any, dst: int, op: Any = None, sync_op: bool = True) -> RecordedTask:
        return self._call(self._costs.through_one(_bytes(tensor)), sync_op)

    def __getattr__(self, name: str) -> Any:
        """The same calls in the stream that computes, which waits for them."""
        base = name.removesuffix("_on_calc_stream")
        if base == name:
            raise AttributeError(name)
        return getattr(self, base)

    def _call(self, seconds: float, sync_op: bool) -> RecordedTask:
        task = RecordedTask(self._clock, self._clock.begin(seconds))
        if sync_op:
            task.wait()
        return task


@dataclass(frozen=True)
class RecordedTask:
    """The task of a call that has begun."""

    clock: Clock
    end: float

    def wait(self, *_: Any) -> None:
        self.clock.wait(self.end)

    synchronize = wait


class RecordedTopology:
    """In the place of Fleet's topology: replicas, and one rank on every other axis."""

    def __init__(self, groups: ProcessGroups):
        self._groups = {"sharding": groups.sharding, "data": groups.replicas}

    def __getattr__(self, name: str) -> Any:
        """Sizes, places and groups of the axes."""
        if not name.startswith("get_"):
            raise AttributeError(name)
        axis, _, what = name.removeprefix("get_").partition("_parallel_")
        group = self._groups.get(axis, Group())
        answers = {"world_size": group.size, "rank": group.position, "group": group.handle}
        answers["group_src_rank"] = group.ranks[0]
        return lambda *_: answers.get(what)


class TimedPass(PyLayer):
    """Takes the time of a matrix's passes on the clock; both its gradients come at the end of that."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, weight: Any, clock: Clock, seconds: float) -> Any:
        ctx.clock, ctx.seconds, ctx.size = clock, seconds, weight.size
        ctx.is_first = hidden.stop_gradient  # nothing asks for a gradient of tokens
        clock.compute(seconds)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        ctx.clock.compute(2 * ctx.seconds)
        return None if ctx.is_first else gradient.clone(), paddle.zeros([ctx.size])


class TimedLayer(nn.Layer):
    """Matrices that one hidden state goes through, and the time that this takes."""

    def __init__(self, sizes: Sequence[float], clock: Clock, seconds: float):
        super().__init__()
        self._clock, self._seconds = clock, seconds / sum(sizes) / UNIT
        for number, size in enumerate(sizes):
            self.add_parameter(f"weight_{number}", self.create_parameter([round(size * UNIT)]))

    def forward(self, hidden: Any) -> Any:
        for weight in self.parameters(include_sublayers=False):
            hidden = TimedPass.apply(hidden, weight, self._clock, self._seconds * weight.size)
        return hidden


class TimedModel(nn.Layer):
    """Decoder layers between two embeddings, whose passes take time on the clock."""

    def __init__(self, clock: Clock, forward: float):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=1, sequence_parallel=False)
        # Work is in proportion to the weights, but looking up an embedding is none.
        seconds = forward / (NUM_LAYERS * sum(MATRICES) + EMBEDDING)
        self.embedding = TimedLayer([EMBEDDING], clock, 0.0)
        self.layers = nn.LayerList(
            [TimedLayer(MATRICES, clock, seconds * sum(MATRICES)) for _ in range(NUM_LAYERS)]
        )
        self.head = TimedLayer([EMBEDDING], clock, seconds * EMBEDDING)

    def forward(self, hidden: Any) -> Any:
        hidden = self.embedding(hidden)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


class TimedWork:
    """The computation of a step's micro-batches."""

    def __init__(self, parallel: ParallelModel):
        self._parallel = parallel

    def context(self, number: int) -> Any:
        return paddle.set_grad_enabled(True)

    def shape(self, number: int) -> tuple[int, int]:
        return (1, 1)

    def forward(self, number: int) -> Any:
        return self._parallel.model(paddle.ones([1]))

    def loss(self, number: int, outputs: Any) -> Any:
        return outputs.sum()

    def finished(self, number: int) -> None:
        self._parallel.replicas.after_micro_batch()


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        computed: Forward and backward passes.
        exposed: What the rest of the step waits for.
    """

    computed: float
    exposed: float


def time_of_step(
    stage: int,
    num_micro_batches: int,
    costs: Costs,
    *,
    overlaps: bool = True,
    words: Sequence[str] = (),
    num_copies: int = 1,
) -> StepTime:
    """A step of a run that has made some.

    Args:
        stage: Sharding stage; 0: plain replicas.
        num_micro_batches: Of the step.
        costs: Of passes and calls.
        overlaps: Whether ranks exchange while they compute, where the engine can.
        words: Of the setting `sharding_parallel_config`.
        num_copies: How many groups of replicas share out the same among their members each.
    """
    clock = Clock()
    model = TimedModel(clock, costs.forward)
    groups = _recorded_groups(stage, costs, clock, num_copies)
    parallel = ParallelModel(
        model,
        groups,
        sharding_stage=stage,
        layers=list(model.layers),
        overlaps_sums=overlaps,
        sharding_words=words,
    )
    optimizer = parallel.replicas.distribute(
        paddle.optimizer.AdamW(1e-3, parameters=parallel.replicas.optimizer_parameters())
    )
    work, marks = TimedWork(parallel), []
    for _ in range(NUM_WARM_UP_STEPS + 1):
        marks.append((clock.now, clock.computed))
        parallel.sum_gradients(parallel.train(work, num_micro_batches))
        optimizer.step()
        parallel.replicas.after_update()
        parallel.replicas.clear_gradients()
    computed = clock.computed - marks[-1][1]
    return StepTime(computed, clock.now - marks[-1][0] - computed)


def fleet_time_of_step(stage: int, num_micro_batches: int, costs: Costs, *, waits: bool = False) -> StepTime:
    """A step of Fleet's own stages 2 and 3, with whatever it can do beside the computing.

    Args:
        stage: 2 or 3.
        num_micro_batches: Of the step.
        costs: Of passes and calls.
        waits: Whether stage 2 waits for what a backward pass reduced before the next one adds to it, as it must.
    """
    clock = Clock()
    model = TimedModel(clock, costs.forward)
    group = _recorded_groups(stage, costs, clock).sharding.handle
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=model.parameters())
    marks, elements = [], BYTES_PER_ELEMENT / 2
    with cpu_as_accelerator():
        if stage == 2:
            wrapped, optimizer = wrap_stage_2(
                model, optimizer, group, buffer_elements=int(2**23 / elements), overlaps=True
            )
        else:
            wrapped, optimizer = wrap_stage_3(model, optimizer, group, whole_elements=int(2**20 / elements))
        for _ in range(NUM_WARM_UP_STEPS + 1):
            marks.append((clock.now, clock.computed))
            for _ in range(num_micro_batches):
                wrapped(paddle.ones([1])).sum().backward()
                if waits:
                    optimizer._comm_task.wait()
            optimizer.step()
            optimizer.clear_grad()
    computed = clock.computed - marks[-1][1]
    return StepTime(computed, clock.now - marks[-1][0] - computed)


def _recorded_groups(stage: int, costs: Costs, clock: Clock, num_copies: int = 1) -> ProcessGroups:
    num_replicas = costs.num_replicas
    layout = (
        Layout(data=num_copies, sharding=num_replicas // num_copies) if stage else Layout(data=num_replicas)
    )

    def make(number: int, size: int) -> Group:
        ranks, own = tuple(range(size)), replace(costs, num_replicas=size)
        handle = PaddleGroup(0, number, list(ranks), RecordedGroup(clock, own, 0), f"recorded {number}")
        return Group(ranks, 0, handle) if size > 1 else Group()

    groups = ProcessGroups(
        layout=layout,
        world=make(1, num_replicas),
        data=make(2, num_replicas),
        sharding=make(3, layout.sharding),
        replicas=make(4, layout.data),
    )
    log_util.set_log_level("ERROR")
    fleet.fleet._hcg, fleet.fleet._user_defined_strategy = (
        RecordedTopology(groups),
        fleet.DistributedStrategy(),
    )
    return groups


def _bytes(tensor: Any) -> float:
    """Bytes of what a tensor stands for; small ones, such as the numbers of a step, are themselves."""
    return float(tensor.size * (BYTES_PER_ELEMENT if tensor.dtype == paddle.float32 else 8))


def scale_buckets() -> None:
    """Has buckets hold as much of what the small weights stand for as they do in a run."""
    flat_slices.BUCKET_BYTES = int(flat_slices.BUCKET_BYTES * 4 / BYTES_PER_ELEMENT)


def main() -> None:
    """Prints a line for every stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--copies", type=int, default=4, help="data axis beside sharding")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--forward-ms", type=float, default=270.0, help="forward pass of a micro-batch")
    parser.add_argument("--latency-us", type=float, default=20.0, help="of a message")
    parser.add_argument("--bandwidth", type=float, default=25.0, help="GB/s of a replica's link")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    costs = Costs(args.forward_ms / 1e3, args.latency_us / 1e6, args.bandwidth * 1e9, args.replicas)
    scale_buckets()
    stages: dict[str, tuple[int, Sequence[str]]] = {
        "stage 1 sliced": (1, ("split_param",)),
        "stage 2": (2, ()),
        "stage 3": (3, ()),
    }
    engines = {"data": (0, (), 1)} | {name: (*each, 1) for name, each in stages.items()}
    if args.copies > 1:
        engines |= {f"{name}, data": (*each, args.copies) for name, each in stages.items()}
    times = {"stage 1": time_of_step(1, args.micro_batches, costs)}
    for name, (stage, words, copies) in engines.items():
        for word, overlaps in ((" waiting", False), ("", True)):
            step = time_of_step(
                stage, args.micro_batches, costs, overlaps=overlaps, words=words, num_copies=copies
            )
            times[name + word] = step
    times["stage 2 Fleet"] = fleet_time_of_step(2, args.micro_batches, costs, waits=True)
    times["stage 3 Fleet"] = fleet_time_of_step(3, args.micro_batches, costs)
    if args.json:
        print(json.dumps({name: [each.computed, each.exposed] for name, each in times.items()}))
        return
    print("                              computing  exposed  of the step")
    for name, each in times.items():
        share = each.exposed / (each.computed + each.exposed)
        print(f"{name:28}  {each.computed:7.3f} s  {each.exposed:5.3f} s  {share:11.1%}")


if __name__ == "__main__":
    main()
