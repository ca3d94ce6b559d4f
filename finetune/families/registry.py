"""The records of all families, and which of them a model folder belongs to.

A record counts once its module has been imported; folders of this package whose `record.py` says `NAME = register(`
at its top level are found by themselves.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError

if TYPE_CHECKING:
    from finetune.families.family import Family

_PACKAGE = "finetune.families"
_HEADS = re.compile(r"(For[A-Z]\w*|LMHeadModel|(Text)?Model)$")
"""Ends of the names of classes that say what stands on the decoder."""

_REGISTERS = re.compile(r"^[A-Z]\w* = register\($", re.MULTILINE)

_registry: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Adds a record; its module calls this once on import.

    Raises:
        ValueError: A record of that name is there already.
    """
    if family.name in _registry:
        raise ValueError(f"there are two families {family.name}")
    _registry[family.name] = family
    return family


def families() -> dict[str, Family]:
    """All records by name."""
    for module in _record_modules():
        importlib.import_module(module)
    return dict(_registry)


@functools.cache
def _record_modules() -> tuple[str, ...]:
    folders = importlib.import_module(_PACKAGE).__path__
    files = [path for folder in folders for path in sorted(Path(folder).glob("*/record.py"))]
    return tuple(
        f"{_PACKAGE}.{path.parent.name}.record"
        for path in files
        if _REGISTERS.search(path.read_text(encoding="utf-8"))
    )


def get_family(name: str) -> Family:
    """The record called `name`.

    Raises:
        UserError: No such family; the message lists those there are.
    """
    known = families()
    if name not in known:
        raise UserError(f"unknown model family {name!r}; covered families: {', '.join(sorted(known))}")
    return known[name]


def find_candidates(config: Mapping[str, Any], folder: Path | None = None) -> list[Family]:
    """The records that a config.json may belong to, by `model_type`, or by `architectures` where that is missing.

    Several architectures may share a `model_type`: each of their records says what tells its own from the others.

    Args:
        config: config.json.
        folder: Where it stands, with the files of the tokenizer; None where there is none.

    Raises:
        UserError: There is none; the message lists the families.
    """
    known, model_type = families(), config.get("model_type")
    # A classifier or a reward model is of the family of the causal model that it was made of.
    architectures = {
        name.replace("ForSequenceClassification", "ForCausalLM") for name in _architectures(config)
    }
    found = [
        family
        for family in known.values()
        if (
            architectures & set(family.architectures)
            if model_type is None
            else model_type in family.model_types
        )
        and family.covers(config, folder)
    ]
    if not found:
        raise UserError(f"no family covers {_names(config)}; covered families: {', '.join(sorted(known))}")
    return found


def find_family(config: Mapping[str, Any], folder: Path | None = None) -> Family:
    """The one record that covers a config.json; see `find_candidates`.

    Raises:
        UserError: No record covers it, or several do.
    """
    first, *others = find_candidates(config, folder)
    if not others:
        return first
    told = [
        f"{family.name} ({family.told_by})" if family.told_by else family.name for family in (first, *others)
    ]
    raise UserError(
        f"config.json does not tell which model it is of: {_names(config)} is shared by the families "
        f"{', '.join(told)}. Copy config.json and the tokenizer's files of the published folder again"
    )


def foreign_classes(config: Mapping[str, Any], family: Family) -> list[str]:
    """A warning where `architectures` names a class of another model than `model_type` does.

    Folders that bring a program of their own have such names, as do those of converted models. Like transformers without
    that program, the model is computed by its `model_type`.
    """
    named, known = config.get("architectures") or (), {_stem(each) for each in family.architectures}
    if not named or any(_stem(str(each)) in known for each in named):
        return []
    return [
        f"warning: config.json names the class {', '.join(map(str, named))}, which is none of family {family.name}: it is "
        f"computed as model_type {config.get('model_type')}, which may not be what a program of its own computes"
    ]


def _stem(class_name: str) -> str:
    """What a class is called without the words for its head."""
    return _HEADS.sub("", class_name.removesuffix("Pipe")).rstrip("_").lower()


def _architectures(config: Mapping[str, Any]) -> list[str]:
    return [str(name) for name in config.get("architectures") or ()]


def _names(config: Mapping[str, Any]) -> str:
    return f"model_type {config.get('model_type')!r} with architectures {_architectures(config)}"
