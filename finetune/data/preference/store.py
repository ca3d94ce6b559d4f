"""The preference samples of a split in a few flat arrays, as the cache keeps them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, overload

import numpy as np
from numpy.typing import NDArray

from finetune.data.preference.sample import PreferenceSample

_UNMARKED = -1


class PreferenceStore(Sequence[PreferenceSample]):
    """Preference samples, as a sequence.

    Attributes:
        tokens: int32 [T]: of each sample the prompt, then its answers.
        offsets: int64 [texts + 1], where each prompt and each answer begins.
        desirable: int8 [samples], 1 good, 0 bad, -1 for pairs.
        margins: float64 [samples].
        cuts: int32 [samples, 3]: tokens cut from prompt and from answers, and rounds dropped; kept flat.
    """

    NAMES: ClassVar[tuple[str, ...]] = ("tokens", "offsets", "desirable", "margins", "cuts")

    def __init__(self, arrays: Mapping[str, NDArray[Any]]):
        self.tokens, self.offsets = arrays["tokens"], arrays["offsets"]
        self.desirable, self.margins = arrays["desirable"], arrays["margins"]
        self.cuts = arrays["cuts"].reshape(-1, 3)

    @classmethod
    def of(cls, samples: Sequence[PreferenceSample]) -> PreferenceStore:
        """Lays samples end to end; all have as many answers as the first."""
        texts = [ids for sample in samples for ids in (sample.prompt_ids, *sample.answers)]
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        marks = [_UNMARKED if each.desirable is None else int(each.desirable) for each in samples]
        cuts = [[each.num_cut_prompt, each.num_cut_answer, each.num_dropped_rounds] for each in samples]
        return cls(
            {
                "tokens": np.concatenate([np.zeros(0, np.int32), *texts]),
                "offsets": np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
                "desirable": np.array(marks, dtype=np.int8),
                "margins": np.array([each.margin for each in samples], dtype=np.float64),
                "cuts": np.array(cuts, dtype=np.int32).ravel(),
            }
        )

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """All there is, by name."""
        return {name: np.ravel(getattr(self, name)) for name in self.NAMES}

    def __len__(self) -> int:
        return len(self.desirable)

    @overload
    def __getitem__(self, index: int) -> PreferenceSample: ...

    @overload
    def __getitem__(self, index: slice) -> list[PreferenceSample]: ...

    def __getitem__(self, index: int | slice) -> PreferenceSample | list[PreferenceSample]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        index = range(len(self))[index]
        num_texts = (len(self.offsets) - 1) // len(self)
        bounds = self.offsets[index * num_texts : (index + 1) * num_texts + 1].tolist()
        prompt, *answers = (np.array(self.tokens[start:stop]) for start, stop in itertools.pairwise(bounds))
        mark = int(self.desirable[index])
        cut_prompt, cut_answer, dropped = self.cuts[index].tolist()
        return PreferenceSample(
            prompt,
            tuple(answers),
            None if mark == _UNMARKED else bool(mark),
            float(self.margins[index]),
            num_cut_prompt=cut_prompt,
            num_cut_answer=cut_answer,
            num_dropped_rounds=dropped,
        )
