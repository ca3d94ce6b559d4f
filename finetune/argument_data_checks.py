"""What makes the data settings of a run unusable; part of `finetune.argument_checks`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data.source import split_paths

if TYPE_CHECKING:
    from finetune.argument_checks import Values


def looks_like_path(value: str) -> bool:
    """True for a value that can only mean a place on disk, or that is one.

    One slash alone is a hub name (``owner/model``).
    """
    return value.startswith((".", "/", "~")) or value.count("/") > 1 or os.path.exists(value)


def check_data_settings(values: Values, faults: list[str]) -> None:
    """Add a line for each fault of the data settings."""
    _check_dataset_paths(values, faults)
    _check_mix(values, faults)
    _check_data(values, faults)
    if values.sound("lazy", "do_train") and values["lazy"] and values["do_train"]:
        faults.extend(_find_stream_faults(values))


def _check_dataset_paths(values: Values, faults: list[str]) -> None:
    value = values["dataset_name_or_path"]
    if not value or not values.sound("dataset_name_or_path"):
        return
    paths = split_paths(value)
    for path in paths:
        if not os.path.exists(path) and (len(paths) > 1 or looks_like_path(path)):
            faults.append(
                f'dataset_name_or_path is "{path}", which does not exist (looked in {Path.cwd()}): check the path'
            )


def _check_mix(values: Values, faults: list[str]) -> None:
    if not values.sound("dataset_mix") or values["dataset_mix"] is None:
        return
    entries = values["dataset_mix"]
    if not entries:
        faults.append('dataset_mix is empty: give at least one {"path": ...}, or leave it out')
    for position, entry in enumerate(entries):
        faults.extend(f"dataset_mix[{position}]: {fault}" for fault in _find_mix_faults(entry))
    weighted = [entry.get("ratio") is not None for entry in entries]
    if any(weighted) and not all(weighted):
        faults.append(
            f"dataset_mix[{weighted.index(False)}] has no ratio, but others have: give every data set one, or none"
        )


def _find_mix_faults(entry: Mapping[str, Any]) -> Iterator[str]:
    unknown = sorted(set(entry) - {"path", "ratio", "max_samples"})
    if unknown:
        yield f'unknown key "{unknown[0]}", allowed are path, ratio and max_samples'
    path = entry.get("path")
    if not isinstance(path, str) or not path:
        yield "path is missing: give a folder with train.json, or a file"
    elif not os.path.exists(os.path.expanduser(path)):
        yield f'path is "{path}", which does not exist (looked in {Path.cwd()}): check the path'
    ratio = entry.get("ratio")
    if ratio is not None and not (_is_number(ratio) and 0 < ratio < math.inf):
        yield f"ratio is {_to_json(ratio)}: it must be a number above 0"
    limit = entry.get("max_samples")
    if limit is not None and not (isinstance(limit, int) and _is_number(limit) and limit > 0):
        yield f"max_samples is {_to_json(limit)}: it must be a whole number of at least 1"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:80]


def _find_stream_faults(values: Values) -> Iterator[str]:
    """What a stream cannot do: nobody knows how long it is before it was read."""
    if values.sound("max_steps") and values["max_steps"] <= 0:
        yield (
            "lazy is true, but max_steps is missing: a stream has no known length, so say after how many steps "
            "the training ends, for example with --max_steps 1000"
        )
    for name in ("evaluation_strategy", "save_strategy"):
        if values.sound(name) and values[name] == "epoch":
            yield (
                f"{name} is epoch, but with lazy true no step is the last of an epoch: set it to steps, "
                f"with {'eval_steps' if name == 'evaluation_strategy' else 'save_steps'}"
            )
    remedies = {
        "validation_split": "give a folder with a dev file",
        "max_train_samples": "max_steps bounds the training; max_samples in dataset_mix takes the first of a data set",
        "self_cognition_samples": "write these examples to a file and name it in dataset_mix",
    }
    for name, remedy in remedies.items():
        if values.sound(name) and values[name]:
            yield f"{name} is {values[name]}, but with lazy true the data are not held: {remedy}"


def _check_data(values: Values, faults: list[str]) -> None:
    split = values["validation_split"]
    if values.sound("validation_split") and split is not None and split > 1 and split != int(split):
        faults.append(
            f"validation_split is {split}: it must be a ratio below 1, such as 0.1, or a whole number of examples"
        )
    needed = ("model_name", "model_author")
    if values.sound("self_cognition_samples", *needed) and values["self_cognition_samples"] > 0:
        faults.extend(
            f"self_cognition_samples is {values['self_cognition_samples']}, but {name} is missing: "
            "give the name that the model shall know"
            for name in needed
            if not (values[name] or "").strip()
        )
    file = values["self_cognition_file"]
    if file and values.sound("self_cognition_file") and not os.path.isfile(os.path.expanduser(file)):
        faults.append(
            f'self_cognition_file is "{file}", which is no file (looked in {Path.cwd()}): check the path'
        )
