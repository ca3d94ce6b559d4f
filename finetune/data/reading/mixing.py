"""Which examples a run uses: several data sets mixed, a part held back for evaluation, limits.

Everything that is drawn is drawn from the seed and the purpose alone, so the same files and settings give
the same examples in the same order. The order is that of the files; the sampler shuffles.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from finetune.data.reading.conversation import Conversation
from finetune.data.reading.formats import convert
from finetune.data.reading.no_examples import count_left_out, describe_no_example
from finetune.data.reading.read_options import ReadOptions
from finetune.data.reading.readers import read_file
from finetune.data.reading.records import FaultCollector
from finetune.errors import UserError

_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One data set of a mix.

    Attributes:
        name: What to call it in messages.
        files: Its files.
        ratio: Its weight in the mix; None uses each of its examples once.
        max_samples: Most examples of it that are drawn; None: all.
        options: How its files are read, where that is not as the others of a run.
    """

    name: str
    files: tuple[Path, ...]
    ratio: float | None = None
    max_samples: int | None = None
    options: ReadOptions | None = None


def read_sources(
    sources: Sequence[DataSource], options: ReadOptions, faults: FaultCollector
) -> list[list[Conversation]]:
    """Reads the files of each source.

    Raises:
        UserError: Faulty lines of all sources together, or a source without any example.
    """
    read: list[list[Conversation]] = []
    empty: list[str] = []
    for source in sources:
        before = count_left_out(faults)
        read.append(_read_source(source, options, faults))
        if not read[-1]:
            empty.append(describe_no_example(source.name, faults, before))
    faults.raise_if_any()
    if empty:
        raise UserError(empty)
    return read


def _read_source(source: DataSource, options: ReadOptions, faults: FaultCollector) -> list[Conversation]:
    options = source.options or options
    return [
        conversation
        for file in source.files
        for conversation in convert(read_file(file, faults, options=options), faults, options)
    ]


def mix(
    groups: Sequence[Sequence[Conversation]], sources: Sequence[DataSource], seed: int
) -> list[Conversation]:
    """Puts data sets together in the shares that their ratios ask for.

    An epoch has as many examples as all data sets together (after their max_samples). Each data set
    supplies its ratio's share of them: fewer than it has are drawn without repetition; more are all of
    it, again and again, and a draw for the rest.

    Args:
        groups: The examples of each source.
        sources: Their ratios and limits; all have a ratio, or none.
        seed: Decides what is drawn.
    """
    limited = [
        draw(group, min(source.max_samples or len(group), len(group)), f"{seed}:limit:{position}")
        for position, (group, source) in enumerate(zip(groups, sources, strict=True))
    ]
    ratios = [source.ratio for source in sources if source.ratio is not None]
    if len(ratios) < len(sources):
        return [conversation for group in limited for conversation in group]
    counts = share_out(sum(map(len, limited)), ratios)
    return [
        conversation
        for position, (group, count) in enumerate(zip(limited, counts, strict=True))
        for conversation in draw(group, count, f"{seed}:mix:{position}")
    ]


def share_out(total: int, ratios: Sequence[float]) -> list[int]:
    """Whole numbers that sum up to `total`, in the proportion of the ratios (largest remainders first)."""
    exact = [total * ratio / sum(ratios) for ratio in ratios]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(ratios)), key=lambda i: (counts[i] - exact[i], i))
    for position in by_remainder[: total - sum(counts)]:
        counts[position] += 1
    return counts


def draw(items: Sequence[_Item], count: int, seed: str) -> list[_Item]:
    """`count` of the items in their own order; each as often as any other, give or take one."""
    if not items:
        return []
    num_rounds, rest = divmod(count, len(items))
    chosen = sorted(random.Random(seed).sample(range(len(items)), rest))
    return list(items) * num_rounds + [items[index] for index in chosen]


def hold_out(
    groups: Sequence[Sequence[_Item]], split: float, seed: int
) -> tuple[list[list[_Item]], list[_Item]]:
    """Part examples into those to train on and those to evaluate on; each data set gives its share.

    Args:
        groups: The examples of each data set.
        split: A ratio below 1, or a count, of all of them.
        seed: Decides which.

    Returns:
        What is left of each group, and what is held back of all.

    Raises:
        UserError: Nothing would be left to train on, or nothing be held back.
    """
    total = sum(map(len, groups))
    count = round(total * split) if split < 1 else int(split)
    if not 0 < count < total:
        raise UserError(
            f"validation_split {split:g} of {total:,} examples holds back {count:,}, which leaves "
            f"{max(total - count, 0):,} to train on: both parts need at least one"
        )
    train: list[list[_Item]] = []
    held_back: list[_Item] = []
    for position, (group, share) in enumerate(
        zip(groups, share_out(count, list(map(len, groups))), strict=True)
    ):
        held = set(random.Random(f"{seed}:validation:{position}").sample(range(len(group)), share))
        train.append([item for index, item in enumerate(group) if index not in held])
        held_back += [group[index] for index in sorted(held)]
    return train, held_back
