import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from finetune.data.batches.sampler import split
from finetune.data.reading.mixing import DataSource
from finetune.data.stream.settings import StreamSettings
from finetune.data.stream.stream import SampleStream
from finetune.data.stream.worker import StreamPlan, StreamProcess, shares_of
from finetune.errors import UserError
from tests.conftest import ROOT
from tests.data.stream_builders import fail_to_build, make_coarse_builder
from tests.watched_runs import is_alive

BATCH_SIZE = 8


@pytest.fixture
def lines(tmp_path) -> Path:
    file = tmp_path / "train.jsonl"
    examples = ({"src": f"{n:>16}" * 3, "tgt": "x" * (16 + n * 37 % 300)} for n in range(60))
    file.write_text("".join(json.dumps(each) + "\n" for each in examples))
    return file


def make_plan(file: Path, *, rank=0, world=1, micro=2, builder=make_coarse_builder, **more) -> StreamPlan:
    share = split(np.arange(BATCH_SIZE), micro_batch_size=micro, rank=rank, world=world)
    return StreamPlan(
        sources=(DataSource(name="set", files=(file,)),),
        make_builder=builder,
        settings=StreamSettings(**({"seed": 3, "shuffle_buffer_size": 16} | more)),
        global_batch_size=BATCH_SIZE,
        shares=shares_of(share),
    )


@pytest.fixture
def start():
    """Starts workers and ends them after the test."""
    started = []

    def run(plan: StreamPlan, step=0, saved=None) -> StreamProcess:
        process = StreamProcess(plan)
        started.append(process)
        process.start(step, saved)
        return process

    yield run
    for process in started:
        process.close()


def flatten(micro_batches) -> list[bytes]:
    return [unit.input_ids.tobytes() + unit.labels.tobytes() for rows in micro_batches for unit in rows]


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.01)


@pytest.mark.parametrize("row_length", [None, 40])
def test_ranks_share_each_global_batch_whatever_their_number(lines, start, row_length):
    plan = make_plan(lines, row_length=row_length)
    alone = SampleStream(plan.sources, make_coarse_builder(), plan.settings)
    expected = [flatten([alone.next_units(BATCH_SIZE)]) for _ in range(12)]
    for world, micro in ((1, 2), (2, 2), (4, 1)):
        workers = [
            start(make_plan(lines, rank=rank, world=world, micro=micro, row_length=row_length))
            for rank in range(world)
        ]
        for step in range(12):
            parts = [worker.batch(step).micro_batches for worker in workers]
            assert all(len(rows) == micro for part in parts for rows in part)
            assert [row for part in parts for row in flatten(part)] == expected[step]


def test_a_state_taken_behind_any_step_continues_though_the_worker_is_ahead(lines, start):
    plan = make_plan(lines, row_length=40)
    whole = start(plan)
    batches, states = [], []
    for step in range(10):
        batches.append(flatten(whole.batch(step).micro_batches))
        time.sleep(0.02 * (step % 3))  # lets it run ahead by a different number of batches
        states.append(whole.state(step + 1))
    for done in (1, 4, 7):
        position, arrays = states[done - 1]
        other = start(plan, done, (json.loads(json.dumps(position)), arrays))
        assert [flatten(other.batch(step).micro_batches) for step in range(done, 10)] == batches[done:]
        again, its_arrays = other.state(10)
        assert again == states[9][0]
        assert all(its_arrays[name].tobytes() == array.tobytes() for name, array in states[9][1].items())


def test_the_state_before_the_last_batch_asked_for_is_still_there(lines, start):
    """The next batch is fetched before the checkpoint behind the one before it is written."""
    plan = make_plan(lines, row_length=40)
    whole = start(plan)
    batches = [flatten(whole.batch(step).micro_batches) for step in range(4)]
    position, arrays = whole.state(3)
    other = start(plan, 3, (json.loads(json.dumps(position)), arrays))
    assert flatten(other.batch(3).micro_batches) == batches[3]


