"""LoRA over a quantised base through the commands: train, kill and resume, evaluate, answer, export."""

from __future__ import annotations

import json
import signal

import pytest

from tests.conftest import launch, losses, run_entry
from tests.watched_runs import logged_steps, start, wait_until

QUANTISED = {"lora": True, "lora_rank": 4, "weight_quantize_algo": "nf4", "weight_double_quant": True}


@pytest.fixture(scope="module")
def prepare(write_run, sharp_llama):
    """Writes the argument file of a run into a fresh folder."""
    settings = {
        "max_steps": 20,
        "save_strategy": "steps",
        "save_steps": 5,
        "do_eval": True,
        "learning_rate": 1e-2,
    }
    return lambda name: write_run(name, **QUANTISED, **settings, model_name_or_path=str(sharp_llama))


@pytest.fixture(scope="module")
def trained(prepare):
    """Argument file and output folder of a finished run."""
    arguments, out = prepare("quantised")
    assert run_entry(arguments) == 0
    return arguments, out


def test_the_adapter_says_how_its_base_is_held(trained):
    _, out = trained
    for folder in (out, out / "checkpoint-10"):
        record = json.loads((folder / "adapter_facts.json").read_text())["base_quantisation"]
        assert record == {
            "algorithm": "nf4",
            "block_size": 64,
            "double_quant": True,
            "double_quant_block_size": 256,
        }
    assert losses(out)[-1] < losses(out)[0] - 0.1


def test_killed_run_continues_exactly(trained, prepare):
    arguments, out = prepare("killed")
    process = start(arguments)
    wait_until(lambda: logged_steps(out) >= 7, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert logged_steps(out) < 20, "it was killed too late to show anything"
    assert run_entry(arguments) == 0
    assert losses(out) == losses(trained[1])


def test_evaluation_takes_the_same_base_unless_told_otherwise(trained, write_run, sharp_llama):
    expected = json.loads((trained[1] / "all_results.json").read_text())["eval_loss"]
    found = []
    for algorithm in (None, "off"):
        arguments, out = write_run("evaluated", do_train=False, do_eval=True, lora=True, lora_path=str(trained[1]),
                                   weight_quantize_algo=algorithm, model_name_or_path=str(sharp_llama))  # fmt: skip
        assert run_entry(arguments) == 0
        found.append(json.loads((out / "all_results.json").read_text())["eval_loss"])
    assert found[0] == pytest.approx(expected, abs=1e-6)
    assert abs(found[1] - expected) > 1e-5


def test_a_finished_run_with_another_base_is_refused(trained, capsys):
    assert run_entry(trained[0], "--weight_quantize_algo", "fp4") == 2
    assert "weight_quantize_algo ('nf4' -> 'fp4')" in capsys.readouterr().err


def test_answers_and_the_exported_graph_use_the_same_base(trained, small_data, tmp_path):
    arguments, out = trained
    base = json.loads(arguments.read_text())["model_name_or_path"]
    common = ["--data_file", small_data / "dev.json", "--max_new_tokens", "8"]
    adapter = ["--model_name_or_path", base, "--lora_path", out]
    commands = {
        "trained": ["predict_generation.py", *adapter],
        "original": ["predict_generation.py", *adapter, "--base", "original"],
        "static": ["predict_generation.py", "--model_name_or_path", tmp_path / "graph"],
    }
    exported = launch("export_model.py", *adapter, "--output_path", tmp_path / "graph")
    assert exported.returncode == 0, exported.stderr[-3000:]
    answers = {}
    for name, command in commands.items():
        result = launch(*command, *common, "--output_file", tmp_path / f"{name}.jsonl")
        assert result.returncode == 0, result.stderr[-3000:]
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        answers[name] = [json.loads(line)["output"] for line in lines]
    assert answers["trained"] == answers["static"]
    assert answers["trained"] != answers["original"]
