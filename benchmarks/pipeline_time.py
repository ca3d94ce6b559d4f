"""Time of a pipelined step over that of an ideal one, on a virtual clock.

    python benchmarks/pipeline_time.py [--ranks 2,4,8] [--micro-batches 8,16,32] [--virtual 1,2] [--forward-ms 100]
        [--latency-us 20] [--bandwidth 25] [--hidden-mb 33.6]

The engine's own code runs for every rank, once, with stand-ins that write down what it does: compute a part, start a
transfer, wait for one. A virtual clock then plays the ranks' lists against each other. Computing takes its time (a
backward pass twice a forward pass, a part of a virtual stage its share); two ranks have one link between them, on which
transfers follow each other in the order in which both ends asked for them and begin when both have, as NCCL's do. What
a call is waited for at once, holds up its rank meanwhile.

Ideal is 1F1B without any link: (m + (p - 1) / v) (forward + backward) for p ranks, m micro-batches and v virtual stages
(Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", 2021). The defaults
are a quarter of a 7B model and 4096 tokens in bfloat16 on each card, 200 Gbit/s between cards.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paddle
from paddle.distributed import ParallelEnv
from paddle.distributed.fleet.meta_parallel.pp_utils.utils import paddle_2_number
from paddle.distributed.fleet.utils import log_util

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.machine.stand_ins import replace
from finetune.parallel.pipe.fleet_pipeline import FleetInterleavedPipeline, FleetPipeline
from finetune.parallel.pipe.stage_plan import StagePlan


@dataclass(frozen=True)
class Operation:
    """What a rank does.

    Attributes:
        kind: "forward", "backward", "send", "receive" (both only begin a transfer) or "wait".
        peer: Of a transfer, the other rank.
        number: Of a transfer, its place among the rank's transfers with that peer; of a wait, that of the transfer.
    """

    kind: str
    peer: int = -1
    number: int = -1


@dataclass
class Program:
    """What a rank does in a step, written down by the stand-ins that the engine calls."""

    operations: list[Operation] = field(default_factory=list)
    _num_transfers: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def compute(self, kind: str) -> None:
        """A forward or backward pass of a part."""
        self.operations.append(Operation(kind))

    def begin(self, kind: str, peer: int) -> Operation:
        """Begins a transfer; the value is handed to `wait`."""
        transfer = Operation(kind, peer, self._num_transfers[peer])
        self._num_transfers[peer] += 1
        self.operations.append(transfer)
        return transfer

    def wait(self, transfer: Operation) -> None:
        """Waits for the end of a transfer."""
        self.operations.append(Operation("wait", transfer.peer, transfer.number))

    def clear(self) -> None:
        """Forgets everything."""
        self.operations.clear()
        self._num_transfers.clear()


@dataclass(frozen=True)
class Costs:
    """Seconds of what the programs do.

    Attributes:
        forward: A forward pass of one part.
        backward: A backward pass of one part.
        transfer: Hidden states or their gradient from one rank to another.
    """

    forward: float
    backward: float
    transfer: float


class RecordedStage:
    """In the place of a stage and of the trainer's computation: a number that is handed on from part to part."""

    def __init__(self, plan: StagePlan, program: Program):
        self.plan, self.program = plan, program
        self.model = SimpleNamespace(config=SimpleNamespace())
        self._weight = paddle.ones([1])
        self._weight.stop_gradient = False
        self._input: Any = None

    @contextmanager
    def computing(self, part: int, received: Any) -> Iterator[None]:
        self._input = self._weight if received is None else received * self._weight
        yield

    @contextmanager
    def context(self, number: int) -> Iterator[None]:
        yield

    def hidden_shape(self, batch_shape: tuple[int, ...]) -> list[int]:
        return [1]

    def shape(self, number: int) -> tuple[int, int]:
        return (1, 1)

    def forward(self, number: int) -> Any:
        self.program.compute("forward")
        return self._input

    def take_output(self) -> Any:
        return self._input * 1.0

    def loss(self, number: int, outputs: Any) -> Any:
        return outputs.sum()

    def finished(self, number: int) -> None:
        self.program.compute("backward")


