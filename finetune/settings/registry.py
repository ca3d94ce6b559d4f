"""Every setting there is, by name: the fields of our groups, and the records of PaddleNLP's settings.

Three files hold what concerns PaddleNLP, one row per setting. ``training_arguments.json`` is its class
TrainingArguments, kept as data because importing it takes seconds (``tools/record_training_arguments.py``
writes the file, a test compares it with the installed class). ``training_records.json`` is what we say about
these, in the order of ``--help``. ``foreign_settings.json`` names known keys that have no place here, most of
them of PaddleNLP's scripts: at their off value a file runs unchanged, switched on they are refused, or ignored
where the result does not depend on them. ``synonyms.json`` is of `finetune.settings.synonyms`.
"""

import dataclasses
import functools
import json
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.settings.alignment import AlignmentArguments
from finetune.settings.data import DataArguments, GenerationArguments
from finetune.settings.model import ModelArguments, QuantArguments
from finetune.settings.records import PADDLENLP, Range, Setting

TRAINING_ARGUMENTS_FILE = Path(__file__).with_name("training_arguments.json")

# The groups with a class of their own, in the order of --help.
GROUPS: dict[str, type] = {
    "model": ModelArguments,
    "data": DataArguments,
    "alignment": AlignmentArguments,
    "generation": GenerationArguments,
    "quant": QuantArguments,
}


def read_rows(name: str) -> dict[str, Any]:
    """One of the JSON files beside this module."""
    rows: dict[str, Any] = json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    return rows


@functools.cache
def known_settings() -> dict[str, Setting]:
    """Every setting with a place here by name, in the order in which ``--help-all`` shows a group."""
    settings = [setting for group in GROUPS for setting in _list_fields(group)]
    settings.extend(_list_training_settings())
    return {setting.name: setting for setting in settings}


@functools.cache
def known_aliases() -> dict[str, str]:
    """Other names of settings, with the name used in this project."""
    return {alias: setting.name for setting in known_settings().values() for alias in setting.aliases}


@functools.cache
def foreign_settings() -> dict[str, Setting]:
    """Settings of PaddleNLP's scripts, and of other tools, without a place here, by name."""
    plain = {"group": "foreign", "type": "any", "default": None, "help": ""}
    ignored = read_rows("synonyms.json")["ignored"]
    rows = read_rows("foreign_settings.json") | {name: {"ignored": ignored[name]["why"]} for name in ignored}
    return {name: _make_setting({"name": name, **plain, **row}) for name, row in rows.items()}


def _list_fields(group: str) -> Iterator[Setting]:
    hints = typing.get_type_hints(GROUPS[group])
    for field in dataclasses.fields(GROUPS[group]):
        type_name = _name_type(hints[field.name])
        yield Setting(name=field.name, group=group, type=type_name, default=field.default, **field.metadata)


def _name_type(hint: Any) -> str:
    """The type as an argument file has it: "int" of ``int | None``, "list[str]" of ``list[str] | None``."""
    members = [member for member in typing.get_args(hint) if member is not type(None)]
    if type(None) in typing.get_args(hint):
        return _name_type(members[0])
    if typing.get_origin(hint) is list:
        return f"list[{_name_type(members[0])}]"
    return str((typing.get_origin(hint) or hint).__name__)


def _list_training_settings() -> Iterator[Setting]:
    rows = read_rows("training_records.json")
    recorded = {entry["name"]: entry for entry in read_rows(TRAINING_ARGUMENTS_FILE.name)["settings"]}
    ours = {name: {**row, "common": True} for name, row in rows["common"].items()} | rows["others"]
    aliases = {alias for row in ours.values() for alias in row.get("aliases", ())}
    plain = {"group": "training", "readers": [PADDLENLP], "common": False}
    for name in dict.fromkeys([*rows["common"], *recorded]):
        if name not in aliases:
            yield _make_setting({**plain, **recorded[name], **ours.get(name, {})})


def _make_setting(row: Mapping[str, Any]) -> Setting:
    facts: dict[str, Any] = dict(row)
    for name in ("choices", "words", "aliases", "readers", "working"):
        if name in facts:
            facts[name] = tuple(facts[name])
    if "range" in facts:
        facts["range"] = Range(**facts["range"])
    return Setting(**facts)
