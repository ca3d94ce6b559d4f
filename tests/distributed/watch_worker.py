"""Ranks that only add numbers up, until something happens to one of them (see test_watch and test_two_hosts)."""

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from tempfile import TemporaryFile

from finetune.processes.phases import PhaseRecord
from finetune.processes.watch.watch import close_watch, report_failure, start_watch

what, data, tensor = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rank = int(os.environ["PADDLE_TRAINER_ID"])
phases = PhaseRecord()
start_watch(phases)

import paddle  # noqa: E402

from finetune.parallel.replica_hashes import ReplicasDiverged, check_replicas  # noqa: E402
from finetune.processes.groups import start_groups  # noqa: E402
from finetune.processes.joint_steps import fail_on_all_ranks  # noqa: E402
from finetune.processes.layout import Layout  # noqa: E402

paddle.disable_signal_handler()
phases.enter("connecting groups")
if what == "connect" and rank == int(os.environ["PADDLE_TRAINERS_NUM"]) - 1:
    print("connect", flush=True)
    time.sleep(300)  # the others wait for it in Paddle's store
groups = start_groups(Layout(data=data, tensor=tensor), device="cpu")
stop_signal: list[int] = []
signal.signal(signal.SIGTERM, lambda number, _: stop_signal.append(number))


def add_up() -> None:
    """Endless steps; the last rank is killed in one of them, or all stop at the same one."""
    for step in range(1, 100_000):
        phases.enter("reduction", step)
        if what == "die" and rank == groups.layout.world - 1 and step == 5:
            print("the last words", flush=True)
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stop" and rank == 1 and step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        groups.world.all_reduce(paddle.ones([1000]))
        if groups.world.all_reduce_numbers([float(bool(stop_signal))])[0]:
            print("stopped after step", step, flush=True)
            return
        if what in ("run", "reduce"):
            print("step", step, flush=True)
            time.sleep(0.2)


def save() -> None:
    """Endless saves: threads write what comes out of collectives, and all ranks agree on how it went."""
    numbers = paddle.ones([100_000])
    for step in range(1, 100_000):
        phases.enter("save", step)
        with fail_on_all_ranks(groups), ThreadPoolExecutor(2) as pool, TemporaryFile() as file:
            for _ in range(20):
                parts = groups.world.all_gather(numbers)
                pool.map(lambda part: file.write(part.numpy().tobytes()), parts)
        if step == 3:
            print("save", flush=True)


def compare() -> None:
    """Weights that agree, and weights of which one rank's stand out, over each kind of group."""
    tensors = {"norm": paddle.ones([3]), "matrix": paddle.full([4, 4], groups.tensor.position)}
    check_replicas(tensors, groups, "at the start", same_over_tensor={"norm"})
    spoiled = tensors | ({"matrix": paddle.zeros([4, 4]) - 1} if rank == 3 else {})
    alone = replace(groups, replicas=groups.world.__class__((rank,)))
    check_replicas(spoiled, alone, "in slices", same_over_tensor={"norm"}, is_sliced_over_sharding=True)
    for names in ({"norm"}, {"norm", "matrix"}):
        try:
            check_replicas(spoiled, groups, "after step 12", same_over_tensor=names)
        except ReplicasDiverged as error:
            print(error, flush=True)


try:
    {"compare": compare, "save": save}.get(what, add_up)()
except Exception as error:
    report_failure(f"{type(error).__name__}: {error}")
    raise
close_watch()