class RecordedGroup:
    """In the place of a group's calls, ours and Paddle's: begins and waits are written down, nothing is sent."""

    def __init__(self, plan: StagePlan, program: Program):
        self.size, self.rank, self.program = plan.num_ranks, plan.rank, program
        self.process_group, self.backend = self, "recorded"
        self._batch: list[Operation] = []

    def send(self, tensor: Any, to: int, sync_op: bool = True) -> RecordedTransfer:
        return self._begin("send", to, sync_op)

    def receive(self, tensor: Any, source: int) -> None:
        """What is told of hidden states: their dtype."""
        tensor.fill_(paddle_2_number(paddle.float32))
        self._begin("receive", source, True)

    def recv(self, tensor: Any, source: int, sync_op: bool) -> RecordedTransfer:
        return self._begin("receive", source, sync_op)

    def _begin(self, kind: str, peer: int, sync_op: bool) -> RecordedTransfer:
        transfer = RecordedTransfer(self.program, self.program.begin(kind, peer))
        if sync_op:
            transfer.wait()
        return transfer

    # What follows is called by Fleet.

    def is_member(self) -> bool:
        return True

    def get_group_rank(self, rank: int) -> int:
        return rank

    def send_on_calc_stream(self, tensor: Any, to: int) -> None:
        self._batch.append(self.program.begin("send", to))

    def recv_on_calc_stream(self, tensor: Any, source: int) -> None:
        self._batch.append(self.program.begin("receive", source))

    def _start_coalescing(self) -> None:
        self._batch = []

    def _end_coalescing(self) -> None:
        """Calls on the stream that computes: what is computed next waits for them."""
        for transfer in self._batch:
            self.program.wait(transfer)


@dataclass(frozen=True)
class RecordedTransfer:
    """The task of a transfer that has begun."""

    program: Program
    transfer: Operation

    def wait(self) -> None:
        self.program.wait(self.transfer)


class RecordedTopology:
    """In the place of Fleet's topology and groups: a pipeline, and one rank on every other axis."""

    def __init__(self, plan: StagePlan, group: RecordedGroup):
        self.stage_id, self._pp_degree, self._group = plan.rank, plan.num_ranks, group
        self._parent_hcg = self

    def topology(self) -> RecordedTopology:
        return self

    def get_dim(self, axis: str) -> int:
        return 1

    def get_stage_id(self) -> int:
        return self.stage_id

    get_global_rank = get_stage_id

    def get_pipe_parallel_world_size(self) -> int:
        return self._pp_degree

    def get_pipe_parallel_group(self) -> RecordedGroup:
        return self._group

    def _get_p2p_next_rank(self) -> int:
        return (self.stage_id + 1) % self._pp_degree

    def _get_p2p_prev_rank(self) -> int:
        return (self.stage_id - 1) % self._pp_degree

    def __getattr__(self, name: str) -> Any:
        """Sizes, places and groups of all other axes."""
        if not name.startswith("get_"):
            raise AttributeError(name)
        return lambda: 1 if name.endswith("_world_size") else 0 if name.endswith("_rank") else None


class DeadlockError(Exception):
    """The ranks wait for each other."""


def play(programs: Sequence[Program], costs: Costs) -> float:
    """The time at which the last rank has done all that its program says.

    Raises:
        DeadlockError: Ranks wait for each other, or the ends of a link do not agree what comes next.
    """
    duration = {"forward": costs.forward, "backward": costs.backward}
    clocks, places = [0.0] * len(programs), [0] * len(programs)
    asked: dict[tuple[int, int], list[tuple[float, str]]] = defaultdict(list)  # by (rank, peer)
    ended: dict[tuple[int, int], list[float]] = defaultdict(list)  # by link, lower rank first

    def end_of(rank: int, peer: int, number: int) -> float | None:
        link = (min(rank, peer), max(rank, peer))
        mine, others, ends = asked[rank, peer], asked[peer, rank], ended[link]
        while len(ends) < min(len(mine), len(others)):
            (my_time, my_kind), (other_time, other_kind) = mine[len(ends)], others[len(ends)]
            if my_kind == other_kind:
                raise DeadlockError(f"ranks {rank} and {peer} both {my_kind}, as transfer {len(ends)}")
            ends.append(max(my_time, other_time, ends[-1] if ends else 0.0) + costs.transfer)
        return ends[number] if number < len(ends) else None

    is_moving = True
    while is_moving:
        is_moving = False
        for rank, program in enumerate(programs):
            while places[rank] < len(program.operations):
                step = program.operations[places[rank]]
                if step.kind in duration:
                    clocks[rank] += duration[step.kind]
                elif step.kind == "wait":
                    end = end_of(rank, step.peer, step.number)
                    if end is None:
                        break
                    clocks[rank] = max(clocks[rank], end)
                else:
                    asked[rank, step.peer].append((clocks[rank], step.kind))
                places[rank] += 1
                is_moving = True
    if any(place < len(program.operations) for place, program in zip(places, programs, strict=True)):
        raise DeadlockError(f"the ranks wait for each other after {places} operations")
    return max(clocks)


