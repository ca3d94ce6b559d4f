"""What preference methods train on: a prompt and its answers as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class PreferenceSample:
    """A prompt with the answers that are compared.

    Attributes:
        prompt_ids: int32 [P], P >= 1: what all answers follow.
        answers: int32 [A] each, A >= 1, with the end that the template teaches: the chosen one and the rejected
            one, or a single one that is good or bad (KTO).
        desirable: Whether the single answer is good; None for a pair.
        margin: By how much the chosen answer is better, for losses that ask; 0.0 where the data do not say.
        num_cut_prompt: Tokens that the prompt lost on its left.
        num_cut_answer: Tokens that all answers together lost at their ends.
        num_dropped_rounds: How many of the oldest rounds of the prompt were dropped.
    """

    prompt_ids: NDArray[Any]
    answers: tuple[NDArray[Any], ...]
    desirable: bool | None = None
    margin: float = 0.0
    num_cut_prompt: int = 0
    num_cut_answer: int = 0
    num_dropped_rounds: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that enter the model where the answers share their prompt; the last of each answer does not."""
        return len(self.prompt_ids) - 1 + sum(map(len, self.answers))


def find_partners(samples: Sequence[PreferenceSample]) -> NDArray[Any]:
    """For each sample another one whose answer does not belong to its prompt, as KTO's estimate of the KL needs.

    It is the nearest sample before it with another prompt; the search goes on from the last of all samples at the
    first, and where all prompts are equal, the partner is the sample before. It depends on the data alone, so every
    layout and batch size has the same. (Ethayarajh et al., "KTO", 2024, shift the answers of a batch by one.)

    Args:
        samples: The data set.

    Returns:
        int64 [samples], sample numbers.
    """
    prompts = [sample.prompt_ids.tobytes() for sample in samples]
    partners = np.arange(-1, len(samples) - 1, dtype=np.int64) % max(len(samples), 1)
    if len(set(prompts)) < 2:
        return partners
    for number, prompt in enumerate(prompts):
        before = number - 1
        # Of a run of equal prompts, each takes the partner of the one before it.
        if number and prompts[before] == prompt:
            partners[number] = partners[before]
            continue
        while prompts[before] == prompt:
            before -= 1
        partners[number] = before % len(samples)
    return partners


def hash_preferences(samples: Sequence[PreferenceSample]) -> str:
    """Hash over all that a loss sees of the samples, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for sample in samples:
        for ids in (sample.prompt_ids, *sample.answers):
            digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, np.int32).tobytes())
        digest.update(repr((sample.desirable, sample.margin)).encode())
    return digest.hexdigest()
