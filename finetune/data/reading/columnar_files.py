"""Parquet and Arrow files, a batch of rows at a time. Their lines are rows, counted from 1."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data.reading.records import FaultCollector, Position, Record
from finetune.storage.files import open_file

SUFFIXES = (".parquet", ".arrow")
_BATCH_ROWS = 256
_SHOWN_CHARACTERS = 80


def read_columnar(file: Path, faults: FaultCollector, start: Position) -> Iterator[Record]:
    """Reads the rows of a file.

    Raises:
        UserError: The file cannot be read.
    """
    import pyarrow

    number = 0
    try:
        for batch in _read_batches(file):
            if number + batch.num_rows <= start.offset:
                number += batch.num_rows
                continue
            for fields in batch.to_pylist():
                number += 1
                if number > start.offset:
                    fields = {name: _plain(value) for name, value in fields.items()}
                    raw = str(fields)[:_SHOWN_CHARACTERS]
                    yield Record(file, number, fields, raw, Position(number, number))
    except pyarrow.ArrowException as error:
        reason = str(error).partition("\n")[0][:200]
        faults.add_file(f"{file}:{number + 1}: not usable as a {file.suffix.lower()} file ({reason})")


def _read_batches(file: Path) -> Iterator[Any]:
    """Record batches of a Parquet file, or of an Arrow file in its stream or its file format."""
    import pyarrow

    with open_file(file) as stream:  # refuses what is no file
        is_file_format = stream.read(6) == b"ARROW1"
    if file.suffix.lower() == ".parquet":
        from pyarrow import parquet

        with parquet.ParquetFile(file) as table:
            yield from table.iter_batches(batch_size=_BATCH_ROWS)
        return
    with pyarrow.memory_map(str(file)) as source:
        if is_file_format:
            with pyarrow.ipc.open_file(source) as reader:
                yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            with pyarrow.ipc.open_stream(source) as reader:
                yield from reader


def _plain(value: Any) -> Any:
    """The value as JSON would have it; dates and decimal numbers become text."""
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    return value
