"""Values that no file system, no text file and no pattern could take; and tokens, which no message repeats."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from finetune.errors import UserError
from finetune.settings.arguments import parse_arguments
from tests.conftest import ROOT

GOOD = {
    "model_name_or_path": "some-model",
    "dataset_name_or_path": "some-data",
    "output_dir": "out",
    "do_train": True,
}
TOKEN = "hf_AbCdEfGhIjKl"


@pytest.fixture
def faults_of(tmp_path):
    def parse(settings, *words):
        path = tmp_path / "arguments.json"
        path.write_bytes(json.dumps(GOOD | settings).encode("utf-8", "surrogatepass"))
        with pytest.raises(UserError) as caught:
            parse_arguments([str(path), *words])
        return caught.value.faults

    return parse


@pytest.mark.parametrize(
    "name", ["output_dir", "system", "model_name", "chat_template", "run_name", "metrics_output_path"]
)
@pytest.mark.parametrize(
    ("value", "shown", "reason"),
    [
        ("a\0b", r'"a\u0000b"', r"it holds a null character (\u0000): remove it"),
        ("a\ud800b", r'"a\ud800b"', r"it holds half a character (\ud800), no text in UTF-8: correct it"),
        ("a\udcffb", r'"a\udcffb"', r"it holds half a character (\udcff), no text in UTF-8: correct it"),
    ],
    ids=["null", "half", "byte"],
)
def test_characters_of_no_text(faults_of, name, value, shown, reason):
    (fault,) = faults_of({name: value})
    assert fault.startswith(f"{name} is {shown} in ") and fault.endswith(reason)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modules_to_save", ["embed", "a\0"]),
        ("dataset_mix", [{"path": "a\0b"}]),
        ("dataset_mix", [{"pa\0th": "b"}]),
        ("do_export", "a\0b"),
        ("stop_words", ["a\ud800"]),
    ],
)
def test_they_are_found_at_any_depth(faults_of, name, value):
    faults = faults_of({name: value})
    assert any(
        "null character" in fault or "half a character" in fault or "unknown" in fault for fault in faults
    )
    "\n".join(faults).encode()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_dir", "n" * 300),
        ("output_dir", "a/" * 3000),
        ("logging_dir", "n" * 300),
        ("data_cache_dir", "n" * 300),
        ("model_name_or_path", "./" + "n" * 300),
        ("tokenizer_name_or_path", "./" + "n" * 300),
        ("dataset_name_or_path", "./" + "n" * 300),
        ("chat_template", "./" + "n" * 300),
        ("dataset_mix", [{"path": "n" * 300}]),
    ],
)
def test_paths_that_are_too_long(faults_of, name, value):
    faults = faults_of({name: value})
    assert any(name in fault and "which cannot be used (File name too long): choose a shorter path" in fault
               for fault in faults)  # fmt: skip
    assert all(len(fault) < 400 for fault in faults)


@pytest.mark.parametrize("pattern", ["(", "[a-", "*", "a{1,0}", "(?P<a", "\\"])
def test_patterns_that_are_none(faults_of, pattern):
    (fault,) = faults_of({"lora": True, "lora_target_modules": ["good", pattern]})
    assert "which is no regular expression" in fault and fault.startswith("lora_target_modules")


@pytest.mark.parametrize("value", [1e308, 10**18, 10**400, -(10**400), float("nan"), float("inf"), "1e999"])
@pytest.mark.parametrize(
    "name", ["max_steps", "learning_rate", "seed", "max_length", "warmup_ratio", "logging_steps"]
)
def test_numbers_beyond_every_range(faults_of, name, value):
    faults = faults_of({name: value})
    assert any(fault.startswith(f"{name} is ") for fault in faults)


@pytest.mark.parametrize("name", ["aistudio_token", "wandb_api_key", "wandb_http_proxy"])
@pytest.mark.parametrize("value", [[TOKEN], {"value": TOKEN}, [[TOKEN]], f"{TOKEN}\0", f"{TOKEN}\ud800"])
def test_tokens_are_not_echoed(faults_of, name, value):
    faults = faults_of({name: value})
    assert any(fault.startswith(f"{name} is (not shown)") for fault in faults)
    assert TOKEN not in "\n".join(faults)


@pytest.mark.parametrize("name", ["hub_token", "hf_hub_token", "swanlab_api_key", "my_secret", "password"])
def test_tokens_of_other_tools_are_not_echoed(faults_of, name):
    assert TOKEN not in "\n".join(faults_of({name: TOKEN, "lora_dropout": 7}, f"--{name}", TOKEN, TOKEN))


@pytest.mark.parametrize("name", ["aistudio_token", "wandb_api_key", "wandb_http_proxy"])
def test_tokens_are_not_written(tmp_path, name):
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps(GOOD | {name: TOKEN}))
    args = parse_arguments([str(path)])
    assert TOKEN not in json.dumps(args.to_json()) and TOKEN not in "\n".join(args.warnings)


def test_an_argument_file_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "arguments.json")
    result = subprocess.run(
        [sys.executable, "finetune_generation.py", str(tmp_path / "arguments.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2
    assert "it is a pipe or a device, not a file" in result.stderr and "Traceback" not in result.stderr


def test_an_argument_file_without_end(tmp_path):
    path = tmp_path / "arguments.json"
    with path.open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(
        UserError, match=r"has more than 16,777,216 bytes: give the file of the settings alone"
    ):
        parse_arguments([str(path)])


@pytest.mark.parametrize(
    "address",
    [
        "https://user:hidden@host/model",
        "hf://owner/name?token=hidden",
        "hf://owner/name@main?a=b&api_key=hidden",
    ],
)
@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name_or_path", "lora_path"])
def test_passwords_in_addresses_are_refused_and_never_shown(name, address):
    with pytest.raises(UserError) as caught:
        parse_arguments(["--output_dir", "out", "--do_train", f"--{name}", address])
    assert f"{name} holds a password or a token" in str(caught.value)
    assert "hidden" not in str(caught.value)
