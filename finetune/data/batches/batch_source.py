"""Where the batches of optimizer step k come from: a data set in memory, or a stream.

Both give the same batch for a step whatever the layout: the global batch of step k depends on data, settings and
seed alone, and a data-parallel rank takes its share of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finetune.data.batches.sampler import GlobalOrder, split
from finetune.data.stream.state import load_arrays, save_arrays

if TYPE_CHECKING:
    from finetune.data.batches.preference_rows import PreferenceRows
    from finetune.data.batches.rows import Batch, Rows
    from finetune.data.packing.packing import Bin
    from finetune.data.stream.worker import StreamProcess


@dataclass(frozen=True)
class StepBatch:
    """What a rank trains on in an optimizer step.

    Attributes:
        micro_batches: This rank's part of the global batch.
        num_tokens: Of the whole global batch, without padding.
        num_label_tokens: Labels of the whole global batch that are not IGNORE_INDEX. Every rank knows it without
            asking the others: a loss is divided by it before its backward pass.
        note: What the person should know; "" for nothing.
        num_groups: Of preference data, the pairs or single answers of the whole global batch.
        num_learned_tokens: Of preference data, the tokens of the whole global batch whose likelihood may be learned
            beside the preference.
    """

    micro_batches: list[Batch]
    num_tokens: int
    num_label_tokens: int
    note: str = ""
    num_groups: int = 0
    num_learned_tokens: int = 0


class BatchSource(Protocol):
    """What the training loop asks for.

    Attributes:
        steps_per_epoch: Optimizer steps in one pass over the data; None when that is not known.
    """

    steps_per_epoch: int | None

    def batch(self, step: int) -> StepBatch:
        """This rank's part of the global batch of a step, counted from 0; asked for in order."""
        ...

    def epoch(self, num_steps: int) -> float:
        """Passes over the data that are done after this many steps; one batch more may have been asked for."""
        ...

    def ends_epoch(self, num_steps: int) -> bool:
        """Whether a pass over the data ends with this step."""
        ...

    def save(self, folder: Path, num_steps: int) -> dict[str, Any]:
        """Writes what is bulky into a checkpoint; returns the rest of the position, as JSON.

        Args:
            folder: The checkpoint.
            num_steps: Whose batches are trained on; one batch more may have been asked for.
        """
        ...

    def restore(self, checkpoint: Path, position: Mapping[str, Any]) -> str | None:
        """Continues from a checkpoint and the position that `save` returned.

        Returns:
            What the person should know, or None.

        Raises:
            UserError: The checkpoint belongs to other data or settings.
        """
        ...

    def close(self) -> str:
        """Frees what the source holds; no batch is asked for afterwards.

        Returns:
            What the person should know; "" for nothing.
        """
        ...


class MapSource:
    """Batches of a data set in memory: every epoch is a permutation.

    Args:
        rows: The data set.
        order: Which rows a step consumes.
        micro_batch_size: Rows of a forward pass.
        rank: Of the data-parallel ranks.
        world: Number of data-parallel ranks.
    """

    def __init__(
        self, rows: Rows, order: GlobalOrder, *, micro_batch_size: int, rank: int = 0, world: int = 1
    ):
        self.rows, self.order = rows, order
        self.steps_per_epoch: int | None = order.steps_per_epoch
        self._layout: dict[str, int] = {"micro_batch_size": micro_batch_size, "rank": rank, "world": world}

    def batch(self, step: int) -> StepBatch:
        """This rank's part of the global batch of a step.

        All ranks get the same number of micro-batches; one that is out of samples repeats the batch's first as an
        idle one.
        """
        _, indices = self.order.batch(step)
        parts = split(indices, **self._layout)
        micro_batches = [
            self.rows.batch(part) if len(part) else self.rows.batch(indices[:1]).idle() for part in parts
        ]
        num_tokens = int(self.rows.lengths[indices].sum())
        return StepBatch(micro_batches, num_tokens, self.rows.count_label_tokens(indices))

    def epoch(self, num_steps: int) -> float:
        """Passes over the data, in whole steps."""
        epoch, place = divmod(num_steps, self.order.steps_per_epoch)
        return epoch + place / self.order.steps_per_epoch

    def ends_epoch(self, num_steps: int) -> bool:
        """Whether this step is the last of an epoch."""
        return num_steps % self.order.steps_per_epoch == 0

    @functools.cached_property
    def _fingerprint(self) -> str:
        """Of the data, which stay as they are: hashed once, not at every save."""
        return self.rows.fingerprint()

    def save(self, folder: Path, num_steps: int) -> dict[str, Any]:
        """The step and what the order depends on; nothing is bulky."""
        return self.order.position(num_steps) | {"data": self._fingerprint}

    def restore(self, checkpoint: Path, position: Mapping[str, Any]) -> str | None:
        """Checks that the order is the same, and tells when the data are not."""
        self.order.restore(position)
        if position["data"] != self._fingerprint:
            return "warning: the training data changed since this run began; its curve will change too."
        return None

    def close(self) -> str:
        """Nothing to free, nothing to tell."""
        return ""


