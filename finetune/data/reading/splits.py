"""From the data settings of a run to the conversations it trains and evaluates on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.reading.conversation import Conversation
from finetune.data.reading.formats import ReadOptions
from finetune.data.reading.mixing import DataSource, draw, hold_out, mix, read_sources
from finetune.data.reading.records import FaultCollector
from finetune.data.reading.self_cognition import make_self_cognition
from finetune.data.reading.source import find_split, find_splits
from finetune.models.hubs.repository import candidates
from finetune.settings.paths import split_paths

if TYPE_CHECKING:
    from finetune.settings.data import DataArguments


@dataclass
class Splits:
    """The conversations of a run; a split that it does not need is empty.

    Attributes:
        train: To train on.
        dev: To evaluate on.
        faults: What was skipped in reading, by split.
    """

    train: list[Conversation] = field(default_factory=list)
    dev: list[Conversation] = field(default_factory=list)
    faults: dict[str, FaultCollector] = field(default_factory=dict)


def find_sources(data: DataArguments, *, training: bool, evaluating: bool) -> dict[str, list[DataSource]]:
    """Finds the files of a run before anything expensive starts.

    Returns:
        Data sets by split. No "dev" means that evaluation data are held back from "train", or that the
        run needs none; nothing at all means the name of a built-in dataset.

    Raises:
        UserError: A split that the run needs is missing, or a path is unusable.
    """
    paths = split_paths(data.dataset_name_or_path) if data.dataset_name_or_path else []
    if not data.dataset_mix and len(paths) == 1 and not Path(paths[0]).exists() and not candidates(paths[0]):
        return {}
    sources: dict[str, list[DataSource]] = {}
    if evaluating:
        needed = not data.validation_split
        if data.dataset_mix and not paths:
            mixed = [os.path.expanduser(entry["path"]) for entry in data.dataset_mix]
            files = find_splits(mixed, "dev", required=needed)
        else:
            files = find_splits(paths, "dev", required=needed)
        if files:
            sources["dev"] = [DataSource(name="dev", files=tuple(files))]
    if training or (evaluating and "dev" not in sources):
        sources["train"] = _find_train(data, paths)
    return sources


def read_splits(
    data: DataArguments, sources: dict[str, list[DataSource]], *, seed: int, training: bool, evaluating: bool
) -> Splits:
    """Reads what `find_sources` found, draws, mixes and holds back.

    Args:
        data: The data settings.
        sources: The data sets by split.
        seed: Decides what is drawn.
        training: Whether the run trains.
        evaluating: Whether the run evaluates.

    Raises:
        UserError: Faulty lines, all of a split, or settings that leave no example.
    """
    splits = Splits()
    groups: list[list[Conversation]] = []
    holds_back = evaluating and "dev" not in sources and bool(data.validation_split)
    if training or holds_back:
        groups = _read(data, sources, "train", splits)
    if holds_back:
        groups, splits.dev = hold_out(groups, data.validation_split or 0, seed)
    elif evaluating:
        splits.dev = [each for group in _read(data, sources, "dev", splits) for each in group]
    splits.dev = _limit(splits.dev, data.max_eval_samples, f"{seed}:dev")
    if training:
        mixed = mix(groups, sources.get("train") or [DataSource(name="", files=())], seed)
        splits.train = _limit(mixed, data.max_train_samples, f"{seed}:train")
    if training and data.self_cognition_samples:
        splits.train += make_self_cognition(
            data.self_cognition_samples,
            data.model_name or "",
            data.model_author or "",
            seed=seed,
            file=data.self_cognition_file,
        )
    return splits


def _find_train(data: DataArguments, paths: Sequence[str]) -> list[DataSource]:
    if not data.dataset_mix:
        return [DataSource(name=path, files=tuple(find_split(path, "train"))) for path in paths]
    return [_find_entry(entry) for entry in data.dataset_mix]


def _find_entry(entry: dict[str, Any]) -> DataSource:
    files = find_split(os.path.expanduser(entry["path"]), "train")
    return DataSource(
        name=entry["path"],
        files=tuple(files),
        ratio=entry.get("ratio"),
        max_samples=entry.get("max_samples"),
    )


def _read(
    data: DataArguments, sources: dict[str, list[DataSource]], split: str, splits: Splits
) -> list[list[Conversation]]:
    if not sources:
        from finetune.data.reading.builtin import load_builtin

        return [load_builtin(str(data.dataset_name_or_path), data.task_name, split)]
    faults = splits.faults[split] = FaultCollector(skip=data.on_bad_line == "skip")
    options = ReadOptions(dataset_format=data.dataset_format, preference=data.preference)
    return read_sources(sources[split], options, faults)


def _limit(conversations: list[Conversation], most: int | None, seed: str) -> list[Conversation]:
    return conversations if most is None or most >= len(conversations) else draw(conversations, most, seed)
