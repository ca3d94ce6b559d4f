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

import hashlib
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from finetune.data.packing.packing import Bin, pack, split_open
from finetune.data.reading.conversation import Conversation
from finetune.data.reading.formats import ReadOptions
from finetune.data.reading.mixing import DataSource
from finetune.data.reading.records import FaultCollector
from finetune.data.samples.bulk_encoding import BulkBuilder
from finetune.data.samples.dataset import EMPTY_RESPONSE, NO_ROOM, TOO_LONG, DataReport
from finetune.data.samples.tokenize import Sample, TooLongError, has_response
from finetune.data.stream.reader import SourceReader
from finetune.data.stream.state import Numbered, StreamState
from finetune.errors import UserError

PACKING_WINDOW = 4096
DEFAULT_BUFFER_SIZE = 10_000
NUM_AT_ONCE = 256
CHARACTERS_AT_ONCE = 500_000
"""Examples that are tokenised together: as many as reach one of the two."""


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """What a stream depends on besides its files and the tokenizer.

    Attributes:
        seed: Not negative.
        shuffle_buffer_size: Samples that the next one is drawn from; 1 keeps the order of the files.
        row_length: Tokens of a packed row; None gives rows of one sample.
        skip_bad_lines: Faulty lines are counted instead of raised.
        stop_at_too_long: Samples that do not fit raise instead of being counted.
        train_on: "all" or "last" of the responses, for the reason of what is dropped.
        system: System text of conversations that have none; None leaves that to the template.
        options: Format of the files.
    """

    seed: int
    shuffle_buffer_size: int = DEFAULT_BUFFER_SIZE
    row_length: int | None = None
    skip_bad_lines: bool = False
    stop_at_too_long: bool = False
    train_on: str = "all"
    system: str | None = None
    options: ReadOptions = ReadOptions()  # noqa: RUF009  (frozen)


