"""The JSON Schema of argument files: right files pass, wrong ones fail."""

import json
import re
from typing import Any

import pytest

from finetune.settings.arguments import parse_arguments
from finetune.settings.registry import foreign_settings, known_aliases, known_settings
from finetune.settings.schema import json_schema
from finetune.settings.synonyms import known_synonyms
from tests.conftest import ROOT

SHIPPED = sorted(ROOT.glob("*/*_argument*.json"))
TYPES: dict[str, tuple[type, ...]] = {
    "null": (type(None),),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "string": (str,),
    "array": (list,),
    "object": (dict,),
}
KEYWORDS = {
    *(
        "$schema",
        "title",
        "description",
        "default",
        "deprecated",
        "type",
        "enum",
        "pattern",
        "anyOf",
        "items",
    ),
    *("prefixItems", "minItems", "maxItems"),
    *("properties", "additionalProperties", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}


def is_equal(first: Any, second: Any) -> bool:
    return isinstance(first, bool) == isinstance(second, bool) and first == second


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is valid, by the keywords that the schema here uses; others are a mistake."""
    assert schema.keys() <= KEYWORDS, schema.keys() - KEYWORDS
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    checks = {
        "type": lambda name: (
            (isinstance(value, TYPES[name]) and (name not in ("integer", "number") or is_number))
            or (name == "integer" and isinstance(value, float) and value.is_integer())
        ),
        "enum": lambda values: any(is_equal(value, each) for each in values),
        "pattern": lambda pattern: not isinstance(value, str) or bool(re.search(pattern, value)),
        "anyOf": lambda schemas: any(fits(value, each) for each in schemas),
        "items": lambda items: not isinstance(value, list) or all(fits(each, items) for each in value),
        "prefixItems": lambda each: not isinstance(value, list) or all(map(fits, value, each)),
        "minItems": lambda bound: not isinstance(value, list) or len(value) >= bound,
        "maxItems": lambda bound: not isinstance(value, list) or len(value) <= bound,
        "properties": lambda known: all(
            fits(value[name], known[name]) for name in value.keys() & known.keys()
        ),
        "additionalProperties": lambda allowed: allowed or value.keys() <= schema["properties"].keys(),
        "minimum": lambda bound: not is_number or value >= bound,
        "maximum": lambda bound: not is_number or value <= bound,
        "exclusiveMinimum": lambda bound: not is_number or value > bound,
        "exclusiveMaximum": lambda bound: not is_number or value < bound,
    }
    return all(check(schema[keyword]) for keyword, check in checks.items() if keyword in schema)


def test_it_is_json_and_knows_every_name():
    schema = json_schema()
    assert json.loads(json.dumps(schema)) == schema
    names = known_settings().keys() | known_aliases().keys() | foreign_settings().keys()
    assert schema["properties"].keys() == names | known_synonyms().keys()
    assert [name for name, each in schema["properties"].items() if not each["description"]] == []


def test_there_are_argument_files():
    assert len(SHIPPED) > 15


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_files_are_valid(path):
    assert fits(json.loads(path.read_text(encoding="utf-8")), json_schema())


def test_written_arguments_are_valid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "--model_name_or_path a/b --dataset_name_or_path c --output_dir out --do_train --report_to none"
    assert fits(parse_arguments(words.split()).to_json(), json_schema())


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1},
        {"learning_rate": None, "lora_target_modules": ".*q_proj.*", "report_to": ["visualdl"]},
        {"sharding": "stage2"},
        {"sharding": True},
        {"intokens": True, "continue_training": True, "vera": False},
        {"init_lora_weights": "pissa_niter_16"},
        {"dataset_mix": [{"path": "data"}], "skip_data_intervals": [[1, 2]]},
        {"sep_parallel_degree": 1, "optim": "adamw"},
        {"$schema": "argument_schema.json"},
        {"cutoff_len": 512, "finetuning_type": "lora", "use_dora": False, "model_name": ["小桨", "Paddy"]},
    ],
)
def test_right_settings(settings):
    assert fits(settings, json_schema())


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_rnk": 8},
        {"lora": "yes"},
        {"lora_rank": 8.5},
        {"lora_rank": True},
        {"lora_rank": 0},
        {"lora_dropout": 1},
        {"top_p": 0},
        {"learning_rate": 1e308},
        {"evaluation_strategy": "sometimes"},
        {"report_to": ["mlfow"]},
        {"lora_target_modules": [1]},
        {"skip_data_intervals": [1]},
        {"sharding": "stage4"},
        {"optim": "adafactor"},
        {"do_ptq": True},
        {"reft": True},
        {"init_lora_weights": "pissa_niter_0"},
        {"continue_training": False},
        {"use_expert_parallel": True},
    ],
)
def test_wrong_settings(settings):
    assert not fits(settings, json_schema())


def test_the_validator_refuses_a_keyword_that_it_does_not_know():
    with pytest.raises(AssertionError, match="maxLength"):
        fits("x", {"maxLength": 1})
