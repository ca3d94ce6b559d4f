"""Thoughts before answers: trained from data that hold some, and switched off in training and in answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.data.reading.conversation import make_conversation
from finetune.models.tiny.checkpoint import build_tiny
from finetune.serving.decoding.options import ModelOptions
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.predict.loading import load_responder, plan_model
from finetune.serving.predict.responder import stop_ids
from tests.conftest import launch, run_entry

PLACE = "<think>\n\n</think>\n\n"
ASKS = "<|im_start|>assistant\n"
HISTORY = (
    "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build_tiny("qwen3", tmp_path_factory.mktemp("qwen3") / "model", num_layers=1, hidden_size=32)


def train(
    model: Path, folder: Path, capsys: pytest.CaptureFixture[str], *, thoughts: bool, **settings
) -> str:
    """Trains on conversations of two rounds; what the run says."""
    answers = [{"role": "assistant", "content": f"a{i}"} for i in (1, 2)]
    if thoughts:
        answers = [each | {"reasoning_content": f"t{i}"} for i, each in enumerate(answers, 1)]
    messages = [
        part for i, each in enumerate(answers, 1) for part in ({"role": "user", "content": f"q{i}"}, each)
    ]
    (folder / "data").mkdir(parents=True)
    for name in ("train", "dev"):
        (folder / "data" / f"{name}.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * 4)
    path = folder / "run.json"
    path.write_text(json.dumps({
        "model_name_or_path": str(model), "dataset_name_or_path": str(folder / "data"), "device": "cpu",
        "output_dir": str(folder / "out"), "do_train": True, "max_steps": 1, "save_strategy": "no", "max_length": 200,
        "src_length": 150, "per_device_train_batch_size": 2, "data_cache": False, **settings,
    }))  # fmt: skip
    code = run_entry(path)
    said = capsys.readouterr()
    assert (code == 0) == (not thoughts or settings.get("enable_thinking") is not False), said.err
    return said.err


def asked_with(folder: Path, **options) -> str:
    plan = plan_model(ModelOptions(model_name_or_path=str(folder), **options))
    conversation = make_conversation([("q1", f"{PLACE}a1"), ("q2", "")])
    return "".join(piece.text for piece in plan.template.render_prompt(conversation))


def test_the_switch_of_the_training_is_that_of_the_answers(model, tmp_path, capsys):
    said = train(model, tmp_path, capsys, thoughts=False, enable_thinking=False)
    assert "8 samples from 4 lines" in said and "each answer is a sample of its own: 4" in said
    out = tmp_path / "out"
    assert asked_with(out) == HISTORY + ASKS + PLACE
    assert asked_with(out, enable_thinking=True) == HISTORY + ASKS
    responder = load_responder(plan_model(ModelOptions(model_name_or_path=str(out))))
    assert responder.encoder.encode_special("<|im_end|>")[0] in stop_ids(
        responder.encoder, responder.template
    )
    settings = DecodingSettings(max_new_tokens=6)
    off = responder.answer([("q1", "a1")], "q2", settings)
    on = load_responder(plan_model(ModelOptions(model_name_or_path=str(out), enable_thinking=True)))
    assert on.answer([("q1", "a1")], "q2", settings) != off
    data, answers = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    line = {
        "messages": [
            {"role": role, "content": text}
            for role, text in (("user", "q1"), ("assistant", "a1"), ("user", "q2"))
        ]
    }
    data.write_text(json.dumps(line) + "\n")
    done = launch(
        "predict_generation.py", "--model_name_or_path", out, "--data_file", data, "--output_file", answers,
        "--max_new_tokens", 6, "--device", "cpu", "--enable_thinking", "false",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(answers.read_text())["output"] == off


def test_thoughts_are_learned_and_refused_with_the_switch_off(model, tmp_path, capsys):
    said = train(model, tmp_path / "on", capsys, thoughts=True)
    assert "answers whose reasoning the chat template writes, so that it is learned: 8" in said
    assert asked_with(tmp_path / "on" / "out") == HISTORY + ASKS
    said = train(model, tmp_path / "off", capsys, thoughts=True, enable_thinking=False)
    assert "it holds thoughts, and enable_thinking is false" in said