class SampleStream:
    """Rows of one or several samples, without end.

    Args:
        sources: The data sets; all have a ratio, or none.
        builder: Renders and tokenises.
        settings: See there.
    """

    def __init__(self, sources: Sequence[DataSource], builder: BulkBuilder, settings: StreamSettings):
        self._builder, self._settings = builder, settings
        self._faults = FaultCollector(skip=settings.skip_bad_lines)
        self._readers = [
            SourceReader(source, settings.options, self._faults, seed=_hash(settings.seed, "files", number))
            for number, source in enumerate(sources)
        ]
        ratios = [source.ratio for source in sources if source.ratio is not None]
        self._is_endless = len(ratios) == len(sources)
        self._weights = np.array(ratios if self._is_endless else [sum(r.num_bytes) for r in self._readers])
        self._is_done = [False] * len(sources)
        self._ahead: deque[Sample] = deque()
        self._error: UserError | None = None
        self._buffer: list[Sample] = []
        self._window: list[Numbered] = []
        self._bins: list[list[Numbered]] = []
        self._pass_is_read = self._is_draining = self._window_is_last = False
        self._num_drawn = self._num_shuffled = self._num_windows = self._num_given = 0
        self._window_size = min(PACKING_WINDOW, settings.shuffle_buffer_size)
        self._report = DataReport(files=tuple(str(file) for source in sources for file in source.files))

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
        while len(samples) < count and (sample := self._read()) is not None:
            samples.append(sample)
        return samples

    @property
    def report(self) -> DataReport:
        """Counts of the lines so far: read, kept, left out."""
        self._report.num_faulty_lines = self._faults.num_faults
        self._report.first_fault = (self._faults.messages or [""])[0]
        return self._report

    @property
    def epoch(self) -> float:
        """Passes over the data that were given out; an estimate until the first is over."""
        sizes = [reader.estimate_size() for reader in self._readers]
        known = [size for size in sizes if size is not None]
        return self._num_given / sum(known) if len(known) == len(sizes) else 0.0

    def state(self) -> StreamState:
        """Where the stream stands now. Cheap: what is held is referred to, not copied."""
        position = self.identity() | {
            "sources": [reader.position() for reader in self._readers],
            "is_done": list(self._is_done),
            "pass_is_read": self._pass_is_read,
            "is_draining": self._is_draining,
            "window_is_last": self._window_is_last,
            "num_drawn": self._num_drawn,
            "num_shuffled": self._num_shuffled,
            "num_windows": self._num_windows,
            "num_given": self._num_given,
            "report": asdict(self.report) | {"files": []},
        }
        return StreamState(
            position, tuple(self._buffer), tuple(self._ahead), tuple(self._window), tuple(self._bins)
        )

    def restore(self, state: StreamState) -> None:
        """Continue where a stream of the same files and settings stood.

        Raises:
            UserError: The files or settings are others: samples would be repeated and skipped.
        """
        position = state.position
        self._check_identity(position)
        for reader, place in zip(self._readers, position["sources"], strict=True):
            reader.restore(place)
        self._is_done = list(position["is_done"])
        self._pass_is_read, self._is_draining = position["pass_is_read"], position["is_draining"]
        self._window_is_last = position["window_is_last"]
        self._num_drawn, self._num_shuffled = position["num_drawn"], position["num_shuffled"]
        self._num_windows, self._num_given = position["num_windows"], position["num_given"]
        self._buffer, self._ahead = list(state.buffer), deque(state.ahead)
        self._window = list(state.window)
        self._bins = [list(row) for row in state.bins]
        counts = position["report"]
        kept = {"files": self._report.files, "num_dropped": Counter(counts["num_dropped"])}
        self._report = DataReport(**counts | kept)
        self._faults.num_faults = self._report.num_faulty_lines
        self._faults.messages = [self._report.first_fault] if self._report.first_fault else []

    def identity(self) -> dict[str, Any]:
        """What the order depends on, as JSON. Files count by name and size: a folder may be moved."""
        settings = self._settings
        return {
            "files": [
                [file.name, size]
                for reader in self._readers
                for file, size in zip(reader.source.files, reader.num_bytes, strict=True)
            ],
            "seed": settings.seed,
            "shuffle_buffer_size": settings.shuffle_buffer_size,
            "row_length": settings.row_length,
            "ratios": [reader.source.ratio for reader in self._readers],
        }

    def _check_identity(self, position: dict[str, Any]) -> None:
        faults = [
            f"the checkpoint was written with {_describe(name, position.get(name), value)}: the stream of samples "
            "would not continue. Use the same data and settings, or start anew."
            for name, value in self.identity().items()
            if position.get(name) != value
        ]
        if faults:
            raise UserError(faults)

    # --- reading and tokenising ---

    def _read(self) -> Sample | None:
        """The next sample in the order of the files; None at the end of a pass over all of them."""
        while not self._ahead:
            if self._pass_is_read:
                self._pass_is_read = False
                return None
            self._read_ahead()
        return self._ahead.popleft()

    def _read_ahead(self) -> None:
        """Read and tokenise some examples, at most up to the end of a data set."""
        if self._error:
            raise self._error
        examples: list[tuple[SourceReader, Conversation]] = []
        room, ended = CHARACTERS_AT_ONCE, None
        while ended is None and len(examples) < NUM_AT_ONCE and room > 0:
            number = self._choose_source()
            try:
                conversation = self._readers[number].next()
            except UserError as error:  # told when what stands before it is used up
                self._error = error
                break
            if conversation is None:
                ended = number
                continue
            self._num_drawn += 1
            room -= sum(len(message.content) for message in conversation.messages)
            examples.append((self._readers[number], self._with_system(conversation)))
        self._build(examples)
        if ended is not None:
            self._readers[ended].begin_pass()
            self._is_done[ended] = not self._is_endless
            if all(self._is_done):
                self._is_done = [False] * len(self._readers)
                self._pass_is_read = True

    def _choose_source(self) -> int:
        if len(self._readers) == 1:
            return 0
        weights = np.cumsum(self._weights * ~np.array(self._is_done))
        draw = _hash(self._settings.seed, "source", self._num_drawn) / 2**64
        return min(int(np.searchsorted(weights, draw * weights[-1], side="right")), len(weights) - 1)

    def _with_system(self, conversation: Conversation) -> Conversation:
        system = self._settings.system
        if system is None or conversation.system is not None or conversation.is_text:
            return conversation
        return replace(conversation, system=system)

    def _build(self, examples: Sequence[tuple[SourceReader, Conversation]]) -> None:
        """Tokenise examples, and count what comes of them."""
        dropped: dict[int, TooLongError | None] = {}
        store = self._builder.build(
            [conversation for _, conversation in examples],
            lambda conversation, error: dropped.update({id(conversation): error}),
        )
        made = iter(store)
        for reader, conversation in examples:
            if id(conversation) in dropped:
                self._count_dropped(conversation, dropped[id(conversation)])
                continue
            sample = next(made)
            reader.note_kept()
            self._count(sample)
            self._ahead.append(sample)
        self._report.num_lines += len(examples)

    def _count_dropped(self, conversation: Conversation, error: TooLongError | None) -> None:
        if error and self._settings.stop_at_too_long:
            raise UserError(
                f"{conversation.place}: {error}: raise the length, or set truncation to left, right or drop"
            )
        is_blank = not has_response(conversation, only_last=self._settings.train_on == "last")
        self._report.num_dropped[TOO_LONG if error else EMPTY_RESPONSE if is_blank else NO_ROOM] += 1

    def _count(self, sample: Sample) -> None:
        report = self._report
        report.num_samples += 1
        report.num_tokens += len(sample.input_ids)
        report.num_label_tokens += sample.num_label_tokens
        report.num_truncated_source += sample.truncated_source
        report.num_truncated_target += sample.truncated_target
        report.num_dropped_rounds += sample.num_dropped_rounds

    # --- shuffling ---

    def _next_shuffled(self) -> Numbered | None:
        """A sample out of the buffer; None when the pass is over."""
        while not self._is_draining and len(self._buffer) < self._settings.shuffle_buffer_size:
            sample = self._read()
            if sample is None:
                self._is_draining = True
            else:
                self._buffer.append(sample)
        if not self._buffer:
            self._is_draining = False
            return None
        number = self._num_shuffled
        place = _hash(self._settings.seed, "shuffle", number) % len(self._buffer)
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
        self._fill_window(min(len(self._window) + len(row), self._window_size))
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
        seed = _hash(self._settings.seed, "window", self._num_windows)
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


def _hash(*key: int | str) -> int:
    """64 random bits for one purpose, the same wherever they are asked for."""
    text = "/".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _describe(name: str, before: Any, now: Any) -> str:
    if name != "files":
        return f"{name} {before}, this run has {now}"
    changed = [f"{file} ({size:,} bytes)" for file, size in now if [file, size] not in (before or [])]
    return f"other data files (changed or new: {', '.join(changed) or 'none; some are missing'})"
