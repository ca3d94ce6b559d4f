"""The samples of a split in a few flat arrays, five bytes a token.

A Python object and two arrays for each sample would take more room than the tokens. Here sample s has the
tokens ``tokens[offsets[s]:offsets[s + 1]]``, before the shift, and one flag for each that says whether it is
learned; a `Sample` is made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, overload

import numpy as np
from numpy.typing import NDArray

from finetune.data.samples.cutting import CutSample
from finetune.data.samples.parts import join_ids
from finetune.data.samples.tokenize import IGNORE_INDEX, Sample

CUT_SOURCE, CUT_TARGET = 1, 2


class SampleStore(Sequence[Sample]):
    """Samples, as a sequence.

    Attributes:
        tokens: int32 [T], all tokens.
        learned: bool [T], whether a token is learned; never the first of a sample.
        offsets: int64 [samples + 1].
        cuts: uint8 [samples], `CUT_SOURCE` and `CUT_TARGET` as bits.
        dropped_rounds: int32 [samples].
    """

    NAMES: ClassVar[tuple[str, ...]] = ("tokens", "learned", "offsets", "cuts", "dropped_rounds")

    def __init__(self, arrays: Mapping[str, NDArray[Any]]):
        self.tokens, self.learned = arrays["tokens"], arrays["learned"]
        self.offsets, self.cuts = arrays["offsets"], arrays["cuts"]
        self.dropped_rounds = arrays["dropped_rounds"]

    @classmethod
    def from_cut(cls, samples: Sequence[CutSample]) -> SampleStore:
        """Lays samples end to end."""
        ids = [ids for sample in samples for ids, _ in sample.parts]
        flags = np.array([learned for sample in samples for _, learned in sample.parts], dtype=bool)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        learned = np.repeat(flags, lengths)
        last_parts = np.cumsum([len(sample.parts) for sample in samples], dtype=np.int64) - 1
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)[last_parts]])
        learned[offsets[:-1]] = False
        cuts = [CUT_SOURCE * each.truncated_source + CUT_TARGET * each.truncated_target for each in samples]
        return cls(
            {
                "tokens": join_ids(ids),
                "learned": learned,
                "offsets": offsets,
                "cuts": np.array(cuts, dtype=np.uint8),
                "dropped_rounds": np.array([each.num_dropped_rounds for each in samples], dtype=np.int32),
            }
        )

    @classmethod
    def join(cls, parts: Iterable[SampleStore]) -> SampleStore:
        """The samples of several stores, in order."""
        parts = list(parts)
        sizes = [np.zeros(1, np.int64), *(np.diff(part.offsets) for part in parts)]
        return cls(
            {
                "tokens": np.concatenate([np.zeros(0, np.int32), *(part.tokens for part in parts)]),
                "learned": np.concatenate([np.zeros(0, bool), *(part.learned for part in parts)]),
                "offsets": np.cumsum(np.concatenate(sizes)),
                "cuts": np.concatenate([np.zeros(0, np.uint8), *(part.cuts for part in parts)]),
                "dropped_rounds": np.concatenate(
                    [np.zeros(0, np.int32), *(part.dropped_rounds for part in parts)]
                ),
            }
        )

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """All there is, by name."""
        return {name: getattr(self, name) for name in self.NAMES}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        index = range(len(self))[index]
        start, stop = int(self.offsets[index]), int(self.offsets[index + 1])
        tokens, learned = self.tokens[start:stop], self.learned[start + 1 : stop]
        return Sample(
            input_ids=np.array(tokens[:-1]),
            labels=np.where(learned, tokens[1:], np.int32(IGNORE_INDEX)),
            num_label_tokens=int(np.count_nonzero(learned)),
            truncated_source=bool(self.cuts[index] & CUT_SOURCE),
            truncated_target=bool(self.cuts[index] & CUT_TARGET),
            num_dropped_rounds=int(self.dropped_rounds[index]),
        )

    @property
    def lengths(self) -> NDArray[Any]:
        """int64 [samples], tokens of each sample that enter the model."""
        return np.diff(self.offsets) - 1

    @property
    def num_label_tokens(self) -> int:
        """Tokens of all samples that carry a label."""
        return int(np.count_nonzero(self.learned))


def count_label_tokens(samples: Sequence[Sample], indices: Iterable[int]) -> int:
    """Tokens of some samples that carry a label; of a `SampleStore` no sample is made for it."""
    if not isinstance(samples, SampleStore):
        return sum(samples[int(index)].num_label_tokens for index in indices)
    offsets, learned = samples.offsets, samples.learned
    parts = (learned[offsets[index] + 1 : offsets[index + 1]] for index in indices)
    return sum(int(np.count_nonzero(part)) for part in parts)


def sample_lengths(samples: Sequence[Sample]) -> NDArray[Any]:
    """int64 [samples], tokens of each sample that enter the model; no sample is made for it."""
    if isinstance(samples, SampleStore):
        return samples.lengths
    return np.array([len(sample.input_ids) for sample in samples], dtype=np.int64)
