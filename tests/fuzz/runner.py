"""Runs many cases in processes that may hang or crash, and says of every case how it ended.

Cases run in process, as starting an interpreter for each would take a hundred times as long. A child is forked for
each batch of cases and tells before every case that it begins and afterwards how it ended; when nothing comes for
`MAX_SECONDS`, or the child is gone, the case that had begun is to blame, and a new child goes on with the next batch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from finetune.processes.command import run_command

MAX_SECONDS = 60
MAX_BYTES = 3 * 2**30
"""Of address space that the cases of a batch may take beyond what the process has."""
BATCH = 100


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of input.

    Attributes:
        name: For people.
        num_cases: Of a whole run.
        prepare: Writes good inputs into a folder, once.
        draw: Draws a case, anything that can be pickled; given the folder of `prepare`.
        run: What a command does with the case: the folder of `prepare`, the case, an empty folder to work in.
        load: Imports what the cases need, before processes are forked; nothing that starts threads may run there.
    """

    name: str
    num_cases: int
    prepare: Callable[[Path], None]
    draw: Callable[[Path], SearchStrategy[Any]]
    run: Callable[[Path, Any, Path], int | None]
    load: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Attributes:
        end: "0", "1", "2", "traceback", "hang", "crash", "memory" or "weights".
        seconds: How long it took.
        said: The end of what it wrote to stderr.
        number: Of the case, counted from 0; its folder of that name is kept where the end is a fault.
    """

    end: str
    seconds: float
    said: str
    number: int

    @property
    def is_fault(self) -> bool:
        """Whether the case must not end like that."""
        return self.end not in ("0", "1", "2")


class WrongWeights(Exception):
    """A file was read, and gave other values than the format's own library, or was refused by that."""


def run_target(target: Target, num_cases: int, first_seed: int, folder: Path) -> Iterator[Outcome]:
    """Runs so many cases.

    Args:
        target: What to run.
        num_cases: How many.
        first_seed: Of the first batch; the next one has the next number.
        folder: Where good inputs and cases lie; cases that end in a fault stay there.
    """
    good = folder / "good"
    good.mkdir(parents=True)
    target.load()

    def prepare(_tell: Callable[[Any], None]) -> None:
        with contextlib.redirect_stdout(sys.stderr), _quiet_descriptors(folder):
            target.prepare(good)

    if fault := _in_child(prepare, lambda _message: None):
        raise RuntimeError(
            f"{target.name}: good inputs cannot be made ({fault[1]}), see {folder / 'output.txt'}"
        )
    done, batch_seed = 0, first_seed
    while done < num_cases:
        outcomes: list[Outcome] = []
        size = min(BATCH, num_cases - done)

        def work(
            tell: Callable[[Any], None], size: int = size, done: int = done, number: int = batch_seed
        ) -> None:
            _run_batch(target, good, folder, number, (done, size), tell)

        yield from _watch(work, outcomes, done)
        done += max(len(outcomes), 1)
        batch_seed += 1


def _watch(work: Callable[[Any], None], outcomes: list[Outcome], first: int) -> Iterator[Outcome]:
    begun = {"number": first, "time": time.monotonic()}
    waiting: list[Outcome] = []

    def take(message: Any) -> None:
        if isinstance(message, int):
            begun.update(number=message, time=time.monotonic())
        else:
            waiting.append(Outcome(*message))

    fault = _in_child(work, take)
    if fault:
        seconds = time.monotonic() - float(begun["time"])
        waiting.append(Outcome(fault[0], seconds, fault[1], int(begun["number"])))
    outcomes.extend(waiting)
    yield from waiting


def _in_child(work: Callable[[Any], None], take: Callable[[Any], None]) -> tuple[str, str] | None:
    """Runs something in a child that sends messages; None, or how it went wrong."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        code = 1
        try:
            os.setpgid(0, 0)
            faulthandler.register(signal.SIGUSR1, file=2)  # the parent asks where it hangs
            work(lambda message: os.write(writing, json.dumps(message).encode() + b"\n"))
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
            sys.__stderr__.flush()
        finally:
            os._exit(code)
    os.close(writing)
    hangs = False
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        rest = b""
        while True:
            if not select.select([pipe], [], [], MAX_SECONDS)[0]:
                hangs = True
                break
            if not (content := pipe.read(65536)):
                break
            *lines, rest = (rest + content).split(b"\n")
            for line in lines:
                take(json.loads(line))
    if hangs:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
            time.sleep(1)  # until it has written its stack into the output of the case
            os.killpg(pid, signal.SIGKILL)  # what the cases started goes with it
    _, status = os.waitpid(pid, 0)
    if hangs:
        return "hang", f"nothing for {MAX_SECONDS} s"
    return None if not status else ("crash", f"the process ended with status {status}")


def _run_batch(
    target: Target,
    good: Path,
    folder: Path,
    batch_seed: int,
    numbers: tuple[int, int],
    tell: Callable[[Any], None],
) -> None:
    first, size = numbers
    count = 0
    limit = _address_space() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    @seed(batch_seed)
    @settings(max_examples=size, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(target.draw(good))
    def check(case: Any) -> None:
        nonlocal count
        if count == size:
            return
        number, count = first + count, count + 1
        tell(number)
        tell(_run_case(target, good, folder, number, case))

    check()


def _run_case(
    target: Target, good: Path, folder: Path, number: int, case: Any
) -> tuple[str, float, str, int]:
    place = folder / str(number)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    os.chdir(place)
    began, stderr = time.monotonic(), io.StringIO()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(stderr),
        _quiet_descriptors(place),
    ):
        try:
            end = str(run_command(lambda: target.run(good, case, place)))
        except SystemExit as error:  # argparse, and --help
            end = str(error.code or 0)
        except WrongWeights as error:
            end = "weights"
            print(error, file=stderr)
    said = stderr.getvalue()
    seconds = time.monotonic() - began
    if "Traceback (most recent call last)" in said:
        end = "weights" if "WrongWeights" in said else "traceback"
    elif "not enough memory" in said:
        end = "memory"
    elif seconds > MAX_SECONDS:
        end = "hang"
    os.chdir(folder)
    if end in ("0", "1", "2"):
        shutil.rmtree(place, ignore_errors=True)
    else:
        (place / "stderr.txt").write_text(said, encoding="utf-8", errors="backslashreplace")
        (place / "case.txt").write_text(repr(case)[:100_000], encoding="utf-8", errors="backslashreplace")
    return end, round(seconds, 3), said[-1500:].encode("utf-8", "backslashreplace").decode(), number


@contextlib.contextmanager
def _quiet_descriptors(place: Path) -> Iterator[None]:
    """What libraries in C write goes to a file of the case."""
    kept = os.dup(1), os.dup(2)
    with open(place / "output.txt", "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
