"""A JSON Schema of argument files, for editors that complete and check while one writes.

What one key may hold is checked as in the parser, only stricter in form: the parser also reads flags and numbers that
are written as texts, 0 and 1 as flags, one word as a list of one, and "none" for null. What settings say together, and
null characters in a text, are left to the parser.

`argument_schema.json` beside this file is written by `python tools/argument_schema.py`.
"""

import json
import re
from pathlib import Path
from typing import Any

from finetune.settings.conversion import PATH_LISTS
from finetune.settings.records import Setting
from finetune.settings.registry import foreign_settings, known_aliases, known_settings
from finetune.settings.synonyms import Synonym, known_synonyms

SCHEMA_FILE = Path(__file__).with_name("argument_schema.json")

_TYPES = {"bool": "boolean", "int": "integer", "float": "number", "str": "string", "dict": "object"}
_TEXTS = {"type": "array", "items": {"type": "string"}}
_CHINESE = {"type": "string", "pattern": "^[^ ]*[\u3400-\u9fff\uf900-\ufaff][^ ]*$"}
_NOT_CHINESE = {"type": "string", "pattern": "^[^\u3400-\u9fff\uf900-\ufaff]*$"}
_ONE_OR_TWO_NAMES = [
    {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1},
    {"type": "array", "prefixItems": [_CHINESE, _NOT_CHINESE], "minItems": 2, "maxItems": 2},
]


def json_schema() -> dict[str, Any]:
    """The schema, of draft 2020-12: one property for every name that a setting has; null stands for the default."""
    properties = {
        setting.name: _describe(setting)
        for setting in (*known_settings().values(), *foreign_settings().values())
    }
    for alias, name in known_aliases().items():
        about = f"Another name of {name}. {name} 的另一个名称。"
        properties[alias] = properties[name] | {"deprecated": True}
        properties[alias]["description"] = f"{about}\n{properties[name]['description']}"
    for name, synonym in known_synonyms().items():
        if name not in properties:
            properties[name] = _describe_synonym(synonym)
        elif "anyOf" in properties[name]:  # one of ours, of which other tools write some values differently
            properties[name]["anyOf"].extend(_describe_words(synonym))
        elif "enum" in properties[name]:
            properties[name]["enum"].extend(_list_words(synonym))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Argument file of paddle-finetune",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def format_schema() -> str:
    """The schema as the text of a file, a line for each key."""
    schema = json_schema()
    properties = schema.pop("properties")
    lines = [
        f"  {json.dumps(name)}: {json.dumps(each, ensure_ascii=False)}" for name, each in properties.items()
    ]
    head = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in schema.items()]
    return "\n".join(["{", *head, ' "properties": {', ",\n".join(lines), " }", "}", ""])


def _describe(setting: Setting) -> dict[str, Any]:
    english = setting.help or setting.instead or f"Without effect: {setting.ignored}."
    texts = {"description": "\n".join(filter(None, [english, setting.help_zh]))}
    if setting.working is not None:
        return {**texts, "enum": [*dict.fromkeys((*setting.working, None))]}
    if setting.type == "any":
        return texts
    values = [_describe_type(setting, setting.type)]
    if setting.is_pair_of_names:
        values += _ONE_OR_TWO_NAMES
    if setting.name in PATH_LISTS:
        values.append(_TEXTS)
    if setting.type == "list[str]":  # one text may stand for a list of one
        values.append(_describe_type(setting, "str"))
    if setting.name == "sharding":  # PaddleNLP's earlier form of the switch
        values = [{"type": "boolean"}, {**values[0], "pattern": "^(stage[123])?$"}]
    if setting.words:
        word = "|".join(map(re.escape, sorted(setting.words)))
        values[0]["pattern"] = rf"^[\s,]*(({word})([\s,]+|$))*$"
    return {**texts, "default": setting.default, "anyOf": [*values, {"type": "null"}]}


def _describe_synonym(synonym: Synonym) -> dict[str, Any]:
    texts = [f"A name of {', '.join(synonym.tools)}.", synonym.instead]
    facts: dict[str, Any] = {"deprecated": True}
    if synonym.setting is None:
        texts.append(synonym.instead_zh)
        facts["enum"] = [*_list_words(synonym), None]
    else:
        own = _describe(known_settings()[synonym.setting])
        texts += [f"Read as {synonym.setting}. 读作 {synonym.setting}。", own.pop("description")]
        facts |= own
        facts.setdefault("enum" if "enum" in own else "anyOf", []).extend(
            _list_words(synonym) if "enum" in own else _describe_words(synonym)
        )
    return {"description": "\n".join(filter(None, texts)), **facts}


def _describe_words(synonym: Synonym) -> list[dict[str, Any]]:
    words = _list_words(synonym)
    return [{"enum": words}] if words else []


def _list_words(synonym: Synonym) -> list[Any]:
    """The values of another tool in their own types."""
    words: list[Any] = []
    for value in synonym.values:
        try:
            words.append(json.loads(value))  # true, 0, 1.0
        except ValueError:
            words.append(value)
    return list({json.dumps(word): word for word in words if word is not None}.values())


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
