"""The command: its options, what it refuses before loading, and one life from start to SIGTERM."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import openai
import pytest

from finetune.errors import UserError
from finetune.serving.api import options as module
from finetune.serving.api.options import API_KEY, parse_options
from tests.conftest import ROOT
from tests.serving.predict.builders import save_lora

KEY = "sk-of-this-test"


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(API_KEY.variable, raising=False)


def test_the_model_is_named_in_either_way_and_once(tmp_path, capsys):
    for words in ([str(tmp_path / "llama")], ["--model_name_or_path", str(tmp_path / "llama")]):
        options = parse_options(["--device", "cpu", *words])
        assert options.model.model_name_or_path == str(tmp_path / "llama") and options.served_name == "llama"
        assert (options.host, options.port, options.temperature, options.api_key) == (
            "127.0.0.1",
            8000,
            1.0,
            None,
        )
    for words in ([], ["a", "--model_name_or_path", "b"]):
        with pytest.raises(SystemExit) as caught:
            parse_options(words)
        assert caught.value.code == 2 and "give one model" in capsys.readouterr().err


def test_the_name_is_the_adapters_or_what_is_said():
    assert parse_options(["base", "--lora_path", "runs/mine/", "--device", "cpu"]).served_name == "mine"
    assert parse_options(["base", "--served_model_name", "a/b", "--device", "cpu"]).served_name == "a/b"


def test_faults_come_before_loading_and_all_at_once(monkeypatch):
    options = parse_options(["model", "--device", "cpu"])
    options.check()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    bad = replace(
        options, port=70_000, max_batch_size=0, max_waiting=-1, max_new_tokens=0, temperature=2.5, top_p=0.0,
        request_timeout=float("nan"), shutdown_timeout=-1, served_name=" ",
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        bad.check()
    assert len(caught.value.faults) == 10 and "starlette and uvicorn" in caught.value.faults[-1]


def test_other_machines_need_a_key(monkeypatch, tmp_path):
    def check(*words: str) -> str | None:
        options = parse_options(["model", "--device", "cpu", "--host", "0.0.0.0", *words])
        options.check()
        return options.api_key

    with pytest.raises(UserError, match=f"the API key is missing.*--api_key_file.*{API_KEY.variable}"):
        check()
    monkeypatch.setenv(API_KEY.variable, "short")
    with pytest.raises(UserError, match="5 characters but must have at least 8"):
        check()
    monkeypatch.setenv(API_KEY.variable, KEY)
    assert check() == KEY and KEY not in repr(parse_options(["model", "--device", "cpu"]))
    path = tmp_path / "key"
    path.write_text(f"{KEY}-of-a-file\n")
    assert check("--api_key_file", str(path)) == f"{KEY}-of-a-file"
    with pytest.raises(UserError, match="is not a file"):
        check("--api_key_file", str(tmp_path))


@pytest.mark.parametrize("word", ["--api_key", "--api-key"])
def test_a_key_is_no_word_of_the_command_line(capsys, word):
    with pytest.raises(SystemExit) as caught:
        parse_options(["model", word, KEY])
    told = capsys.readouterr().err
    assert caught.value.code == 2 and "--api_key_file" in told and KEY not in told


@contextlib.contextmanager
def command(folder, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command while it serves, and its address."""
    line = [sys.executable, "-m", "finetune", "serve", *words, "--port", "0", "--device", "cpu"]
    with (folder / "errors").open("w+") as errors:
        process = subprocess.Popen(
            line, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=errors, text=True
        )  # fmt: skip
        try:
            assert process.stdout is not None
            found = re.search(r"http://127\.0\.0\.1:\d+/v1", process.stdout.readline())
            errors.seek(0)
            assert found, errors.read()
            yield process, found[0]
        finally:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_one_life_of_the_command(sharp_llama, tmp_path):
    adapter, key = save_lora(sharp_llama, tmp_path / "mine"), tmp_path / "key"
    key.write_text(KEY)
    words = [
        str(sharp_llama),
        "--lora_path",
        str(adapter),
        "--api_key_file",
        str(key),
        "--chat_template",
        "vicuna",
    ]
    with command(tmp_path, *words) as (process, url):
        client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
        fields = {"model": "mine", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
        whole = client.chat.completions.create(**fields, max_tokens=40)
        stream = iter(client.chat.completions.create(**fields, max_tokens=40, stream=True))
        text = next(stream).choices[0].delta.content or ""
        process.send_signal(signal.SIGTERM)
        text += "".join(part.choices[0].delta.content or "" for part in stream)
        assert text == whole.choices[0].message.content
        assert process.wait(30) == 0
    told = (tmp_path / "errors").read_text()
    assert "stopped" in told and "Traceback" not in told and "ERROR" not in told and KEY not in told
