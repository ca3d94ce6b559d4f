"""What there is to set: one record per setting, gathered from our groups and from PaddleNLP's arguments.

Our own groups are dataclasses (``argument_groups``). PaddleNLP's TrainingArguments are kept as data in
``training_arguments.json`` because importing them takes seconds; ``tools/record_training_arguments.py``
writes that file and a test compares it with the installed class.
"""

import dataclasses
import functools
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.argument_groups import GROUPS

TRAINING_ARGUMENTS_FILE = Path(__file__).with_name("training_arguments.json")

# Settings that go by more than one name: other name -> name used in this project.
ALIASES = {
    "intokens": "zero_padding",
    "task_name_or_path": "dataset_name_or_path",
    "sharding_degree": "sharding_parallel_degree",
}

# Where this project starts from another value than PaddleNLP, and why.
CHANGED_DEFAULTS: dict[str, Any] = {
    "report_to": [],  # null means VisualDL to PaddleNLP; train_log.jsonl and loss.png are always written here
    "unified_checkpoint": True,  # checkpoints that any layout can resume
    "device": None,  # gpu when there is one, else cpu, so that one file runs on both
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One key of an argument file.

    Attributes:
        name: The key.
        group: "model", "data", "generation", "quant" or "training".
        type: "bool", "int", "float", "str", "list[str]", "list[int]", "list[list[int]]" or "list[dict]".
        default: Value when the key is absent or null.
        help: One or two sentences.
        choices: The values allowed, where they can be listed.
    """

    name: str
    group: str
    type: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()


@functools.cache
def known_settings() -> dict[str, Setting]:
    """Every setting by name, in the order in which ``--help`` shows them."""
    settings = [setting for group in GROUPS for setting in _settings_of(group)]
    settings.extend(_training_settings())
    return {setting.name: setting for setting in settings}


def _settings_of(group: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(GROUPS[group])
    for field in dataclasses.fields(GROUPS[group]):
        yield Setting(
            name=field.name,
            group=group,
            type=_type_name(hints[field.name]),
            default=field.default,
            help=field.metadata["help"],
            choices=tuple(field.metadata.get("choices", ())),
        )


def _type_name(hint: Any) -> str:
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    inner = members[0] if type(None) in typing.get_args(hint) else hint
    return inner.__name__ if isinstance(inner, type) and not typing.get_args(inner) else str(inner)


def _training_settings() -> Iterator[Setting]:
    recorded = json.loads(TRAINING_ARGUMENTS_FILE.read_text(encoding="utf-8"))
    for entry in recorded["settings"]:
        name = entry["name"]
        if name in ALIASES:
            continue
        yield Setting(
            name=name,
            group="training",
            type=entry["type"],
            default=CHANGED_DEFAULTS.get(name, entry["default"]),
            help=entry["help"],
            choices=tuple(entry.get("choices", ())),
        )
