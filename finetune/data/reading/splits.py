"""From the data settings of a run to the conversations it trains and evaluates on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.reading.conversation import Conversation
from finetune.data.reading.mixing import DataSource, draw, hold_out, mix, read_sources
from finetune.data.reading.read_options import ReadOptions
from finetune.data.reading.records import FaultCollector
from finetune.data.reading.registered import make_source
from finetune.data.reading.self_cognition import make_self_cognition
from finetune.data.reading.source import find_evaluation_files, find_split, find_splits
from finetune.errors import UserError
from finetune.models.hubs.repository import candidates
from finetune.settings.dataset_registry import REGISTRY_FILE, find_entry
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
    if _is_builtin(data, paths):
        return _find_evaluation(data) if evaluating and data.eval_dataset else {}
    sources: dict[str, list[DataSource]] = {}
    if evaluating and data.eval_dataset:
        sources = _find_evaluation(data)
    elif evaluating:
        mixed = [os.path.expanduser(entry["path"]) for entry in data.dataset_mix or () if not paths]
        known = [path for path in paths or mixed if find_entry(path, data.dataset_dir) is None]
        files = find_splits(known, "dev", required=bool(known) and not data.validation_split)
        if files:
            sources["dev"] = [DataSource(name="dev", files=tuple(files))]
        elif not data.validation_split:
            raise UserError(
                f"{', '.join(paths)}: a data set of {REGISTRY_FILE} has no dev split. Set validation_split to hold "
                "back a part of it, or eval_dataset to a file or folder."
            )
    if training or (evaluating and "dev" not in sources):
        sources["train"] = _find_train(data, paths)
    return sources


def make_options(data: DataArguments, comparison: str | None = None) -> ReadOptions:
    """How the files of a run are read."""
    return ReadOptions(
        dataset_format=data.dataset_format,
        preference=data.preference,
        comparison=comparison,
        columns=data.columns or {},
        encoding=data.encoding,
        text_document=data.text_document,
    )


def read_splits(
    data: DataArguments,
    sources: dict[str, list[DataSource]],
    *,
    seed: int,
    training: bool,
    evaluating: bool,
    comparison: str | None = None,
) -> Splits:
    """Reads what `find_sources` found, draws, mixes and holds back.

    Args:
        data: The data settings.
        sources: The data sets by split.
        seed: Decides what is drawn.
        training: Whether the run trains.
        evaluating: Whether the run evaluates.
        comparison: "pairs" or "marked", what a preference method compares; None for supervised training.

    Raises:
        UserError: Faulty lines, all of a split, or settings that leave no example.
    """
    splits = Splits()
    groups: list[list[Conversation]] = []
    holds_back = evaluating and "dev" not in sources and bool(data.validation_split)
    if training or holds_back:
        groups = _read(data, sources, "train", splits, comparison)
    if holds_back:
        # What one record gives stays together: a prompt whose other answer was trained on is not held back.
        records, held_back = hold_out(
            [_by_record(group) for group in groups], data.validation_split or 0, seed
        )
        groups = [[each for record in group for each in record] for group in records]
        splits.dev = [each for record in held_back for each in record]
    elif evaluating:
        splits.dev = [each for group in _read(data, sources, "dev", splits, comparison) for each in group]
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


def _is_builtin(data: DataArguments, paths: Sequence[str]) -> bool:
    """Whether the one name that is given is neither a path nor in a registry."""
    if data.dataset_mix or len(paths) != 1 or Path(paths[0]).exists() or candidates(paths[0]):
        return False
    return find_entry(paths[0], data.dataset_dir) is None


def _find_evaluation(data: DataArguments) -> dict[str, list[DataSource]]:
    files = [file for path in split_paths(data.eval_dataset or "") for file in find_evaluation_files(path)]
    return {"dev": [DataSource(name="eval_dataset", files=tuple(files))]}


def _find_train(data: DataArguments, paths: Sequence[str]) -> list[DataSource]:
    entries = data.dataset_mix or [{"path": path} for path in paths]
    return [_find_entry(data, entry) for entry in entries]


def _find_entry(data: DataArguments, entry: dict[str, Any]) -> DataSource:
    path = os.path.expanduser(entry["path"])
    registered = find_entry(path, data.dataset_dir)
    if registered is None:
        source = DataSource(name=entry["path"], files=tuple(find_split(path, "train")))
    else:
        source = make_source(registered, make_options(data))
    return replace(
        source, ratio=entry.get("ratio"), max_samples=entry.get("max_samples") or source.max_samples
    )


def _read(
    data: DataArguments,
    sources: dict[str, list[DataSource]],
    split: str,
    splits: Splits,
    comparison: str | None,
) -> list[list[Conversation]]:
    if split not in sources:
        if comparison is not None:
            raise UserError(
                f"{data.dataset_name_or_path}: built-in data sets have no answers to compare: give files of pairs"
            )
        from finetune.data.reading.builtin import load_builtin

        return [load_builtin(str(data.dataset_name_or_path), data.task_name, split)]
    faults = splits.faults[split] = FaultCollector(skip=data.on_bad_line == "skip")
    found = [
        source
        if source.options is None
        else replace(source, options=replace(source.options, comparison=comparison))
        for source in sources[split]
    ]
    return read_sources(found, make_options(data, comparison), faults)


def _by_record(conversations: Sequence[Conversation]) -> list[list[Conversation]]:
    """The examples of each record; only data of a preference method have several."""
    if not any(each.comparison for each in conversations):
        return [[each] for each in conversations]
    return [list(run) for _, run in itertools.groupby(conversations, lambda each: each.origin)]


def _limit(conversations: list[Conversation], most: int | None, seed: str) -> list[Conversation]:
    return conversations if most is None or most >= len(conversations) else draw(conversations, most, seed)
