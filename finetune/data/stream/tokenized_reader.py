"""The first half of a stream: data sets read side by side, and their samples, in the order of reading.

Data sets without ratios are drawn from in proportion to their bytes until all are over, which ends a pass; those
with ratios begin anew whenever they are over, and no pass ends.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from finetune.data.reading.conversation import Conversation
from finetune.data.reading.mixing import DataSource
from finetune.data.reading.notes import ReadingNotes
from finetune.data.reading.records import FaultCollector
from finetune.data.samples.bulk_encoding import BulkBuilder, DropCause
from finetune.data.samples.data_report import DataReport
from finetune.data.samples.drop_reasons import REFUSED
from finetune.data.samples.tokenize import Sample, TooLongError
from finetune.data.stream.reader import SourceReader
from finetune.data.stream.settings import StreamSettings
from finetune.data.templates.pieces import RefusedConversationError
from finetune.errors import UserError

NUM_AT_ONCE = 256
CHARACTERS_AT_ONCE = 500_000
"""Examples that are tokenised together: as many as reach one of the two."""


class TokenizedReader:
    """Samples of several data sets, read side by side and tokenised some hundred at a time.

    Args:
        sources: The data sets; all have a ratio, or none.
        builder: Renders and tokenises.
        settings: Of the stream.

    Attributes:
        ahead: Samples that were made together with others and are not given out yet.
    """

    def __init__(self, sources: Sequence[DataSource], builder: BulkBuilder, settings: StreamSettings):
        self._builder, self._settings = builder, settings
        self._faults = FaultCollector(skip=settings.skip_bad_lines)
        self._readers = [
            SourceReader(
                source, settings.options, self._faults, seed=random_bits(settings.seed, "files", number)
            )
            for number, source in enumerate(sources)
        ]
        ratios = [source.ratio for source in sources if source.ratio is not None]
        self._is_endless = len(ratios) == len(sources)
        self._weights = np.array(ratios if self._is_endless else [sum(r.num_bytes) for r in self._readers])
        self._is_done = [False] * len(sources)
        self.ahead: deque[Sample] = deque()
        self._error: UserError | None = None
        self._pass_is_read = False
        self._num_drawn = 0
        files = tuple(str(file) for source in sources for file in source.files)
        self._report = DataReport(files=files, notes=self._faults.notes)

    @property
    def report(self) -> DataReport:
        """Counts of the lines so far: read, kept, left out."""
        self._report.num_faulty_lines = self._faults.num_faults
        self._report.first_fault = (self._faults.messages or [""])[0]
        self._report.notes = self._faults.notes
        return self._report

    @property
    def num_samples_of_pass(self) -> float | None:
        """Samples of one pass over all data sets, an estimate until the first is over; None while there is none."""
        sizes = [reader.estimate_size() for reader in self._readers]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def identity(self) -> dict[str, Any]:
        """The files and their shares, as JSON. Files count by name and size: a folder may be moved."""
        return {
            "files": [
                [file.name, size]
                for reader in self._readers
                for file, size in zip(reader.source.files, reader.num_bytes, strict=True)
            ],
            "ratios": [reader.source.ratio for reader in self._readers],
        }

    def position(self) -> dict[str, Any]:
        """Where reading stands, as JSON; the samples `ahead` belong to it."""
        return {
            "sources": [reader.position() for reader in self._readers],
            "is_done": list(self._is_done),
            "pass_is_read": self._pass_is_read,
            "num_drawn": self._num_drawn,
            "report": _counts(self.report) | {"files": []},
        }

    def restore(self, position: Mapping[str, Any], ahead: Iterable[Sample]) -> None:
        """Continues where `position` was taken."""
        for reader, place in zip(self._readers, position["sources"], strict=True):
            reader.restore(place)
        self._is_done = list(position["is_done"])
        self._pass_is_read, self._num_drawn = position["pass_is_read"], position["num_drawn"]
        self.ahead = deque(ahead)
        counts = position["report"]
        notes = ReadingNotes(*(Counter(counts["notes"][name]) for name in ("rules", "unused_fields")))
        kept = {"files": self._report.files, "num_dropped": Counter(counts["num_dropped"]), "notes": notes}
        self._report = DataReport(**counts | kept)
        self._faults.notes = notes
        self._faults.num_faults = self._report.num_faulty_lines
        self._faults.messages = [self._report.first_fault] if self._report.first_fault else []

    def next(self) -> Sample | None:
        """The next sample in the order of the files; None at the end of a pass over all of them."""
        while not self.ahead:
            if self._pass_is_read:
                self._pass_is_read = False
                return None
            self._read_ahead()
        return self.ahead.popleft()

    def _read_ahead(self) -> None:
        """Reads and tokenises some examples, at most up to the end of a data set."""
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
        draw = random_bits(self._settings.seed, "source", self._num_drawn) / 2**64
        return min(int(np.searchsorted(weights, draw * weights[-1], side="right")), len(weights) - 1)

    def _with_system(self, conversation: Conversation) -> Conversation:
        system = self._settings.system
        if system is None or conversation.system is not None or conversation.is_text:
            return conversation
        return replace(conversation, system=system)

    def _build(self, examples: Sequence[tuple[SourceReader, Conversation]]) -> None:
        """Tokenises examples, and counts what comes of them."""
        dropped: dict[int, DropCause] = {}
        made_of: dict[int, tuple[int, TooLongError | None]] = {}
        store = self._builder.build(
            [conversation for _, conversation in examples],
            lambda conversation, cause: dropped.update({id(conversation): cause}),
            lambda conversation, *made: made_of.update({id(conversation): made}),
        )
        made = iter(store)
        for reader, conversation in examples:
            self._report.add_texts(conversation, self._builder.encoder, self._builder.template)
            if id(conversation) in dropped:
                reader.note_dropped(self._count_dropped(conversation, dropped[id(conversation)]))
                continue
            num_made, too_long = made_of[id(conversation)]
            self._stop_at(conversation, too_long)
            samples = list(islice(made, num_made))
            reader.note_kept(len(samples))
            self._report.add_made(conversation, len(samples), too_long)
            for sample in samples:
                self._count(sample)
            self.ahead += samples
        self._report.num_lines += len(examples)

    def _stop_at(self, conversation: Conversation, cause: DropCause) -> None:
        if isinstance(cause, TooLongError) and self._settings.stop_at_too_long:
            raise UserError(f"{conversation.place}: {cause}")

    def _count_dropped(self, conversation: Conversation, cause: DropCause) -> str:
        """Counts an example that gave no sample, and says why."""
        self._stop_at(conversation, cause)
        if isinstance(cause, RefusedConversationError):
            self._faults.add(cause.describe(conversation.place))
            self._faults.raise_if_any()
            return REFUSED
        return self._report.add_dropped(conversation, cause, only_last=self._settings.train_on == "last")

    def _count(self, sample: Sample) -> None:
        report = self._report
        report.num_samples += 1
        report.num_tokens += len(sample.input_ids)
        report.num_label_tokens += sample.num_label_tokens
        report.num_truncated_source += sample.truncated_source
        report.num_truncated_target += sample.truncated_target
        report.num_dropped_rounds += sample.num_dropped_rounds


def _counts(report: DataReport) -> dict[str, Any]:
    """The counts as JSON."""
    notes = {"rules": dict(report.notes.rules), "unused_fields": dict(report.notes.unused_fields)}
    return {**vars(report), "num_dropped": dict(report.num_dropped), "notes": notes}


def random_bits(*key: int | str) -> int:
    """64 random bits for one purpose, the same wherever they are asked for."""
    text = "/".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