def test_a_fault_comes_with_its_own_batch_and_not_before(lines, start):
    content = lines.read_text().splitlines()
    content[29] = "{"
    lines.write_text("\n".join(content) + "\n")
    worker = start(make_plan(lines, shuffle_buffer_size=1))
    for step in range(3):  # 24 of the 29 good lines
        worker.batch(step)
        time.sleep(0.1)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{lines}:30: not JSON"):
            worker.batch(3)


def test_a_fault_in_the_program_shows_where_it_was(lines, start):
    with pytest.raises(
        RuntimeError, match=r"(?s)reads the data failed:.*fail_to_build.*the tokenizer fell over"
    ):
        start(make_plan(lines, builder=fail_to_build))


def test_a_killed_worker_is_an_error_and_no_wait(lines, start):
    worker = start(make_plan(lines))
    worker.batch(0)
    assert worker.pid
    os.kill(worker.pid, signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="ended by signal SIGKILL: most likely memory ran out"):
        for step in range(1, 10):
            worker.batch(step)
    assert time.monotonic() - began < 5


def test_it_leaves_signals_for_the_group_to_its_parent_and_ends_when_closed(lines, start):
    worker = start(make_plan(lines))
    worker.batch(0)
    assert worker.pid
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    worker.batch(1)
    worker.close()
    wait_until_gone(worker.pid)


PARENT = """
import sys, time
from pathlib import Path
from finetune.data.stream.worker import StreamProcess
from tests.data.test_stream_worker import make_plan
process = StreamProcess(make_plan(Path(sys.argv[1]), shuffle_buffer_size=int(sys.argv[2])))
process.start(0)
print(process.pid, flush=True)
if sys.argv[2] == "8":
    process.batch(0)
else:
    process._pipe.send(("batch", 0))  # keeps it busy with a buffer that it can never fill
time.sleep(60)
"""


@pytest.mark.parametrize("buffer_size", [8, 10**9])
def test_it_ends_with_a_killed_parent_idle_or_busy(lines, tmp_path, buffer_size):
    if buffer_size > 8:  # as large as nobody reads within the time of this test
        with lines.open("a") as file:
            for _ in range(500):
                file.write(lines.read_text()[:20000].rpartition("\n")[0] + "\n")
    command = [sys.executable, "-c", PARENT, str(lines), str(buffer_size)]
    parent = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    assert parent.stdout
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until_gone(pid)


# Memory

FILE_MIB = 160


@pytest.fixture(scope="module")
def large_file(tmp_path_factory) -> Iterator[Path]:
    file = tmp_path_factory.mktemp("large") / "train.jsonl"
    with file.open("w") as stream:
        for number in range(FILE_MIB * 1024 // 4):
            stream.write(json.dumps({"src": f"{number}", "tgt": f"{number % 10}" * 4070}) + "\n")
    assert file.stat().st_size > FILE_MIB * 2**20
    yield file
    file.unlink()


def resident_mib(pid: int | str, name: str = "VmHWM") -> float:
    """Resident memory of a process: its peak, or what it is now ("VmRSS")."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("row_length", [None, 4000])
def test_memory_does_not_grow_with_the_file(large_file, lines, start, row_length):
    """Held as text the file would take 160 MiB more, as the samples that it gives about 100 MiB more."""
    small = start(make_plan(lines, row_length=row_length))
    small.batch(0)
    before = resident_mib("self", "VmRSS")
    worker = start(make_plan(large_file, row_length=row_length, shuffle_buffer_size=500))
    batch, step = worker.batch(0), 1
    assert small.pid and worker.pid
    while batch.epoch < 1.1:
        batch, step = worker.batch(step), step + 1
        if step % 300 == 0:
            worker.state(step)
    assert worker.state(step)[0]["sources"][0]["epoch"] >= 1, "the file was not read to its end"
    assert resident_mib(worker.pid) < resident_mib(small.pid) + 40
    assert resident_mib("self", "VmRSS") < before + 40
