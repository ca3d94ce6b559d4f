"""From what a beginner chooses to an argument file: model, data, method, a few settings."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.commands.first_arguments import (
    FirstArguments,
    count_weights,
    find_arguments,
    fit_to_data,
    fit_to_machine,
    look_at_data,
    look_at_model,
    read_shipped,
)
from finetune.errors import UserError
from finetune.machine.language.translation import chinese
from finetune.settings.arguments import parse_arguments
from finetune.settings.registry import known_settings
from finetune.storage.shipped_files import sample_data, shipped_arguments

METHODS = ("lora", "sft", "pt", "dpo", "kto", "orpo", "simpo", "rm")
"""The shipped methods that one process runs, the simplest first."""
OFFERED = (
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "lora_rank",
)
"""The settings of the page; empty leaves one to the argument file."""
_DEGREES = (
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
    "pipeline_parallel_config",
    "sharding_parallel_degree",
    "sharding",
    "sequence_parallel",
)
_MAX_FOLDERS_SEEN = 3000
_MAX_OFFERED = 50
_MAX_DEPTH = 4
_MODEL, _DATA = "config.json", "train.json"


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What was chosen on the page.

    Attributes:
        model: Folder of the model.
        data: Folder or file of the data.
        arguments: Short name of a shipped argument file, such as "llama/lora".
        settings: Numbers for some of `OFFERED`, as they were written; "" leaves one to the argument file.
    """

    model: str
    data: str
    arguments: str
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What model and data are.

    Attributes:
        lines: For the person, in English.
        family: The model's.
        method: What such data are for.
    """

    lines: tuple[str, ...]
    family: str
    method: str


def look(model: str, data: str) -> Finding:
    """Looks at model and data; nothing is loaded.

    Raises:
        UserError: One of them is not there or cannot be used.
    """
    folder = _existing_model(model)
    facts = look_at_model(str(folder))
    num_weights = count_weights(str(folder))
    if num_weights:
        lines = [f"model: {facts.family}, {_in_words(num_weights)} parameters"]
    else:
        lines = [f"model: {facts.family}, no weights that could be counted"]
    if facts.is_multimodal:
        lines.append("text_only true: the model is multimodal, and its text part alone is trained")
    data_facts = look_at_data(str(_existing_data(data)))
    return Finding(lines=(*lines, data_facts.describe()), family=facts.family, method=data_facts.method)


def compose_arguments(choices: Choices) -> FirstArguments:
    """The settings of a run without `output_dir`, and what was fitted to model, data and machine.

    Raises:
        UserError: Something that was chosen is not there or cannot be used.
    """
    shipped = shipped_arguments()
    if choices.arguments not in shipped:
        raise UserError(f'there is no argument file "{choices.arguments[:80]}": choose one of the list')
    if unknown := sorted(set(choices.settings) - set(OFFERED)):
        raise UserError(f"{unknown[0]} is no setting of this page: write it into the argument file")
    model, data = _existing_model(choices.model), _existing_data(choices.data)
    first = read_shipped(shipped[choices.arguments])
    for name in _DEGREES:
        first.values.pop(name, None)
    first.values |= {"model_name_or_path": str(model), "dataset_name_or_path": str(data)}
    if look_at_model(str(model)).is_multimodal:
        first.values["text_only"] = True
    fit_to_data(first, look_at_data(str(data)))
    fit_to_machine(first)
    first.values |= _given(choices.settings, has_lora=bool(first.values.get("lora")))
    check_arguments(first.values)
    return first


def check_arguments(values: Mapping[str, Any]) -> None:
    """Has the parser of runs look at the settings.

    Raises:
        UserError: They cannot be used.
    """
    with written_arguments(values) as path:
        try:
            parse_arguments([str(path)])
        except UserError as error:
            raise UserError([fault.replace(f" in {path}", "") for fault in error.faults]) from None


@contextmanager
def written_arguments(values: Mapping[str, Any]) -> Iterator[Path]:
    """An argument file that nobody else may read, as long as the block runs; its output_dir is beside it."""
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder:
        path = Path(folder, "argument.json")
        path.write_text(
            json.dumps({"output_dir": str(Path(folder, "output"))} | dict(values)), encoding="utf-8"
        )
        yield path


def choose_arguments(family: str, method: str) -> str:
    """The short name of the shipped file for a family and a method.

    Raises:
        UserError: There is no such method.
    """
    path = find_arguments(family, method) if method in METHODS else None
    if path is None:
        raise UserError(f'there is no method "{method[:40]}": choose one of {", ".join(METHODS)}')
    return next(name for name, other in shipped_arguments().items() if other == path)


def argument_files() -> list[str]:
    """Short names of the shipped files that one process runs."""
    return [name for name in shipped_arguments() if name.partition("/")[2] in METHODS]


def file_defaults(name: str) -> dict[str, Any]:
    """What the settings of the page are in a run with a shipped file."""
    values, known = read_shipped(shipped_arguments()[name]).values, known_settings()
    return {setting: values.get(setting, known[setting].default) for setting in OFFERED}


def find_offers(folder: Path) -> tuple[list[str], list[str]]:
    """Folders of models and of data below a folder, as far as a short search finds them.

    Returns:
        Models, and data, of which the sample data are the last.
    """
    models: list[str] = []
    data: list[str] = []
    base = len(folder.parts)
    for number, (place, folders, files) in enumerate(os.walk(folder)):
        if number >= _MAX_FOLDERS_SEEN:
            break
        deep = len(Path(place).parts) - base >= _MAX_DEPTH
        folders[:] = [] if deep else sorted(each for each in folders if _is_worth_a_look(each))
        if _MODEL in files and any(name.startswith("tokenizer") or ".model" in name for name in files):
            models.append(place)
        if any(name.startswith(_DATA) for name in files):
            data.append(place)
    samples = str(sample_data())
    others = [each for each in data if each != samples]
    return models[:_MAX_OFFERED], [*others[:_MAX_OFFERED], samples]


def in_language(text: str, language: str) -> str:
    """An English line in the language of the page."""
    return text if language == "en" else chinese().translate_piece(text)


def _is_worth_a_look(name: str) -> bool:
    return not name.startswith((".", "checkpoint-")) and name not in (
        "node_modules",
        "site-packages",
        "__pycache__",
    )


def _existing_model(text: str) -> Path:
    path = _absolute(text, "the model")
    if not path.is_dir():
        raise UserError(
            f"model {text[:300]} is no folder: give the folder that holds config.json and the weights"
        )
    return path


def _existing_data(text: str) -> Path:
    path = _absolute(text, "the data")
    if not path.exists():
        raise UserError(f"data {text[:300]} are not there: give a folder with train.json, or a file")
    return path


def _absolute(text: str, what: str) -> Path:
    if not text.strip() or "\0" in text or "://" in text:
        raise UserError(f"{what} is missing: choose a folder of this machine")
    try:
        return Path(text.strip()).expanduser().absolute()
    except RuntimeError:
        raise UserError(f"{text[:300]} names no home folder: write the whole path") from None


def _given(settings: Mapping[str, str], *, has_lora: bool) -> dict[str, Any]:
    """The settings that were written; what is no number is left to the parser of runs, which tells it."""
    given = {name: text.strip() for name, text in settings.items() if text.strip()}
    if not has_lora:
        given.pop("lora_rank", None)
    return {name: _number(text) for name, text in given.items()}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _in_words(number: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)
