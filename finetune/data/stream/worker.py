"""A stream in a process of its own, so that reading and tokenising do not hold up the training.

The training process asks for the batch of a step and, when it writes a checkpoint, for the state of the
stream after a step; the worker answers. The batch of the next step may have been asked for by then, no more. Between questions it makes up to `NUM_AHEAD` batches in advance,
and remembers the state after each of them: states share the samples they hold, so that costs next to nothing.

The worker is started anew from Python, not forked: it inherits no lock, no thread and no memory of the
training process. It ends when the pipe closes or, should it be busy, when the kernel tells it that its parent is
gone (on Linux); signals for the whole group, such as Ctrl-C, are left to the parent, which still needs it to
save. Each data-parallel rank has a worker, all of them make the same global batches, and each hands out the
share of its rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.packing.packing import Bin
from finetune.data.reading.mixing import DataSource
from finetune.data.samples.bulk_encoding import BulkBuilder
from finetune.data.samples.tokenize import IGNORE_INDEX
from finetune.data.stream.settings import StreamSettings
from finetune.data.stream.state import StreamState
from finetune.data.stream.stream import SampleStream
from finetune.errors import UserError
from finetune.machine.stop_signals import STOP_SIGNALS

NUM_AHEAD = 4
"""Global batches that wait for the training."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """What a worker needs; goes through a pipe.

    Attributes:
        sources: The data sets.
        make_builder: Loads tokenizer and template, in the worker.
        settings: Of the stream.
        global_batch_size: Rows of an optimizer step, over all ranks.
        shares: Which of these rows are this rank's, by micro-batch.
    """

    sources: tuple[DataSource, ...]
    make_builder: Callable[[], BulkBuilder]
    settings: StreamSettings
    global_batch_size: int
    shares: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class StreamBatch:
    """One rank's part of a global batch.

    Attributes:
        micro_batches: Rows by micro-batch.
        num_tokens: Of the whole global batch.
        num_label_tokens: Labels of the whole global batch that are not IGNORE_INDEX.
        epoch: Passes over the data that are done behind this batch.
        summary: Counts of the lines so far: read, kept, left out.
        first_fault: The first line that was skipped; "" for none.
    """

    micro_batches: list[list[Bin]]
    num_tokens: int
    num_label_tokens: int
    epoch: float
    summary: str
    first_fault: str


class StreamProcess:
    """The training process' end of a worker; may be asked by several threads, and closed while one asks.

    Args:
        plan: What to stream.
    """

    def __init__(self, plan: StreamPlan):
        self.plan = plan
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._asking = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Process number of the worker; None before `start`."""
        return self._process.pid if self._process else None

    def start(self, step: int, saved: tuple[dict[str, Any], dict[str, NDArray[Any]]] | None = None) -> None:
        """Starts the worker.

        Args:
            step: The first step whose batch will be asked for.
            saved: Position and arrays of the state before that step; None begins with the data.

        Raises:
            UserError: The state is that of other data or settings.
            RuntimeError: The worker failed.
        """
        assert self._process is None, "the worker has been started already"
        self._pipe, other = Pipe()
        package_root = str(Path(__file__).resolve().parents[3])
        path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"from {__name__} import main; main()",
                str(other.fileno()),
                str(os.getpid()),
            ],
            pass_fds=[other.fileno()],
            start_new_session=True,  # Ctrl-C of the terminal is for the parent
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
        )
        other.close()
        try:
            self._ask("start", self.plan, step, saved)
        except Exception:
            self.close()
            raise

    def batch(self, step: int) -> StreamBatch:
        """This rank's part of global batch `step`; steps are asked for in order.

        Raises:
            UserError: What the data are to blame for.
            RuntimeError: The worker failed or was killed.
        """
        batch: StreamBatch = self._ask("batch", step)
        return batch

    def state(self, step: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Position and arrays of the stream after `step` batches: all that were asked for, or all but the last."""
        state: tuple[dict[str, Any], dict[str, NDArray[Any]]] = self._ask("state", step)
        return state

    def close(self) -> None:
        """Ends the worker."""
        if self._process:
            self._process.kill()  # it has nothing to finish; a thread that waits for an answer is told
            self._process.wait()
        with self._asking:
            if self._pipe:
                self._pipe.close()
                self._pipe = None

    def _ask(self, *question: Any) -> Any:
        with self._asking:
            assert self._process and self._pipe, "the worker is not running"
            try:
                self._pipe.send(question)
                kind, answer = self._pipe.recv()
            except (EOFError, OSError):
                raise RuntimeError(self._describe_end()) from None
        if kind == "faults":
            raise UserError(answer)
        if kind == "failed":
            raise RuntimeError(f"the process that reads the data failed:\n{answer}")
        return answer

    def _describe_end(self) -> str:
        assert self._process
        code = self._process.wait()
        how = (
            f"was ended by signal {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit code {code}"
        )
        hint = ": most likely memory ran out, lower shuffle_buffer_size" if code == -signal.SIGKILL else ""
        return f"the process that reads the data {how}{hint}; start the same command again to continue"


class _Producer:
    """Batches made in advance, and the state after each."""

    def __init__(
        self, plan: StreamPlan, step: int, saved: tuple[dict[str, Any], dict[str, NDArray[Any]]] | None
    ):
        self._plan = plan
        self._stream = SampleStream(plan.sources, plan.make_builder(), plan.settings)
        if saved is not None:
            self._stream.restore(StreamState.from_arrays(*saved))
        self._next_step = step
        self._ready: deque[StreamBatch] = deque()
        self._states: deque[tuple[int, StreamState]] = deque([(step, self._stream.state())])
        self._error: Exception | None = None

    @property
    def is_ahead(self) -> bool:
        return len(self._ready) >= NUM_AHEAD or self._error is not None

    def make(self) -> None:
        """Makes one batch; a fault waits until its batch is asked for, since those before it are good."""
        try:
            units = self._stream.next_units(self._plan.global_batch_size)
        except Exception as error:
            self._error = error
            return
        self._next_step += 1
        state = self._stream.state()
        self._states.append((self._next_step, state))
        report = self._stream.report
        micro_batches = [[units[place] for place in share] for share in self._plan.shares]
        self._ready.append(
            StreamBatch(
                micro_batches,
                num_tokens=sum(len(unit.input_ids) for unit in units),
                num_label_tokens=sum(int(np.count_nonzero(unit.labels != IGNORE_INDEX)) for unit in units),
                epoch=self._stream.epoch,
                summary=report.describe(),
                first_fault=report.first_fault,
            )
        )

    def take(self, step: int) -> StreamBatch:
        if not self._ready and self._error is None:
            self.make()
        if not self._ready:
            assert self._error
            raise self._error
        assert step == self._next_step - len(self._ready), f"batch {step} was asked for out of order"
        # A checkpoint is written behind this batch or behind the one before it.
        while self._states[0][0] < step:
            self._states.popleft()
        return self._ready.popleft()

    def state(self, step: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        state = dict(self._states)[step]
        return state.position, state.to_arrays()


def main() -> None:
    """Body of the worker: ``PIPE_DESCRIPTOR PARENT_PROCESS`` on the command line."""
    pipe, parent = Connection(int(sys.argv[1])), int(sys.argv[2])
    _end_with(parent)
    sys.stdout = sys.stderr
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone or done
        _serve(pipe)


def _serve(pipe: Connection) -> None:
    producer: _Producer | None = None
    while True:
        if producer and not producer.is_ahead and not pipe.poll():
            producer.make()
            continue
        kind, *details = pipe.recv()
        try:
            answer: Any = None
            if kind == "start":
                producer = _Producer(*details)
            else:
                assert producer
                answer = producer.take(*details) if kind == "batch" else producer.state(*details)
        except UserError as error:
            pipe.send(("faults", list(error.faults)))
        except Exception as error:
            pipe.send(("failed", "".join(traceback.format_exception(error))))
        else:
            pipe.send((kind, answer))


def _end_with(parent: int) -> None:
    """Has the kernel kill this process when its parent is gone, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it was gone before the request took effect
        os._exit(0)


def shares_of(micro_batches: Sequence[NDArray[Any]]) -> tuple[tuple[int, ...], ...]:
    """Row numbers within the global batch, from what `sampler.split` gives for ``arange``."""
    return tuple(tuple(part.tolist()) for part in micro_batches)
