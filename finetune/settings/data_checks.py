"""What makes the data settings of a run unusable; part of `finetune.settings.checks`."""

import codecs
import os
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.errors import UserError
from finetune.settings.column_names import find_column_faults
from finetune.settings.dataset_registry import find_entry
from finetune.settings.mix_entries import find_mix_faults
from finetune.settings.paths import describe_missing, looks_like_path, shorten, split_paths


def check_data(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """The faults of the data settings, each with the names of the settings it depends on."""
    src_length, max_length = values["src_length"], values["max_length"]
    if src_length >= max_length:
        yield (
            ("src_length", "max_length"),
            f"src_length {src_length} leaves no room for the target in max_length {max_length}: "
            "lower src_length or raise max_length",
        )
    yield from _check_paths(values)
    for fault in find_column_faults(values["columns"]):
        yield ("columns",), fault
    if not _is_encoding(values["encoding"]):
        yield (
            ("encoding",),
            f'encoding is "{values["encoding"]}", which is not known: utf-8, gbk, utf-16 and others of Python',
        )
    for fault in find_mix_faults(values["dataset_mix"], values["dataset_dir"]):
        yield ("dataset_mix",), fault
    split = values["validation_split"]
    if split is not None and split > 1 and split != int(split):
        yield (
            ("validation_split",),
            f"validation_split is {split}: it must be a ratio below 1, such as 0.1, or a whole number of examples",
        )
    yield from _check_self_cognition(values)
    if values["longest_first"] and not values["do_train"]:
        yield (
            ("longest_first", "do_train"),
            f"longest_first is {values['longest_first']}, but do_train is false: a trial is a training, so set do_train "
            "true, or longest_first 0",
        )
    if values["lazy"] and values["do_train"]:
        for name, fault in _find_stream_faults(values):
            yield ("lazy", "do_train", name), fault


def _check_paths(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    paths = split_paths(values["dataset_name_or_path"] or "")
    for path in paths:
        try:
            is_known = os.path.exists(path) or find_entry(path, values["dataset_dir"]) is not None
        except UserError as error:
            yield ("dataset_name_or_path", "dataset_dir"), error.faults[0]
            continue
        is_name = "://" in path
        needs_path = looks_like_path(path) or ((len(paths) > 1 or values["dataset_dir"]) and not is_name)
        if not is_known and needs_path:
            yield (
                ("dataset_name_or_path",),
                f'dataset_name_or_path is "{shorten(path)}", {describe_missing(path)}',
            )
    for path in split_paths(values["eval_dataset"] or ""):
        if not os.path.exists(path) and "://" not in path:
            yield ("eval_dataset",), f'eval_dataset is "{shorten(path)}", {describe_missing(path)}'


def _is_encoding(name: str) -> bool:
    try:
        return bool(codecs.lookup(name)._is_text_encoding)
    except (LookupError, ValueError):
        return False


def _check_self_cognition(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    count, file = values["self_cognition_samples"], values["self_cognition_file"]
    for name in ("model_name", "model_author"):
        if count > 0 and not (values[name] or "").strip():
            yield (
                ("self_cognition_samples", "model_name", "model_author"),
                f"self_cognition_samples is {count}, but {name} is missing: give the name that the model shall know",
            )
    if file and not os.path.isfile(os.path.expanduser(file)):
        yield (
            ("self_cognition_file",),
            f'self_cognition_file is "{shorten(file)}", {describe_missing(file, "is no file")}',
        )


def _find_stream_faults(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a stream cannot do: nobody knows how long it is before it was read."""
    if values["max_steps"] <= 0:
        yield (
            "max_steps",
            "lazy is true, but max_steps is missing: a stream has no known length, so say after how many steps "
            "the training ends, for example with --max_steps 1000",
        )
    for name, steps in (("evaluation_strategy", "eval_steps"), ("save_strategy", "save_steps")):
        if values[name] == "epoch":
            yield (
                name,
                f"{name} is epoch, but with lazy true no step is the last of an epoch: set it to steps, with {steps}",
            )
    remedies = {
        "validation_split": "give a folder with a dev file, or eval_dataset",
        "max_train_samples": "max_steps bounds the training; max_samples in dataset_mix takes the first of a data set",
        "self_cognition_samples": "write these examples to a file and name it in dataset_mix",
        "longest_first": "try it without lazy, on a part of the data (max_train_samples)",
    }
    for name, remedy in remedies.items():
        if values[name]:
            yield name, f"{name} is {values[name]}, but with lazy true the data are not held: {remedy}"
