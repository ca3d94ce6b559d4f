"""The examples of one data set, read one by one, pass after pass, from any place on.

A pass reads every file once, in an order drawn for the pass; within a file the order is that of its lines.
Nothing but the example at hand is held in memory. The exception is a JSON list, which can only be read as
a whole, and is therefore refused above `MAX_LIST_BYTES`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data.reading.conversation import Conversation
from finetune.data.reading.encodings import is_wide, normalise_encoding
from finetune.data.reading.formats import NUM_RECORDS_LOOKED_AT, convert, recognise
from finetune.data.reading.mixing import DataSource
from finetune.data.reading.no_examples import describe_no_example
from finetune.data.reading.read_options import DEFAULT_OPTIONS, ReadOptions
from finetune.data.reading.readers import counts_bytes, is_list, read_file
from finetune.data.reading.records import START, FaultCollector, Position, Record
from finetune.data.samples.drop_reasons import describe_reasons, describe_remedies
from finetune.errors import UserError

MAX_LIST_BYTES = 64 * 2**20
_STREAM = 0x66696C65  # keeps these random numbers apart from others that are drawn with the same seed


def check_streamable(sources: list[DataSource], options: ReadOptions = DEFAULT_OPTIONS) -> None:
    """Refuses files that cannot be read in parts.

    Raises:
        UserError: JSON lists, and files in UTF-16 or UTF-32, above `MAX_LIST_BYTES`, all of them.
    """
    wide = is_wide(normalise_encoding(options.encoding))
    faults = []
    for file in (file for source in sources for file in source.files):
        size = file.stat().st_size
        if size <= MAX_LIST_BYTES or not (wide or is_list(file)):
            continue
        what, remedy = f"in {options.encoding}", "convert it to UTF-8, for example with `iconv`"
        if not wide:
            what = "a JSON list"
            remedy = (
                "write one object on each line instead, "
                f"for example with `jq -c '.[]' {file.name} > {file.stem}.jsonl`"
            )
        faults.append(
            f"{file} is {what} of {size / 2**20:,.0f} MiB, which can only be read as a whole "
            f"(lazy takes {'such files' if wide else 'lists'} of up to {MAX_LIST_BYTES / 2**20:.0f} MiB): {remedy}"
        )
    if faults:
        raise UserError(faults)


class SourceReader:
    """Reads a data set again and again, and knows where it is.

    Args:
        source: Its files, and the most examples that a pass takes (the first ones).
        options: The format of the files.
        faults: Gathers faulty lines; one that does not skip raises the first.
        seed: Decides the order of the files in each pass.

    Attributes:
        epoch: Passes that are over.
        size: Samples that a whole pass gives; None before the first is over.
    """

    def __init__(self, source: DataSource, options: ReadOptions, faults: FaultCollector, *, seed: int):
        self.source, self._faults, self._seed = source, faults, seed
        self._options = source.options or options
        self.num_bytes = [max(file.stat().st_size, 1) for file in source.files]
        self._counts_bytes = [counts_bytes(file) for file in source.files]
        self.size: int | None = None
        self._num_dropped: Counter[str] = Counter()  # only told where no example is left
        self._place: int
        self._num_examples: int
        self._records: Iterator[Record] | None = None
        self._file_options = self._options
        self._begin(0)

    def next(self) -> Conversation | None:
        """The next example; None when the pass is over, until `begin_pass` begins another.

        Raises:
            UserError: Faulty lines.
        """
        while not self._is_over():
            if self._records is None:
                self._open(self._file)
            assert self._records is not None
            record = next(self._records, None)
            self._faults.raise_if_any()
            if record is None:
                self._place, self._at, self._records = self._place + 1, START, None
                continue
            self._at = record.end
            conversation = next(convert([record], self._faults, self._file_options), None)
            self._faults.raise_if_any()
            if conversation is not None:
                self._num_examples += 1
                return conversation
        return None

    def begin_pass(self) -> None:
        """Begins the next pass over the files.

        Raises:
            UserError: The one that is over had not a single usable example.
        """
        if not self._num_examples:
            raise UserError(describe_no_example(self.source.name, self._faults))
        if not self._num_kept:
            raise UserError(
                f"{self.source.name}: none of the {self._num_examples:,} examples can be used{self._why_none()}"
            )
        self.size = self._num_kept
        self._begin(self.epoch + 1)

    def note_dropped(self, reason: str) -> None:
        """Counts an example that gave no sample."""
        self._num_dropped[reason] += 1

    def _why_none(self) -> str:
        return f" ({describe_reasons(self._num_dropped)}). {describe_remedies(self._num_dropped)}"

    def note_kept(self, num_samples: int) -> None:
        """Counts the samples that an example gave."""
        self._num_kept += num_samples

    def estimate_size(self) -> float | None:
        """Samples of a whole pass, by the share of the bytes that is read so far; None when there is none."""
        if self.size is not None:
            return self.size
        order, total = self._order, sum(self.num_bytes)
        done = sum(self.num_bytes[number] for number in order[: self._place])
        if self._place < len(order) and self._counts_bytes[order[self._place]]:
            done += self._at.offset
        share = done / total
        if self.source.max_samples and self._num_examples:
            share = max(share, self._num_examples / self.source.max_samples)
        return self._num_kept / share if share and self._num_kept else None

    def position(self) -> dict[str, Any]:
        """Where reading goes on, as JSON."""
        return {
            "epoch": self.epoch,
            "file": str(self._file) if self._place < len(self._order) else None,
            "place": self._place,
            "offset": self._at.offset,
            "line_number": self._at.line_number,
            "num_examples": self._num_examples,
            "num_kept": self._num_kept,
            "size": self.size,
        }

    def restore(self, position: Mapping[str, Any]) -> None:
        """Goes to where another reader of the same files was."""
        self._begin(int(position["epoch"]))
        self._place = int(position["place"])
        self._at = Position(int(position["offset"]), int(position["line_number"]))
        self._num_examples, self._num_kept = int(position["num_examples"]), int(position["num_kept"])
        self.size = position["size"]

    @property
    def _file(self) -> Path:
        return self.source.files[self._order[self._place]]

    def _is_over(self) -> bool:
        limit = self.source.max_samples
        return self._place == len(self._order) or (limit is not None and self._num_examples >= limit)

    def _begin(self, epoch: int) -> None:
        seed = np.random.SeedSequence([self._seed, _STREAM, epoch])
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(self.source.files))
        self._order: list[int] = order.tolist()
        self.epoch, self._place, self._at = epoch, 0, START
        self._num_examples = self._num_kept = 0
        self._records = None

    def _open(self, file: Path) -> None:
        options = self._options
        if options.dataset_format is None:
            self._file_options = replace(options, recognised_format=_recognise(file, options))
        self._records = read_file(file, self._faults, self._at, options)


def _recognise(file: Path, options: ReadOptions) -> str | None:
    """The format of a file as `formats.convert` finds it, whatever place reading goes on from."""
    records = read_file(file, FaultCollector(skip=True), options=options)
    while (first := next(records, None)) is not None:
        name = recognise([first], options)
        if name in (None, "text"):
            name = recognise([first, *islice(records, NUM_RECORDS_LOOKED_AT - 1)], options)
        if name is not None:
            return name
    return None