class PreferenceSource(MapSource):
    """Batches of preference data in memory, with what their losses are divided by.

    Args:
        rows: The data set.
        order: Which rows a step consumes.
        **layout: As for `MapSource`.
    """

    def __init__(self, rows: PreferenceRows, order: GlobalOrder, **layout: int):
        super().__init__(rows, order, micro_batch_size=layout.pop("micro_batch_size"), **layout)
        self.groups = rows

    def batch(self, step: int) -> StepBatch:
        """This rank's part of the global batch of a step."""
        _, indices = self.order.batch(step)
        return replace(
            super().batch(step),
            num_groups=self.groups.count_groups(indices),
            num_learned_tokens=self.groups.count_learned_tokens(indices),
        )


class StreamSource:
    """Batches of a stream, which a process of its own reads.

    Args:
        process: Makes the rows; started by the first batch or by `restore`.
        make_rows: Rows to batches; see `finetune.data.batches.rows`.
    """

    steps_per_epoch: int | None = None

    def __init__(self, process: StreamProcess, make_rows: Callable[[list[Bin]], Batch]):
        self._process, self._make_rows = process, make_rows
        self._epochs: dict[int, float] = {0: 0.0}
        self._summary = self._told_fault = ""

    def batch(self, step: int) -> StepBatch:
        """This rank's part of the global batch of a step.

        Raises:
            UserError: The data are faulty.
            RuntimeError: The process that reads them is gone.
        """
        if self._process.pid is None:
            self._process.start(step)
        answer = self._process.batch(step)
        self._epochs = {step: self._epochs.get(step, 0.0), step + 1: answer.epoch}
        self._summary, note = answer.summary, ""
        if answer.first_fault and not self._told_fault:
            self._told_fault = answer.first_fault
            note = f"warning: faulty lines are skipped, the first: {answer.first_fault}"
        micro_batches = [self._make_rows(rows) for rows in answer.micro_batches]
        return StepBatch(micro_batches, answer.num_tokens, answer.num_label_tokens, note)

    def epoch(self, num_steps: int) -> float:
        """Passes over the data, an estimate in the first; known after the newest batch and the one before it."""
        return self._epochs[num_steps]

    def ends_epoch(self, num_steps: int) -> bool:
        """Never: a pass ends anywhere in a batch."""
        return False

    def save(self, folder: Path, num_steps: int) -> dict[str, Any]:
        """Writes the samples that the stream holds; returns where it stands."""
        position, arrays = self._process.state(num_steps)
        save_arrays(folder, arrays)
        plan = self._process.plan
        return {"step": num_steps, "global_batch_size": plan.global_batch_size, "stream": position}

    def restore(self, checkpoint: Path, position: Mapping[str, Any]) -> str | None:
        """Starts the process where the checkpoint left it."""
        from finetune.errors import UserError

        before, now = position.get("global_batch_size"), self._process.plan.global_batch_size
        if "stream" not in position or before != now:
            what = (
                "without lazy" if "stream" not in position else f"with global_batch_size {before}, not {now}"
            )
            raise UserError(
                f"the checkpoint {checkpoint} was written {what}: the order of samples would not continue. "
                "Use the same settings, or start anew."
            )
        self._process.start(int(position["step"]), (position["stream"], load_arrays(checkpoint)))
        return None

    def close(self) -> str:
        """Ends the process; returns the counts of its lines."""
        self._process.close()
        return f"Data, train, as far as read: {self._summary}" if self._summary else ""


def make_share(global_batch_size: int, *, micro_batch_size: int, rank: int, world: int) -> list[NDArray[Any]]:
    """Which rows of a global batch are a rank's, by micro-batch."""
    rows = np.arange(global_batch_size)
    return split(rows, micro_batch_size=micro_batch_size, rank=rank, world=world)
