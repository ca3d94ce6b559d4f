"""A data set as a stream: read, tokenised, shuffled in a buffer and packed, with memory that is bounded.

::

    files --> SourceReader, one for each data set --> sample --> shuffle buffer --> window --> bins
              (file, offset, epoch)                              drawn from          packed

One pass over the data is an epoch: the shuffle buffer runs empty at its end, so every sample comes exactly once
in it, and a data set smaller than the buffer is shuffled as a whole. Data sets are read side by side, drawn in
proportion to their bytes, so that they mix. Data sets with ratios are drawn by these and each begins anew
whenever it is over; there is no common pass then, and the buffer stays full.

Examples are tokenised some hundred at a time, which is several times faster than one by one.

Packing takes windows of `PACKING_WINDOW` samples, and hands the samples of poorly filled bins on to the next
window. For every bin that goes out as many samples come in, so no step waits for a whole window.

Every draw is keyed by the seed and a running number: the order depends on files and settings alone, and all
there is to save is positions, counters and the samples held (`StreamState`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune.data.packing.packing import Bin, pack, split_open
from finetune.data.reading.mixing import DataSource
from finetune.data.samples.bulk_encoding import BulkBuilder
from finetune.data.samples.data_report import DataReport
from finetune.data.samples.tokenize import Sample
from finetune.data.stream.settings import StreamSettings
from finetune.data.stream.state import Numbered, StreamState
from finetune.data.stream.tokenized_reader import TokenizedReader, random_bits
from finetune.errors import UserError

PACKING_WINDOW = 4096
# The counters and flags of `SampleStream` that a saved position holds.
_SAVED = ("is_draining", "window_is_last", "num_shuffled", "num_windows", "num_given")


class SampleStream:
    """Rows of one or several samples, without end.

    Args:
        sources: The data sets; all have a ratio, or none.
        builder: Renders and tokenises.
        settings: See there.
    """

    def __init__(self, sources: Sequence[DataSource], builder: BulkBuilder, settings: StreamSettings):
        self._settings = settings
        self._reader = TokenizedReader(sources, builder, settings)
        self._buffer: list[Sample] = []
        self._window: list[Numbered] = []
        self._bins: list[list[Numbered]] = []
        self._is_draining = self._window_is_last = False
        self._num_shuffled = self._num_windows = self._num_given = 0
        self._window_size = min(PACKING_WINDOW, settings.shuffle_buffer_size)

    def next_units(self, count: int) -> list[Bin]:
        """The next rows; an unpacked one is a bin of one segment.

        The sample indices of a bin are running numbers, which no two samples of a run share.

        Raises:
            UserError: Faulty lines, samples that are too long where these stop the run, or no usable sample.
        """
        units = []
        for _ in range(count):
            row = self._next_numbered() if self._settings.row_length is None else self._next_bin()
            self._num_given += len(row)
            units.append(_to_bin(row))
        return units

    def read_first(self, count: int) -> list[Sample]:
        """Samples from the beginning, at most one pass, in the order of reading; not for a stream in use.

        Raises:
            UserError: As `next_units`.
        """
        samples: list[Sample] = []
        while len(samples) < count and (sample := self._reader.next()) is not None:
            samples.append(sample)
        return samples

    @property
    def report(self) -> DataReport:
        """Counts of the lines so far: read, kept, left out."""
        return self._reader.report

    @property
    def epoch(self) -> float:
        """Passes over the data that were given out; an estimate until the first is over."""
        size = self._reader.num_samples_of_pass
        return self._num_given / size if size is not None else 0.0

    def state(self) -> StreamState:
        """Where the stream stands now. Cheap: what is held is referred to, not copied."""
        position = self.identity() | self._reader.position()
        position |= {name: getattr(self, f"_{name}") for name in _SAVED}
        return StreamState(
            position, tuple(self._buffer), tuple(self._reader.ahead), tuple(self._window), tuple(self._bins)
        )

    def restore(self, state: StreamState) -> None:
        """Continues where a stream of the same files and settings stood.

        Raises:
            UserError: The files or settings are others: samples would be repeated and skipped.
        """
        position = state.position
        self._check_identity(position)
        self._reader.restore(position, state.ahead)
        for name in _SAVED:
            setattr(self, f"_{name}", position[name])
        self._buffer, self._window = list(state.buffer), list(state.window)
        self._bins = [list(row) for row in state.bins]

    def identity(self) -> dict[str, Any]:
        """What the order depends on, as JSON."""
        names = ("seed", "shuffle_buffer_size", "row_length")
        return self._reader.identity() | {name: getattr(self._settings, name) for name in names}

    def _check_identity(self, position: dict[str, Any]) -> None:
        faults = [
            f"the checkpoint was written with {_describe(name, position.get(name), value)}: the stream of samples "
            "would not continue. Use the same data and settings, or start anew."
            for name, value in self.identity().items()
            if position.get(name) != value
        ]
        if faults:
            raise UserError(faults)

    # --- shuffling ---

    def _next_shuffled(self) -> Numbered | None:
        """A sample out of the buffer; None when the pass is over."""
        while not self._is_draining and len(self._buffer) < self._settings.shuffle_buffer_size:
            sample = self._reader.next()
            if sample is None:
                self._is_draining = True
            else:
                self._buffer.append(sample)
        if not self._buffer:
            self._is_draining = False
            return None
        number = self._num_shuffled
        place = random_bits(self._settings.seed, "shuffle", number) % len(self._buffer)
        sample, last = self._buffer[place], self._buffer.pop()
        if place < len(self._buffer):
            self._buffer[place] = last
        self._num_shuffled += 1
        return number, sample

    def _next_numbered(self) -> list[Numbered]:
        while (pair := self._next_shuffled()) is None:
            pass
        return [pair]

    # --- packing ---

    def _next_bin(self) -> list[Numbered]:
        while not self._bins:
            self._fill_window(self._window_size)
            self._pack_window()
        row = self._bins.pop()
        self._fill_window(len(self._window) + len(row))
        return row

    def _fill_window(self, size: int) -> None:
        while len(self._window) < size and not self._window_is_last:
            pair = self._next_shuffled()
            if pair is None:
                self._window_is_last = True
            else:
                self._window.append(pair)

    def _pack_window(self) -> None:
        assert self._settings.row_length is not None
        window = self._window
        lengths = np.array([len(sample.input_ids) for _, sample in window], dtype=np.int64)
        seed = random_bits(self._settings.seed, "window", self._num_windows)
        packing, left = pack(lengths, self._settings.row_length, seed=seed), lengths[:0]
        if not self._window_is_last:
            packing, left = split_open(packing)
        self._bins = [[window[index] for index in packing[row].tolist()] for row in range(len(packing))][::-1]
        self._window = [window[index] for index in left.tolist()]
        self._window_is_last = False
        self._num_windows += 1


def _to_bin(row: Sequence[Numbered]) -> Bin:
    return Bin(
        input_ids=np.concatenate([sample.input_ids for _, sample in row]),
        labels=np.concatenate([sample.labels for _, sample in row]),
        segment_lengths=np.array([len(sample.input_ids) for _, sample in row], dtype=np.int32),
        sample_indices=np.array([number for number, _ in row], dtype=np.int64),
    )


def _describe(name: str, before: Any, now: Any) -> str:
    if name != "files":
        return f"{name} {before}, this run has {now}"
    changed = [f"{file} ({size:,} bytes)" for file, size in now if [file, size] not in (before or [])]
    return f"other data files (changed or new: {', '.join(changed) or 'none; some are missing'})"
