"""Where a stream stands: a small JSON part for people and machines, and arrays for the samples it holds."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.samples.tokenize import IGNORE_INDEX, Sample
from finetune.storage.files import write_atomically

ARRAYS_FILE = "data_stream.npz"

Numbered = tuple[int, Sample]
"""A sample that has left the shuffle buffer, with its running number."""


@dataclass(frozen=True)
class StreamState:
    """All that the next units depend on.

    Attributes:
        position: JSON: where each file is, counters, what the stream was made with.
        buffer: The shuffle buffer.
        ahead: Samples that were made together with others and are not in the buffer yet.
        window: Samples that wait to be packed.
        bins: Samples that are packed, the bin to come next at the end.
    """

    position: dict[str, Any]
    buffer: Sequence[Sample]
    ahead: Sequence[Sample]
    window: Sequence[Numbered]
    bins: Sequence[Sequence[Numbered]]

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """The samples as flat arrays.

        Returns:
            ``input_ids`` and ``labels`` int32 [tokens] and ``lengths`` int32 [samples] of buffer, samples ahead,
            window and bins in this order; ``numbers`` int64 of window and bins; ``num_buffered``, ``num_ahead`` and
            ``num_waiting`` int64 [1];
            ``bin_sizes`` int64 [bins].
        """
        packed = [pair for row in self.bins for pair in row]
        numbered = [*self.window, *packed]
        samples = [*self.buffer, *self.ahead, *(sample for _, sample in numbered)]
        empty = np.empty(0, dtype=np.int32)
        return {
            "input_ids": np.concatenate([empty, *(sample.input_ids for sample in samples)]),
            "labels": np.concatenate([empty, *(sample.labels for sample in samples)]),
            "lengths": np.array([len(sample.input_ids) for sample in samples], dtype=np.int32),
            "numbers": np.array([number for number, _ in numbered], dtype=np.int64),
            "num_buffered": np.array([len(self.buffer)], dtype=np.int64),
            "num_ahead": np.array([len(self.ahead)], dtype=np.int64),
            "num_waiting": np.array([len(self.window)], dtype=np.int64),
            "bin_sizes": np.array([len(row) for row in self.bins], dtype=np.int64),
        }

    @classmethod
    def from_arrays(cls, position: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> StreamState:
        """The state that `to_arrays` was asked of."""
        ends = np.cumsum(arrays["lengths"])[:-1]
        samples = [
            _make_sample(ids, labels)
            for ids, labels in zip(
                np.split(arrays["input_ids"], ends), np.split(arrays["labels"], ends), strict=True
            )
            if len(ids)
        ]
        num_buffered, num_waiting = int(arrays["num_buffered"][0]), int(arrays["num_waiting"][0])
        first = num_buffered + int(arrays["num_ahead"][0])
        numbered = list(zip(arrays["numbers"].tolist(), samples[first:], strict=True))
        rows, start = [], num_waiting
        for size in arrays["bin_sizes"].tolist():
            rows.append(numbered[start : start + size])
            start += size
        buffer, ahead = samples[:num_buffered], samples[num_buffered:first]
        return cls(position, buffer, ahead, numbered[:num_waiting], rows)


def save_arrays(folder: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Writes `ARRAYS_FILE` into a folder."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(folder / ARRAYS_FILE, content.getvalue())


def load_arrays(folder: Path) -> dict[str, NDArray[Any]]:
    """Reads what `save_arrays` wrote."""
    with np.load(folder / ARRAYS_FILE, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _make_sample(input_ids: NDArray[Any], labels: NDArray[Any]) -> Sample:
    # Copies: a view would keep the arrays of the whole state alive as long as one sample is held.
    return Sample(
        input_ids=input_ids.copy(),
        labels=labels.copy(),
        num_label_tokens=int(np.count_nonzero(labels != IGNORE_INDEX)),
        truncated_source=False,
        truncated_target=False,
    )
