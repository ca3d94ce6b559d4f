"""The next batch is made while a step runs.

Reading samples and putting them into arrays takes the host some time, in which a GPU would have nothing to do. A
thread does it one step ahead. Whatever else is asked of the source waits until the thread is done, so the source is
never used by two threads at a time; a fault of the data is raised by the step whose batch it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.data.batches.batch_source import BatchSource, StepBatch


class PrefetchedSource:
    """A source whose next batch is made in advance.

    Args:
        source: Makes the batches.
        num_steps: Of the run; no batch is made for a later one.
    """

    def __init__(self, source: BatchSource, num_steps: int):
        self.steps_per_epoch = source.steps_per_epoch
        self._source, self._num_steps = source, num_steps
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: tuple[int, Future[StepBatch]] | None = None

    def batch(self, step: int) -> StepBatch:
        """This rank's part of the global batch of a step; steps are asked for in order."""
        if self._next is None:
            batch = self._source.batch(step)
        else:
            prefetched_step, future = self._next
            assert prefetched_step == step, f"batch {step} was asked for, {prefetched_step} is the next"
            self._next = None
            batch = future.result()
        if step + 1 < self._num_steps:
            self._next = (step + 1, self._executor.submit(self._source.batch, step + 1))
        return batch

    def epoch(self, num_steps: int) -> float:
        """Passes over the data that are done after this many steps."""
        return self._source.epoch(num_steps)

    def ends_epoch(self, num_steps: int) -> bool:
        """Whether a pass over the data ends with this step."""
        return self._source.ends_epoch(num_steps)

    def save(self, folder: Path, num_steps: int) -> dict[str, Any]:
        """Writes the position after the steps that are done, whatever was made in advance."""
        return self._executor.submit(self._source.save, folder, num_steps).result()

    def restore(self, checkpoint: Path, position: Mapping[str, Any]) -> str | None:
        """Continues from a checkpoint; before the first batch."""
        return self._source.restore(checkpoint, position)

    def close(self) -> str:
        """Frees what the source holds, though a batch may be in the making, and ends the thread."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        note = self._source.close()
        self._executor.shutdown(wait=True)
        return note
