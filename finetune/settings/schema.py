"""A JSON Schema of argument files, for editors that complete and check while one writes.

It is stricter than the parser, which also reads numbers and flags that are written as texts.
"""

from typing import Any

from finetune.settings.records import Setting
from finetune.settings.registry import foreign_settings, known_settings
from finetune.settings.synonyms import Synonym, known_synonyms

_TYPES = {"bool": "boolean", "int": "integer", "float": "number", "str": "string", "dict": "object"}


def json_schema() -> dict[str, Any]:
    """The schema, of draft 2020-12: one property for every name that a setting has; null stands for the default."""
    properties = {
        name: _describe(setting)
        for setting in (*known_settings().values(), *foreign_settings().values())
        for name in (setting.name, *setting.aliases)
    }
    properties |= {
        name: _describe_synonym(each) for name, each in known_synonyms().items() if name not in properties
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Argument file of finetune_generation.py",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _describe(setting: Setting) -> dict[str, Any]:
    texts = {"description": setting.help or setting.instead or f"Without effect: {setting.ignored}."}
    if setting.working is not None:
        return {**texts, "enum": [*dict.fromkeys((*setting.working, None))]}
    if setting.type == "any":
        return texts
    value = _describe_type(setting, setting.type)
    if setting.is_pair_of_names:
        value = {"anyOf": [value, {"type": "array", "items": value}]}
    if setting.type == "list[str]":  # one text may stand for a list of one
        value = {"anyOf": [value, _describe_type(setting, "str")]}
    if setting.name == "sharding":  # PaddleNLP's earlier form of the switch
        value = {"anyOf": [{"type": "boolean"}, {**value, "pattern": "^(stage[123])?$"}]}
    return {**texts, "default": setting.default, "anyOf": [value, {"type": "null"}]}


def _describe_synonym(synonym: Synonym) -> dict[str, Any]:
    texts = {"description": f"A name of {', '.join(synonym.tools)}. {synonym.instead}".strip()}
    if synonym.setting is None:
        words = [{"true": True, "false": False}.get(value, value) for value in synonym.values]
        return {**texts, "enum": [*words, None]}
    own = _describe(known_settings()[synonym.setting])
    return {**own, "description": f"{texts['description']} Read as {synonym.setting}. {own['description']}"}


def _describe_type(setting: Setting, type_name: str) -> dict[str, Any]:
    if type_name.startswith("list["):
        item_type = type_name.removeprefix("list[").removesuffix("]")
        return {"type": "array", "items": _describe_type(setting, item_type)}
    value: dict[str, Any] = {"type": _TYPES[type_name]}
    if pattern := setting.choice_pattern:
        value["pattern"] = pattern
    elif setting.choices:
        value["enum"] = list(setting.choices)
    if allowed := setting.range:
        value["minimum" if allowed.low_allowed else "exclusiveMinimum"] = allowed.low
        value["maximum" if allowed.high_allowed else "exclusiveMaximum"] = allowed.high
    return value
