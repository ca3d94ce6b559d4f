"""Pairs of answers as rows for a reward model, which reads each answer at its last token.

Unlike the rows of other preference methods (`preference_rows`) these hold the last token of every answer, and the one
label of an answer stands there::

    input       p0 p1 p2   c0 c1 c2   r0 r1
    label        .  .  .    .  . c2    . r1
    position     0  1  2    3  4  5    3  4
    segment      trunk      chosen     rejected

A label says where the value is read; which token it is does not matter.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.batches.preference_rows import PreferenceRows, Segment, group_lengths
from finetune.data.samples.tokenize import IGNORE_INDEX


class RewardRows(PreferenceRows):
    """Pairs as rows; see `PreferenceRows`, all of whose arguments but those about likelihoods it takes."""

    @functools.cached_property
    def lengths(self) -> NDArray[Any]:
        """int64 [units], tokens of each unit that enter the model."""
        if self.packing is not None:
            return self.packing.num_bin_tokens
        return group_lengths(self.samples, shares_prompt=self.shares_prompts, reads_ends=True)

    def count_label_tokens(self, indices: NDArray[Any]) -> int:
        """Values that are read of some units: one for each answer."""
        return sum(len(self.samples[number].answers) for number in self.sample_numbers(indices))

    def _group_rows(self, number: int, answers: Sequence[NDArray[Any]], first: int) -> list[list[Segment]]:
        """One row of trunk and branches, or one of prompt and answer for each answer."""
        prompt = self.samples[number].prompt_ids
        if not self.shares_prompts:
            return [
                [_read_at_end(np.concatenate([prompt, answer]), first + place, position=0, starts=0)]
                for place, answer in enumerate(answers)
            ]
        nothing = np.full(len(prompt), IGNORE_INDEX, np.int32)
        trunk = Segment(prompt, nothing, np.full(len(prompt), -1, np.int32), 0, 0)
        branches = [
            _read_at_end(answer, first + place, position=len(prompt), starts=place + 1)
            for place, answer in enumerate(answers)
        ]
        return [[trunk, *branches]]


def _read_at_end(ids: NDArray[Any], answer: int, *, position: int, starts: int) -> Segment:
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    labels[-1] = ids[-1]
    return Segment(ids, labels, np.full(len(ids), answer, np.int32), position, starts)
