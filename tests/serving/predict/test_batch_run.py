"""Files in, files out; what a killed run keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from finetune.errors import UserError
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.predict.batch_run import run_batches
from finetune.serving.predict.journal import Journal, partial_path
from finetune.serving.predict.requests import read_requests
from tests.conftest import ROOT, launch
from tests.serving.predict.builders import ScriptedDecoder

SETTINGS = DecodingSettings(max_new_tokens=8, top_k=0, seed=3)
SOURCES = ("上衣", "a much longer request for a red dress", "裙", "a red dress", "白色 上衣 显瘦")


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [json.dumps({"src": source, "id": number}) for number, source in enumerate(SOURCES)]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def answer_file(responder, data_file, output, *, batch_size=2, settings=SETTINGS):
    with Journal(output, {"seed": settings.seed}) as journal:
        run_batches(
            responder,
            read_requests(data_file),
            settings,
            journal,
            batch_size=batch_size,
            show_message=lambda line: None,
        )
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_lines_keep_their_order_and_the_batch_size_changes_nothing(responder, data_file, tmp_path):
    first = answer_file(responder, data_file, tmp_path / "a.jsonl")
    second = answer_file(responder, data_file, tmp_path / "b.jsonl", batch_size=5)
    assert first == second
    assert [(line["src"], line["id"]) for line in first] == list(zip(SOURCES, range(5), strict=True))
    assert len({line["output"] for line in first}) == 5
    other = answer_file(responder, data_file, tmp_path / "c.jsonl", settings=replace(SETTINGS, seed=4))
    assert other != first
    assert not partial_path(tmp_path / "a.jsonl").exists()


def test_longest_prompts_go_first_and_samples_are_line_numbers(responder, data_file, tmp_path):
    decoder = ScriptedDecoder([300])
    answer_file(replace(responder, decoder=decoder), data_file, tmp_path / "out.jsonl")
    lengths = [max(map(len, rows)) for rows, _ in decoder.calls]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 3
    assert sorted(line for _, samples in decoder.calls for line in samples) == [0, 1, 2, 3, 4]
    assert decoder.calls[0][1][0] == 1


def test_an_interrupted_run_computes_only_what_is_missing(responder, data_file, tmp_path):
    output = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_file(replace(responder, decoder=ScriptedDecoder([300], fail_at=1)), data_file, output)
    assert not output.exists()
    with partial_path(output).open("a") as file:
        file.write('{"line": 4, "outp')  # what a kill cuts off
    decoder = ScriptedDecoder([301])
    lines = answer_file(replace(responder, decoder=decoder), data_file, output)
    again = sorted(line for _, samples in decoder.calls for line in samples)
    assert len(again) == 3
    known = {responder.encoder.decode([token]) for token in (300, 301)}
    assert {line["output"] for line in lines} == known and len(lines) == 5
    assert all(lines[line]["output"] == responder.encoder.decode([301]) for line in again)


def test_other_settings_do_not_go_on(data_file, tmp_path):
    output = tmp_path / "out.jsonl"
    with Journal(output, {"seed": 1, "top_k": 1}):
        pass
    with Journal(output, {"seed": 2, "top_k": 1}) as journal:  # nothing was finished: begin anew
        journal.add({0: "x"})
        with pytest.raises(UserError, match=r"in use by another running process \(process \d+ on"):
            Journal(output, {"seed": 2, "top_k": 1})
    with pytest.raises(UserError, match=r"1 answers of a run with other settings: seed was 2, is 3\. Give"):
        Journal(output, {"seed": 3, "top_k": 1})
    partial_path(output).write_text("nonsense\n")
    with pytest.raises(UserError, match=r"partial cannot be read: remove it"):
        Journal(output, {})


def test_a_finished_output_is_not_overwritten(data_file, tmp_path):
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(UserError, match="exists already: give another name"):
        Journal(tmp_path / "out.jsonl", {})
    with pytest.raises(UserError, match="there is no folder"):
        Journal(tmp_path / "none" / "out.jsonl", {})


def test_faults_of_prompts(responder, data_file, tmp_path):
    data_file.write_text('{"src": "x"}\n')
    settings = replace(SETTINGS, max_new_tokens=256)
    with pytest.raises(UserError, match="has positions for 256 tokens"):
        answer_file(responder, data_file, tmp_path / "out.jsonl", settings=settings)
    said: list[str] = []
    data_file.write_text(json.dumps({"src": "x" * 400}) + "\n")
    with Journal(tmp_path / "cut.jsonl", {}) as journal:
        run_batches(
            responder, read_requests(data_file), SETTINGS, journal, batch_size=1, show_message=said.append
        )
    assert said[0] == "1 of 1 prompts were cut to 248 tokens."


@pytest.mark.slow
def test_a_killed_process_goes_on(sharp_llama, exported_llama, tmp_path):
    data, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps({"src": f"row {number}"}) + "\n" for number in range(24)))
    command = [
        "predict_generation.py", "--model_name_or_path", str(sharp_llama), "--data_file", str(data), "--batch_size",
        "1", "--max_new_tokens", "40", "--min_new_tokens", "40", "--device", "cpu", "--top_p", "0.9",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, *command, "--output_file", str(output)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    partial, deadline = partial_path(output), time.monotonic() + 60
    while time.monotonic() < deadline and not (partial.exists() and partial.read_bytes().count(b"\n") > 2):
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = partial.read_text().splitlines()[1:]
    assert 0 < len(kept) < 24
    result = launch(*command, "--output_file", output)
    assert result.returncode == 0, result.stderr
    assert "Going on: " in result.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["src"] for line in lines] == [f"row {number}" for number in range(24)]
    for line in kept:
        record = json.loads(line) if line.endswith("}") else None
        assert record is None or lines[record["line"]]["output"] == record["output"]
    static = tmp_path / "static.jsonl"
    command[2], command[6] = str(exported_llama), "4"
    assert launch(*command, "--output_file", static).returncode == 0
    assert static.read_text() == output.read_text()
