"""Reading and converting: the file, the command line, one setting under two names."""

import json
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.settings.arguments import parse_arguments
from finetune.settings.parsing import describe_unknown
from tests.settings.argument_files import VALID, parse

pytestmark = pytest.mark.usefixtures("in_a_folder_with_data")


def faults_of(settings=None, *words: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        parse(settings, *words)
    return list(caught.value.faults)


def file_fault(text: str | bytes) -> str:
    Path("bad.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        parse_arguments(["bad.json"])
    assert len(caught.value.faults) == 1
    return caught.value.faults[0]


# The command line


def test_command_line_wins_over_the_file():
    arguments = parse({"max_length": 4096, "lora": True}, "--max_length", "3000", "--lora", "false")
    assert (arguments.data.max_length, arguments.model.lora) == (3000, False)


@pytest.mark.parametrize("word", ["false", "False", "FALSE", "0", "no", "off"])
def test_words_for_false(word):
    assert parse({"lora": True}, "--lora", word).model.lora is False
    assert parse({"lora": True}, f"--lora={word}").model.lora is False


@pytest.mark.parametrize(
    "words", [["--lora"], ["--lora", "true"], ["--lora=True"], ["--lora", "1"], ["--lora", "yes"]]
)
def test_words_for_true(words):
    assert parse({}, *words).model.lora is True


def test_negative_numbers_are_values():
    arguments = parse({}, "--max_steps", "-1", "--tensor_parallel_degree=-1")
    assert (arguments.training.max_steps, arguments.training.tensor_parallel_degree) == (-1, -1)
    assert "learning_rate is -1e-05" in faults_of({}, "--learning_rate", "-1e-5")[0]


def test_lists_take_several_words_or_json():
    assert parse({}, "--lora_target_modules", ".*q_proj.*", ".*v_proj.*").model.lora_target_modules == [
        ".*q_proj.*",
        ".*v_proj.*",
    ]
    assert parse({}, "--no_recompute_layers", "0", "1", "--lora").model.no_recompute_layers == [0, 1]
    assert parse({}, "--skip_data_intervals", "[[1, 2], [5, 6]]").training.skip_data_intervals == [
        [1, 2],
        [5, 6],
    ]
    assert "a list of whole numbers" in faults_of({}, "--no_recompute_layers", "a")[0]
    assert "as JSON" in faults_of({}, "--no_recompute_layers", "[0")[0]


def test_null_on_the_command_line_restores_the_default():
    arguments = parse(
        {"lora_alpha": 5, "report_to": ["visualdl"]}, "--lora_alpha", "null", "--report_to", "none"
    )
    assert (arguments.model.lora_alpha, arguments.training.report_to) == (16.0, [])


def test_dashes_and_last_word_counts():
    assert parse({}, "--max-length", "3000", "--max_length", "3001").data.max_length == 3001


def test_values_may_contain_an_equals_sign():
    assert parse({}, "--run_name=a=b").training.run_name == "a=b"


def test_without_a_file():
    words = [word for name, value in VALID.items() for word in (f"--{name}", str(value))]
    assert parse_arguments(words).training.do_train is True


def test_more_than_one_value_is_a_fault():
    assert faults_of({}, "--learning_rate", "1", "2") == [
        'learning_rate is ["1", "2"] on the command line: one value is needed, not 2; '
        "a finite number is needed, for example 5e-05"
    ]


def test_a_missing_value_is_a_fault():
    assert (
        "learning_rate is without a value on the command line: one value is needed"
        in faults_of({}, "--learning_rate")[0]
    )


def test_stray_words_are_a_fault():
    with pytest.raises(UserError, match='"stray" is neither a --key nor the argument file'):
        parse_arguments(["args.json", "stray"])
    with pytest.raises(UserError) as caught:
        parse_arguments(["args.toml", "--lora_rnk", "2"])
    assert ["args.toml" in fault for fault in caught.value.faults] == [True, False]


# The file


def test_a_missing_file():
    with pytest.raises(UserError) as caught:
        parse_arguments(["absent.json"])
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].startswith("argument file absent.json does not exist (looked in ")


def test_a_syntax_error_names_line_and_column():
    assert "bad.json, line 3, column 1: not valid JSON" in file_fault('{\n  "lora": true,\n}\n') or (
        # Python 3.13 words and places the error of a trailing comma differently
        "bad.json, line 2, column" in file_fault('{\n  "lora": true,\n}\n')
    )


@pytest.mark.parametrize("text", ["[1]", "3", '"text"', "null"])
def test_a_file_without_an_object(text):
    assert "holds no JSON object" in file_fault(text)


def test_files_that_are_no_json_at_all():
    assert "not UTF-8" in file_fault(b'{"a": "\xff"}')
    assert "cannot be read as JSON" in file_fault("[" * 100_000)
    Path("folder.json").mkdir()
    with pytest.raises(UserError, match=r"folder\.json cannot be read"):
        parse_arguments(["folder.json"])


def test_a_byte_order_mark_is_no_fault():
    Path("args.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(VALID).encode())
    assert parse_arguments(["args.json"]).training.do_train is True


def test_duplicate_keys_are_a_fault():
    Path("twice.json").write_text(json.dumps(VALID)[:-1] + ', "lora": true, "lora": true}')
    with pytest.raises(UserError) as caught:
        parse_arguments(["twice.json"])
    assert caught.value.faults == ('"lora" stands more than once in twice.json: keep one',)


def test_unknown_key_in_the_file_names_the_file():
    assert faults_of({"lora_rnk": 4}) == [
        'unknown setting "lora_rnk" in args.json: did you mean "lora_rank"?'
    ]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("learning_rate", "3e-5", 3e-5),
        ("learning_rate", 1, 1.0),
        ("max_steps", 3.0, 3),
        ("max_steps", "1e3", 1000),
        ("max_steps", "12", 12),
        ("do_eval", "false", False),
        ("bf16_full_eval", "False", False),
        ("sharding", True, "stage1"),
        ("sharding", "stage2", "stage2"),
        ("report_to", "visualdl", ["visualdl"]),
        ("report_to", "none", []),
        ("save_total_limit", None, None),
        ("logging_steps", None, 500),
    ],
)
def test_values_that_fit(name, value, expected):
    converted = getattr(parse({name: value}).training, name)
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("learning_rate", "abc", "a finite number"),
        ("learning_rate", True, "a finite number"),
        ("learning_rate", float("nan"), "a finite number"),
        ("learning_rate", float("inf"), "a finite number"),
        ("learning_rate", "inf", "a finite number"),
        ("learning_rate", 10**400, "a finite number"),
        ("learning_rate", [1], "a finite number"),
        ("max_steps", 1.5, "a whole number"),
        ("max_steps", True, "a whole number"),
        ("max_steps", "", "a whole number"),
        ("do_eval", 2, "true or false"),
        ("do_eval", -1, "true or false"),
        ("do_eval", "maybe", "true or false"),
        ("run_name", 3, "a text"),
        ("lora_target_modules", 3, "a list of texts"),
        ("lora_target_modules", [1], "a list of texts"),
        ("no_recompute_layers", ["a"], "a list of whole numbers"),
        ("skip_data_intervals", [1], "a list of lists of whole numbers"),
        ("model_name_or_path", {"a": 1}, "a text"),
    ],
)
def test_values_that_do_not_fit(name, value, allowed):
    (fault,) = faults_of({name: value})
    assert fault.startswith(f"{name} is ") and " in args.json: " in fault and allowed in fault


