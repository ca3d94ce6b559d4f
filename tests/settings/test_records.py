"""One record makes a setting: parsing, checks, help, schema, resume and the tables of docs follow from it."""

import dataclasses
import json
import re

import pytest

from finetune.errors import UserError
from finetune.run.directory import ARGUMENTS_FILE, RunDirectory
from finetune.settings import registry
from finetune.settings.arguments import parse_arguments
from finetune.settings.help import format_help
from finetune.settings.model import ModelArguments
from finetune.settings.records import MODEL_CONFIG, Range, Setting, setting
from finetune.settings.registry import known_aliases, known_settings
from finetune.settings.schema import json_schema
from tools.settings_table import CHINESE, ENGLISH, ROOT, format_page

VALID = ["--model_name_or_path", "a/b", "--dataset_name_or_path", "c", "--output_dir", "out", "--do_train"]


@pytest.fixture
def read_anew():
    """Settings are gathered once per process; here they change."""
    yield
    forget()


def forget():
    known_settings.cache_clear()
    known_aliases.cache_clear()


@dataclasses.dataclass(kw_only=True)
class MoreModelArguments(ModelArguments):
    """One more row."""

    num_heads_kept: int = setting(
        3, "Heads that are kept.", "保留的头数。",
        range=Range(1, 9, is_interval=True), aliases=("heads",), may_change=True, readers=(MODEL_CONFIG,),
    )  # fmt: skip


@pytest.fixture
def one_more(monkeypatch, read_anew):
    monkeypatch.setitem(registry.GROUPS, "model", MoreModelArguments)
    forget()


def test_one_more_field_is_a_whole_setting(one_more, tmp_path):
    assert parse_arguments(VALID).model.num_heads_kept == 3
    path = tmp_path / "args.json"
    path.write_text(json.dumps({"heads": 5}))
    arguments = parse_arguments([str(path), *VALID])
    assert arguments.model.num_heads_kept == 5 and "num_heads_kept" in arguments.given
    assert arguments.to_json()["num_heads_kept"] == 5
    assert arguments.model_config_kwargs()["num_heads_kept"] == 5
    for word, part in (("10", "num_heads_kept is 10: it must be from 1 up to 9"), ("x", "a whole number")):
        with pytest.raises(UserError, match=part):
            parse_arguments([*VALID, "--num_heads_kept", word])
    assert re.search(r"--num_heads_kept \[3\] +Heads that are kept\.", format_help(every_setting=False))
    described = json_schema()["properties"]
    assert (
        described["heads"]["anyOf"] == described["num_heads_kept"]["anyOf"]
        and described["heads"]["deprecated"]
    )
    assert described["heads"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 9}
    assert "| `num_heads_kept` | int | `3` | 1 ≤ x ≤ 9 | may change |" in format_page(ENGLISH)
    assert "保留的头数。" in format_page(CHINESE)


def test_one_more_row_about_a_training_argument_is_enough(monkeypatch, read_anew):
    rows = registry.read_rows("training_records.json")
    rows["others"]["lr_end"] = {"range": {"low": 2, "high": 4}, "aliases": ["last_rate"], "may_grow": True}
    read_rows = registry.read_rows
    monkeypatch.setattr(
        registry, "read_rows", lambda name: rows if name == "training_records.json" else read_rows(name)
    )
    forget()
    assert parse_arguments([*VALID, "--last_rate", "3"]).training.lr_end == 3
    with pytest.raises(UserError, match=r"lr_end is 1\.0: it must be at least 2"):
        parse_arguments([*VALID, "--lr_end", "1"])
    assert "2 ≤ x ≤ 4 | may grow |" in format_page(ENGLISH)


def test_what_may_change_on_resume_stands_in_the_record(one_more, tmp_path):
    before = parse_arguments(VALID).to_json()
    (tmp_path / ARGUMENTS_FILE).write_text(json.dumps(before))
    after = {**before, "num_heads_kept": 4, "lora_rank": 16, "max_steps": 7, "save_steps": 9}
    assert RunDirectory(tmp_path).changes(after) == {"lora_rank": (8, 16), "max_steps": (-1, 7)}
    grows = {name for name, record in known_settings().items() if record.may_grow}
    assert grows == {"max_steps", "num_train_epochs"}


def test_an_attribute_that_no_record_has_is_a_mistake(monkeypatch, read_anew):
    broken = dataclasses.make_dataclass("Broken", [("x", int, setting(1, "x", "x", lowest=2))])
    monkeypatch.setitem(registry.GROUPS, "model", broken)
    forget()
    with pytest.raises(TypeError, match="lowest"):
        known_settings()


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        (Range(0, 1, is_interval=True), (0, 0.5, 1), {-1: "from 0 up to 1", 2: "from 0 up to 1"}),
        (
            Range(0, 1, low_allowed=False, high_allowed=False, is_interval=True),
            (0.5,),
            {0: "above 0 to below 1"},
        ),
        (Range(1, 9), (1, 9), {0: "at least 1", 10: "at most 9"}),
        (Range(0, 9, low_allowed=False), (0.1, 9), {0: "more than 0", 9.5: "at most 9"}),
    ],
)
def test_ranges(allowed, inside, outside):
    assert [allowed.find_fault("x", value) for value in inside] == [None] * len(inside)
    for value, words in outside.items():
        assert allowed.find_fault("x", value) == f"x is {value}: it must be {words}"


def test_a_value_that_does_nothing_is_mentioned_unless_it_asks_for_nothing():
    def warn(group="training", value=True, **facts):
        record = Setting(name="x", group=group, type="int", default=7, help="", ignored="no use", **facts)
        return record.find_ignored(value)

    assert warn() == "x has no effect here: no use"
    assert [warn(value=value) for value in (None, False, 0, -1, 7, "")] == [None] * 6
    assert warn(quiet=True) is None and warn(quiet_value=5, value=5) is None
    assert warn(group="foreign", value=7) and warn(group="foreign", value=-1)


# Texts


def test_our_settings_are_explained_in_chinese_too():
    ours = [record for record in known_settings().values() if record.group != "training"]
    assert len(ours) > 80
    assert [record.name for record in ours if not re.search("[\u4e00-\u9fff]", record.help_zh)] == []


@pytest.mark.parametrize("language", [ENGLISH, CHINESE], ids=lambda language: language.file)
def test_the_page_of_settings_is_current(language):
    written = (ROOT / "docs" / language.file).read_text(encoding="utf-8")
    assert written == format_page(language), "run python tools/settings_table.py"
    assert [name for name in known_settings() if f"| `{name}` |" not in written] == []