def record(
    num_ranks: int, num_chunks: int, num_micro_batches: int, *, is_first: bool = False
) -> list[Program]:
    """What the engine does on every rank in a training step; in the first one dtypes are told besides."""
    programs = []
    for rank in range(num_ranks):
        stage = RecordedStage(StagePlan(rank, num_ranks, num_chunks), Program())
        engine = start_engine(stage, RecordedGroup(stage.plan, stage.program))
        if not is_first:
            engine.train(stage, num_micro_batches)
            stage.program.clear()
        engine.train(stage, num_micro_batches)
        programs.append(stage.program)
    return programs


def start_engine(stage: RecordedStage, group: RecordedGroup) -> Any:
    """The engine that a run would take."""
    log_util.set_log_level("ERROR")
    if not hasattr(ParallelEnv, "_device_id"):  # Fleet reads it on any device
        replace(ParallelEnv, "_device_id", 0)
    engine = FleetInterleavedPipeline if stage.plan.num_chunks > 1 else FleetPipeline
    return engine(stage, group, RecordedTopology(stage.plan, group))


def count_alive(program: Program) -> int:
    """Passes whose activations a rank holds at the most: of parts, forward and not yet backward."""
    alive = most = 0
    for step in program.operations:
        alive += (step.kind == "forward") - (step.kind == "backward")
        most = max(most, alive)
    return most


def time_over_ideal(num_ranks: int, num_chunks: int, num_micro_batches: int, costs: Costs) -> float:
    """A step's time over that of ideal 1F1B.

    Args:
        num_ranks: Pipeline-parallel degree.
        num_chunks: Virtual stages.
        num_micro_batches: Of the step.
        costs: Of a whole stage; a part of a virtual stage takes its share.
    """
    part = Costs(costs.forward / num_chunks, costs.backward / num_chunks, costs.transfer)
    ideal = (num_micro_batches + (num_ranks - 1) / num_chunks) * (costs.forward + costs.backward)
    return play(record(num_ranks, num_chunks, num_micro_batches), part) / ideal


def main() -> None:
    """Prints a line for every shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", default="2,4,8")
    parser.add_argument("--micro-batches", default="8,16,32")
    parser.add_argument("--virtual", default="1,2", help="virtual stages")
    parser.add_argument("--forward-ms", type=float, default=100.0, help="forward pass of a stage")
    parser.add_argument("--latency-us", type=float, default=20.0, help="of a transfer")
    parser.add_argument("--bandwidth", type=float, default=25.0, help="GB/s between two ranks")
    parser.add_argument("--hidden-mb", type=float, default=33.6, help="hidden states of a micro-batch")
    args = parser.parse_args()
    forward = args.forward_ms / 1e3
    transfer = args.latency_us / 1e6 + args.hidden_mb / 1e3 / args.bandwidth
    costs = Costs(forward, 2 * forward, transfer)
    print(f"forward {forward * 1e3:.1f} ms, backward twice that, a transfer {transfer * 1e3:.2f} ms")
    print("ranks  virtual  micro-batches  time over ideal")
    for num_chunks, num_ranks, num_micro_batches in (
        (int(virtual), int(ranks), int(batches))
        for virtual in args.virtual.split(",")
        for ranks in args.ranks.split(",")
        for batches in args.micro_batches.split(",")
    ):
        ratio = time_over_ideal(num_ranks, num_chunks, num_micro_batches, costs)
        print(f"{num_ranks:5}  {num_chunks:7}  {num_micro_batches:13}  {ratio:15.3f}")


if __name__ == "__main__":
    main()