def test_a_long_value_is_cut_in_the_message():
    (fault,) = faults_of({"max_steps": "x" * 5000})
    assert len(fault) < 200 and "..." in fault


def test_a_wrong_value_in_the_file_can_be_replaced_by_a_right_one():
    # the file stays at fault: it would fail again without the override
    assert len(faults_of({"max_steps": "x"}, "--max_steps", "3")) == 1


# One setting, two names


@pytest.mark.parametrize(
    "settings", [{"intokens": True}, {"zero_padding": True}, {"intokens": True, "zero_padding": True}]
)
def test_intokens_and_zero_padding_are_one_setting(settings):
    data = parse(settings).data
    assert data.intokens is True and data.zero_padding is True


def test_packing_goes_with_evaluation_by_generation():
    assert parse({"intokens": True, "eval_with_do_generation": True}).data.zero_padding is True


def test_the_command_line_wins_under_the_other_name_too():
    assert parse({"zero_padding": True}, "--intokens", "false").data.zero_padding is False


def test_two_names_with_two_values_are_a_fault():
    assert faults_of({"task_name_or_path": "a", "dataset_name_or_path": "b"})[0] == (
        "dataset_name_or_path and task_name_or_path are one setting, "
        'but in args.json they are "b" and "a": keep one of them'
    )


@pytest.mark.parametrize("packs", [True, False])
def test_intokens_wins_over_the_later_name_as_in_paddlenlp(packs):
    for names in (("intokens", "zero_padding"), ("zero_padding", "intokens")):
        settings = {name: packs if name == "intokens" else not packs for name in names}
        assert parse(settings).data.zero_padding is packs


def test_null_beside_the_other_name_is_no_conflict():
    assert parse({"intokens": None, "zero_padding": True}).data.zero_padding is True
    assert parse({"zero_padding": True, "intokens": None}).data.zero_padding is True


def test_options_of_the_launcher_are_told_from_typing_errors():
    line = describe_unknown("log_dir", "on the command line")
    assert "option of the launcher" in line and "--log_dir VALUE finetune_generation.py" in line
