"""Preference samples as rows: answers to one prompt share it, or stand apart.

A pair that shares its prompt has three segments, and its labels are those of any other row, because the last token of
the prompt, which predicts the first of an answer, begins each branch::

    input       p0 p1   p2 c0 c1   p2 r0        prompt p0 p1 p2, chosen c0 c1 c2, rejected r0 r1
    label        .  .   c0 c1 c2   r0 r1
    position     0  1    2  3  4    2  3
    segment      trunk   chosen     rejected

Both branches see the trunk and themselves, never each other, so every logit is that of a row which holds the prompt
and one answer alone. Where nothing keeps segments apart (no mask), each answer has a row of its own.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune.data.batches.collate import start_end_rows
from finetune.data.batches.rows import Batch
from finetune.data.packing.packing import Packing
from finetune.data.preference.sample import PreferenceSample, hash_preferences
from finetune.data.samples.tokenize import IGNORE_INDEX

MASKS = ("block", "start_end", None)


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch(Batch):
    """One forward pass over groups of answers, which are numbered from 0 in the order of the groups.

    Attributes:
        answer_of_label: int32 [labels], for each label in row-major order the number of its answer; -1 for a token
            of a prompt.
        num_answers: Answers in this batch.
        groups: For each sample its answers: (chosen, rejected), (answer,), or (answer, answer of the partner).
        sample_indices: int64 [groups], which samples they are.
        desirable: bool [groups] where single answers are good or bad, None for pairs.
        margins: float32 [groups].
        answer_lengths: int32 [answers], tokens of each with its end; each token has one label.
        num_groups: What the loss is divided by; 0 in a batch that counts nothing.
    """

    answer_of_label: NDArray[Any]
    num_answers: int
    groups: tuple[tuple[int, ...], ...]
    sample_indices: NDArray[Any]
    desirable: NDArray[Any] | None
    margins: NDArray[Any]
    answer_lengths: NDArray[Any]
    num_groups: int

    def idle(self) -> PreferenceBatch:
        """This batch as one that counts nothing, for a rank that has no samples of its own left."""
        return replace(self, num_tokens=0, num_label_tokens=0, num_groups=0, weight=0.0)


class Segment(NamedTuple):
    """Tokens that stand together in a row.

    Attributes:
        input_ids: int32 [T].
        labels: int32 [T].
        answers: int32 [T], the answer that each label belongs to, -1 for none.
        position: Of the first token.
        starts: How many segments earlier its trunk is; 0 for one that begins anew.
    """

    input_ids: NDArray[Any]
    labels: NDArray[Any]
    answers: NDArray[Any]
    position: int
    starts: int


Row = list[Segment]


class PreferenceRows:
    """Groups of answers as rows; a unit is a group, or a bin of groups.

    Args:
        samples: The data set, all pairs or all single answers.
        pad_token_id: Fills rows.
        packing: Which groups share a row; None: none do. Needs a mask.
        pad_to_multiple_of: Rounds row lengths up, or None.
        mask: "block" (dense) or "start_end" (for flash-mask attention) where answers share their prompt; None
            where each has a row of its own.
        partners: int64 [samples], for single answers the samples whose answers are compared with each prompt as
            well, see `finetune.data.preference.sample.find_partners`; None for no such comparison.
        learns_prompts: Whether the tokens of prompts have labels too, each once in its group (ORPO).
    """

    def __init__(
        self,
        samples: Sequence[PreferenceSample],
        *,
        pad_token_id: int,
        packing: Packing | None = None,
        pad_to_multiple_of: int | None = None,
        mask: str | None = "block",
        partners: NDArray[Any] | None = None,
        learns_prompts: bool = False,
    ):
        if mask not in MASKS:
            raise ValueError(f"mask is {mask!r}, expected one of {MASKS}")
        if mask is None and packing is not None:
            raise ValueError("rows of several groups need a mask")
        self.samples, self.packing, self.partners = samples, packing, partners
        self._mask, self._learns_prompts = mask, learns_prompts
        self._pad_token_id, self._multiple = pad_token_id, pad_to_multiple_of or 1

    def __len__(self) -> int:
        return len(self.samples if self.packing is None else self.packing)

    @property
    def shares_prompts(self) -> bool:
        """Whether the answers of a group stand behind one prompt."""
        return self._mask is not None

    @functools.cached_property
    def lengths(self) -> NDArray[Any]:
        """int64 [units], tokens of each unit that enter the model."""
        if self.packing is not None:
            return self.packing.num_bin_tokens
        return group_lengths(self.samples, partners=self.partners, shares_prompt=self._mask is not None)

    def sample_numbers(self, indices: NDArray[Any]) -> list[int]:
        """The samples of some units."""
        if self.packing is None:
            return [int(index) for index in indices]
        return [int(number) for index in indices for number in self.packing[int(index)]]

    def count_groups(self, indices: NDArray[Any]) -> int:
        """Groups of some units, which a loss is divided by."""
        return len(self.sample_numbers(indices))

    def count_label_tokens(self, indices: NDArray[Any]) -> int:
        """Labels of some units that are not IGNORE_INDEX."""
        total = 0
        for number in self.sample_numbers(indices):
            total += sum(map(len, self._answers(number)))
            if self._learns_prompts:
                total += len(self.samples[number].prompt_ids) - 1
        return total

    def count_learned_tokens(self, indices: NDArray[Any]) -> int:
        """Tokens of some units that a likelihood beside the preference counts: chosen answers, and prompts if learned."""
        samples = [self.samples[number] for number in self.sample_numbers(indices)]
        total = sum(len(sample.answers[0]) for sample in samples)
        return total + (sum(len(sample.prompt_ids) - 1 for sample in samples) if self._learns_prompts else 0)

    def fingerprint(self) -> str:
        """Changes when the samples do."""
        digest = hashlib.blake2b(hash_preferences(self.samples).encode(), digest_size=16)
        if self.partners is not None:
            digest.update(np.asarray(self.partners, np.int64).tobytes())
        return digest.hexdigest()

    def batch(self, indices: NDArray[Any]) -> PreferenceBatch:
        """The rows of some units."""
        groups: list[tuple[int, ...]] = []
        lengths: list[int] = []
        rows: list[Row] = []
        counted: list[list[tuple[int, int]]] = []
        for index in indices:
            unit: list[Row] = []
            of_unit: list[list[tuple[int, int]]] = []
            for number in self.sample_numbers(np.array([index])):
                answers = self._answers(number)
                group = tuple(range(len(lengths), len(lengths) + len(answers)))
                groups.append(group)
                lengths += map(len, answers)
                unit += (made := self._group_rows(number, answers, group[0]))
                of_unit += [[(sum(len(part.labels) for part in row), number)] for row in made]
            if self._mask is not None:  # all groups of a unit in one row
                unit = [[segment for row in unit for segment in row]]
                of_unit = [[counts for row in of_unit for counts in row]]
            rows += unit
            counted += of_unit
        numbers = self.sample_numbers(indices)
        chosen = [self.samples[number] for number in numbers]
        answer_of_label = np.concatenate(
            [part.answers[part.labels != IGNORE_INDEX] for row in rows for part in row]
        )
        has_marks = chosen[0].desirable is not None
        return PreferenceBatch(
            **self._collate(rows),
            segments=counted,
            num_tokens=sum(tokens for row in counted for tokens, _ in row),
            num_label_tokens=len(answer_of_label),
            answer_of_label=answer_of_label.astype(np.int32),
            num_answers=len(lengths),
            groups=tuple(groups),
            sample_indices=np.array(numbers, dtype=np.int64),
            desirable=np.array([each.desirable for each in chosen], dtype=bool) if has_marks else None,
            margins=np.array([each.margin for each in chosen], dtype=np.float32),
            answer_lengths=np.array(lengths, dtype=np.int32),
            num_groups=len(groups),
        )

    def _answers(self, number: int) -> tuple[NDArray[Any], ...]:
        answers = self.samples[number].answers
        if self.partners is None:
            return answers
        return (*answers, self.samples[int(self.partners[number])].answers[0])

    def _group_rows(self, number: int, answers: Sequence[NDArray[Any]], first: int) -> list[Row]:
        """One row of trunk and branches, or one of prompt and answer for each answer."""
        prompt = self.samples[number].prompt_ids
        labels = prompt[1:] if self._learns_prompts else np.full(len(prompt) - 1, IGNORE_INDEX, np.int32)
        unlearned = np.full(len(prompt) - 1, IGNORE_INDEX, np.int32)
        none = np.full(len(prompt) - 1, -1, np.int32)
        if self._mask is not None and len(answers) > 1:
            row = [Segment(prompt[:-1], labels, none, 0, 0)]
            for place, answer in enumerate(answers):
                ids = np.concatenate([prompt[-1:], answer[:-1]])
                own = np.full(len(answer), first + place, np.int32)
                row.append(Segment(ids, answer, own, len(prompt) - 1, place + 1))
            return [row]
        return [
            [
                Segment(
                    np.concatenate([prompt, answer[:-1]]),
                    np.concatenate([unlearned if place else labels, answer]),
                    np.concatenate([none, np.full(len(answer), first + place, np.int32)]),
                    0,
                    0,
                )
            ]
            for place, answer in enumerate(answers)
        ]

    def _collate(self, rows: list[Row]) -> dict[str, Any]:
        """Inputs, labels and what a mask is made of."""
        sizes = [[len(part.labels) for part in row] for row in rows]
        row_length = -(-max(map(sum, sizes)) // self._multiple) * self._multiple
        shape = len(rows), row_length
        input_ids = np.full(shape, self._pad_token_id, np.int64)  # [B, L]
        labels = np.full(shape, IGNORE_INDEX, np.int64)  # [B, L]
        positions = np.zeros(shape, np.int64)  # [B, L]
        segment_lengths = np.zeros((len(rows), max(map(len, rows))), np.int32)  # [B, S]
        trunks = np.tile(np.arange(segment_lengths.shape[1], dtype=np.int32), (len(rows), 1))  # [B, S]
        for number, row in enumerate(rows):
            start = 0
            for place, part in enumerate(row):
                stop = start + len(part.labels)
                input_ids[number, start:stop], labels[number, start:stop] = part.input_ids, part.labels
                positions[number, start:stop] = part.position + np.arange(stop - start)
                segment_lengths[number, place] = stop - start
                trunks[number, place] -= part.starts
                start = stop
        arrays: dict[str, Any] = {"inputs": {"input_ids": input_ids}, "labels": labels}
        if self._needs_mask(segment_lengths):
            arrays["inputs"]["position_ids"] = positions
            if self._mask == "start_end":
                arrays["inputs"]["attn_mask_startend_row_indices"] = start_end_rows(
                    list(segment_lengths), row_length, trunks
                )
            else:
                arrays |= {"mask_segments": segment_lengths, "mask_trunks": trunks}
        return arrays

    def _needs_mask(self, segment_lengths: NDArray[Any]) -> bool:
        """Whether rows may hold more than one segment; the same for all batches of a run."""
        if self.packing is not None:
            return True
        return self._mask is not None and segment_lengths.shape[1] > 1


def group_lengths(
    samples: Sequence[PreferenceSample],
    *,
    partners: NDArray[Any] | None = None,
    shares_prompt: bool = True,
    reads_ends: bool = False,
) -> NDArray[Any]:
    """Tokens of each group that enter the model, for `finetune.data.packing.packing.pack`.

    Args:
        samples: The data set.
        partners: As for `PreferenceRows`.
        shares_prompt: Whether its answers stand behind one prompt, or each behind its own.
        reads_ends: Whether the last token of each answer enters the model.

    Returns:
        int64 [samples].
    """
    lengths = []
    for number, sample in enumerate(samples):
        answers = [len(answer) for answer in sample.answers]
        if partners is not None:
            answers.append(len(samples[int(partners[number])].answers[0]))
        num_prompts = 1 if shares_prompt else len(answers)
        lengths.append((len(sample.prompt_ids) - 1 + reads_ends) * num_prompts + sum(answers))
    return np.array(lengths, dtype=np.int64)
