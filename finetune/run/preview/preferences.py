"""Preference data on the screen: a prompt, and below it the answers that are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finetune.data.batches.preference_rows import group_lengths
from finetune.data.packing.packing import pack
from finetune.data.preference.sample import PreferenceSample, find_partners
from finetune.run.preview.tables import Figures, count_repeated
from finetune.run.preview.tokens import Example, TokenReader, print_example, uses_marks

if TYPE_CHECKING:
    from rich.console import Console


def print_preferences(console: Console, samples: Sequence[PreferenceSample], reader: TokenReader) -> None:
    """Prints samples: the prompt, then each answer.

    Args:
        console: Where to; colours are used when it has them.
        samples: What to show.
        reader: Makes ids readable.
    """
    from rich.text import Text

    how = ("in [[ ]]", "") if uses_marks(console) else ("green", "green")
    console.print(
        Text.assemble("The answers that are compared are ", how, "; below each token stands its id.")
    )
    for number, sample in enumerate(samples, start=1):
        for title, example in _parts(sample, number):
            print_example(console, title, example, reader)


def _parts(sample: PreferenceSample, number: int) -> Iterator[tuple[str, Example]]:
    """The prompt and the answers of a sample with their titles."""
    notes = [f"{sample.num_cut_prompt:,} tokens of the prompt cut"] * bool(sample.num_cut_prompt)
    if sample.num_dropped_rounds:
        plural = "s" if sample.num_dropped_rounds > 1 else ""
        notes.append(f"{sample.num_dropped_rounds} old round{plural} left out")
    if sample.num_cut_answer:
        notes.append(f"{sample.num_cut_answer:,} tokens of the answers cut")
    if sample.margin:
        notes.append(f"margin {sample.margin:g}")
    kind = "Pair" if sample.desirable is None else "Sample"
    prompt = sample.prompt_ids.tolist()
    yield (
        f"{kind} {number}: prompt",
        Example(ids=prompt, learned=[False] * len(prompt), notes=tuple(notes)),
    )
    titles = (
        ("chosen", "rejected")
        if sample.desirable is None
        else ("good answer" if sample.desirable else "bad answer",)
    )
    for title, answer in zip(titles, sample.answers, strict=True):
        yield f"{kind} {number}: {title}", Example(ids=answer.tolist(), learned=[True] * len(answer))


def count_preferences(
    samples: Sequence[PreferenceSample], *, pack_to: int | None, seed: int, reads_ends: bool = False
) -> Figures:
    """Figures of samples.

    Args:
        samples: All of a split.
        pack_to: Tokens of a packed row; None: prompts do not share rows.
        seed: Decides the packing, as in a run.
        reads_ends: Whether the last token of each answer enters the model, as in a reward model.
    """
    partners = None if samples[0].desirable is None else find_partners(samples)
    lengths = group_lengths(samples, partners=partners, reads_ends=reads_ends)
    return Figures(
        lengths=lengths,
        num_duplicates=count_repeated([_end_marked(sample) for sample in samples]),
        packing=None if pack_to is None else pack(lengths, max(pack_to, int(lengths.max())), seed=seed),
        more=tuple(_describe_answers(samples)),
    )


def _end_marked(sample: PreferenceSample) -> tuple[NDArray[Any], ...]:
    """The texts of a sample, each with its length in front, so that no two samples look alike by chance."""
    texts = (sample.prompt_ids, *sample.answers)
    return tuple(part for text in texts for part in (np.array([len(text)], np.int32), text))


def _describe_answers(samples: Sequence[PreferenceSample]) -> Iterator[tuple[str, str, str]]:
    """How many answers there are of each kind, and how long they are: many methods favour the longer kind."""
    if samples[0].desirable is None:
        kinds = [
            ("chosen answers", [sample.answers[0] for sample in samples]),
            ("rejected answers", [sample.answers[1] for sample in samples]),
        ]
    else:
        kinds = [
            (name, [sample.answers[0] for sample in samples if sample.desirable is good])
            for name, good in (("good answers", True), ("bad answers", False))
        ]
    for name, answers in kinds:
        mean = sum(map(len, answers)) / max(len(answers), 1)
        yield name, f"{len(answers):,}", f"{mean:,.1f} tokens each, on average"
