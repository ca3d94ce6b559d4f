"""Steps, tokens, padding and the largest micro-batches of a run, counted from the lengths of its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.batches.sampler import GlobalOrder, split
from finetune.data.samples.sample_store import SampleStore
from finetune.run.plan.activations import MicroBatch

if TYPE_CHECKING:
    from finetune.processes.layout import Layout
    from finetune.settings.arguments import Arguments

_MOST_STEPS = 20_000
"""Steps whose micro-batches are looked at one by one; what comes later is like them."""


@dataclass(frozen=True)
class BatchPlan:
    """What a run consumes.

    Attributes:
        num_samples: Samples of the data set; of a stream those that were looked at.
        num_rows: Rows they make; several samples share one where rows are packed.
        steps_per_epoch: None for a stream.
        num_steps: Of the run.
        num_tokens: Of all steps, without padding.
        padding_share: Of the positions that are computed, 0 to 1.
        longest: Tokens of the longest row.
        largest: Micro-batches one of which needs the most memory.
        is_estimate: Whether only a part of the data was looked at.
    """

    num_samples: int
    num_rows: int
    steps_per_epoch: int | None
    num_steps: int
    num_tokens: int
    padding_share: float
    longest: int
    largest: tuple[MicroBatch, ...]
    is_estimate: bool = False

    @property
    def num_epochs(self) -> float | None:
        """Passes over the data; None for a stream."""
        return self.num_steps / self.steps_per_epoch if self.steps_per_epoch else None


def plan_batches(
    args: Arguments,
    num_samples: int,
    rows: Any,
    order: GlobalOrder,
    layout: Layout,
    *,
    is_stream: bool = False,
) -> BatchPlan:
    """Goes through the order of a run without making a batch.

    Args:
        args: The settings.
        num_samples: That the rows hold.
        rows: As the run has them, see `finetune.run.trainer.build_rows`.
        order: Which of them each step consumes.
        layout: Degrees of parallelism.
        is_stream: Whether the rows are only the first of a stream.
    """
    training = args.training
    per_epoch = order.steps_per_epoch
    num_steps = int(args.data.longest_first or training.max_steps)
    if num_steps <= 0:
        num_steps = max(1, round(per_epoch * float(training.num_train_epochs)))
    looked_at = min(num_steps, per_epoch if is_stream else _MOST_STEPS)
    counts = _Counts(rows, args.data.pad_to_multiple_of or 1)
    for step in range(looked_at):
        _, indices = order.batch(step)
        for rank in range(layout.data_world):
            for part in split(
                indices, training.per_device_train_batch_size, rank=rank, world=layout.data_world
            ):
                if len(part):
                    counts.add(part)
    share = num_steps / looked_at
    return BatchPlan(
        num_samples=num_samples,
        num_rows=len(rows),
        steps_per_epoch=None if is_stream else per_epoch,
        num_steps=num_steps,
        num_tokens=round(counts.num_tokens * share),
        padding_share=1 - counts.num_tokens / max(counts.num_positions, 1),
        longest=int(rows.lengths.max()),
        largest=tuple(counts.largest()),
        is_estimate=is_stream or looked_at < num_steps,
    )


class _Counts:
    """Sums over micro-batches, and the largest of them by three measures."""

    def __init__(self, rows: Any, multiple: int):
        self._rows, self._lengths, self._multiple = rows, rows.lengths, multiple
        self._labels = _count_labels(rows)
        self.num_tokens = self.num_positions = 0
        self._most: dict[str, tuple[float, NDArray[Any]]] = {}

    def add(self, part: NDArray[Any]) -> None:
        """Counts a micro-batch."""
        lengths = self._lengths[part]
        length = -(-int(lengths.max()) // self._multiple) * self._multiple
        positions = len(part) * length
        self.num_tokens += int(lengths.sum())
        self.num_positions += positions
        measures = {
            "positions": positions,
            "scores": positions * length,
            "labels": int(self._labels[part].sum()),
        }
        for name, size in measures.items():
            if name not in self._most or size > self._most[name][0]:
                self._most[name] = (size, part)

    def largest(self) -> Iterator[MicroBatch]:
        """The micro-batches that have most of something, in their real shapes."""
        seen = set()
        for _, part in self._most.values():
            key = tuple(part.tolist())
            if key not in seen:
                seen.add(key)
                batch = self._rows.batch(part)
                num_rows, length = batch.shape
                yield MicroBatch(num_rows, length, batch.num_label_tokens)


def _count_labels(rows: Any) -> NDArray[Any]:
    """int64 [units], labels of each unit."""
    samples, packing = getattr(rows, "samples", None), None
    if (packed := getattr(rows, "packed", None)) is not None:
        samples, packing = packed.samples, packed.packing
    if not isinstance(samples, SampleStore) or getattr(rows, "partners", None) is not None:
        return np.array(
            [rows.count_label_tokens(np.array([unit])) for unit in range(len(rows))], dtype=np.int64
        )
    counts = np.add.reduceat(samples.learned.astype(np.int64), samples.offsets[:-1])
    return counts if packing is None else np.add.reduceat(counts[packing.order], packing.offsets[:-1])


def widest(batches: tuple[MicroBatch, ...], measure: Callable[[MicroBatch], float]) -> MicroBatch:
    """The micro-batch with the most of what a function tells."""
    return max(batches, key=measure)
