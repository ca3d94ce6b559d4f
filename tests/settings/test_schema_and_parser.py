"""The schema of argument files is written down, is a valid schema, and refuses what the parser refuses."""

import json
from typing import Any

import pytest

from finetune.settings.conversion import convert_json
from finetune.settings.registry import foreign_settings, known_aliases, known_settings
from finetune.settings.schema import SCHEMA_FILE, format_schema, json_schema
from finetune.settings.synonyms import known_synonyms, translate
from tests.conftest import ROOT
from tests.settings.test_schema import SHIPPED, fits

PROPERTIES = json_schema()["properties"]
PROBES = [
    *(True, False, None, -1, 0, 1, 2, 1.5, 0.5, -0.5, 3.0, 1e7, 1e300, 10**10, 10**30),
    *("", "x", "true", "5", "none", "stage2", "a, b", ["a"], ["a", "b"], ["none"], [1], [[1, 2]], [{}], []),
    *({}, {"a": 1}, ["小桨", "Paddy"], ["小 桨", "Paddy"], ["小桨", "桨"], ["a", "b", "c"]),
]


def test_the_written_schema_is_that_of_the_records():
    assert SCHEMA_FILE.read_text(encoding="utf-8") == format_schema(), "run python tools/argument_schema.py"
    assert json.loads(format_schema()) == json_schema()


def is_read(key: str, value: Any) -> bool:
    """Whether the parser takes a value of a key, as far as that depends on nothing else."""
    try:
        if key in foreign_settings():
            setting = foreign_settings()[key]
            return not list(setting.find_faults(convert_json(setting, value)))
        for name, translated in translate(key, value):
            setting = known_settings()[known_aliases().get(name, name)]
            converted = convert_json(setting, translated)
            if converted is not None and list(setting.find_faults(converted)):
                return False
    except (KeyError, ValueError):
        return False
    return True


def probes_of(key: str) -> list[Any]:
    setting = known_settings().get(known_aliases().get(key, key))
    values = list(PROBES)
    if key in known_synonyms():
        values += known_synonyms()[key].values
    if setting is not None:
        values += [setting.default, *setting.choices, *setting.words, " ,".join(setting.words)]
        values += [f"{word}x" for word in (*setting.words, *setting.choices)]
    if setting is not None and setting.range is not None:
        values += [setting.range.low, setting.range.high, setting.range.low - 1, setting.range.high + 1]
    return values


def is_loose_form(key: str, value: Any) -> bool:
    """Whether the parser may read what the schema wants in its own type: words, 0 and 1, lists of one word."""
    if key == "sharding":  # its words are a check of their own, which the schema has as a pattern
        return value in PROBES
    if key in foreign_settings():
        return value in ("none", "true", ["none"], [], {}) or (
            value in (0, 1) and not isinstance(value, float)
        )
    names = {known_aliases().get(key, key)}
    if key in known_synonyms():
        names |= {known_synonyms()[key].setting or ""}
        if isinstance(value, (str, int, list)) and json.dumps(value).strip('"') in (
            "true",
            "false",
            "[]",
            "0",
            "1",
        ):
            return True
    kinds = {known_settings()[name].type for name in names if name in known_settings()}
    if isinstance(value, str):
        return not kinds <= {"str", "list[str]"} or bool(known_synonyms().get(key))
    return ("bool" in kinds and value in (0, 1)) or value == ["none"]


@pytest.mark.parametrize("key", sorted(PROPERTIES))
def test_one_value_of_a_key(key):
    for value in probes_of(key):
        valid, read = fits(value, PROPERTIES[key]), is_read(key, value)
        assert not valid or read, f"the schema takes {key} {value!r}, which the parser refuses"
        assert valid or not read or is_loose_form(key, value), (
            f"the parser takes {key} {value!r}, the schema does not"
        )


def test_descriptions_are_in_both_languages_where_the_records_are():
    for name, setting in known_settings().items():
        assert setting.help in PROPERTIES[name]["description"]
        assert setting.help_zh in PROPERTIES[name]["description"]
    assert "低秩增量" in PROPERTIES["lora"]["description"]


def test_names_of_other_tools_are_marked():
    assert PROPERTIES["cutoff_len"]["deprecated"] and PROPERTIES["task_name_or_path"]["deprecated"]
    assert [name for name in known_settings() if "deprecated" in PROPERTIES[name]] == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_files_name_the_schema(path):
    named = json.loads(path.read_text(encoding="utf-8"))["$schema"]
    assert (path.parent / named).resolve() == (ROOT / SCHEMA_FILE).resolve()


def test_the_library_agrees():
    jsonschema = pytest.importorskip("jsonschema", reason="it comes with the dev requirements")
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for path in SHIPPED:
        assert [
            each.message for each in validator.iter_errors(json.loads(path.read_text(encoding="utf-8")))
        ] == []
    for key, each in PROPERTIES.items():
        one = jsonschema.Draft202012Validator(each)
        for value in probes_of(key):
            assert one.is_valid(value) == fits(value, each), (key, value)
    assert not validator.is_valid({"lora_rnk": 8}) and not validator.is_valid([])
