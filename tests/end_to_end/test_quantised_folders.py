"""A folder that others quantised, through the commands: train, continue, evaluate, answer, export."""

from __future__ import annotations

import json
import shutil

import pytest

from finetune.errors import UserError
from finetune.serving.decoding.options import ModelOptions
from finetune.serving.predict.loading import plan_model
from tests.conftest import launch, losses, run_entry
from tests.quantised_folders import write_hugging_face, write_quantised
from tests.serving.export.builders import export_folder

LORA = {"lora": True, "lora_rank": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "save_strategy": "steps", "save_steps": 4, "do_eval": True}  # fmt: skip


@pytest.fixture(scope="module")
def base(sharp_llama, tmp_path_factory):
    """A Llama as AutoGPTQ writes it."""
    folder = tmp_path_factory.mktemp("gptq")
    return write_quantised(write_hugging_face(sharp_llama, folder / "plain"), folder / "base", "gptq order")


@pytest.fixture(scope="module")
def trained(base, write_run):
    """Argument file and output folder of a finished run."""
    arguments, out = write_run("stored", **LORA, max_steps=8, model_name_or_path=str(base))
    assert run_entry(arguments) == 0
    return arguments, out


def test_a_run_that_is_continued_has_the_same_curve(trained, base, write_run):
    arguments, out = write_run("continued", **LORA, max_steps=4, model_name_or_path=str(base))
    assert run_entry(arguments) == 0
    assert run_entry(arguments, "--max_steps", 8) == 0
    assert losses(out) == losses(trained[1])
    assert losses(out)[-1] < losses(out)[0] - 0.1


def test_evaluation_takes_the_adapter_on_the_same_base(trained, base, write_run):
    arguments, out = write_run("evaluated", do_train=False, do_eval=True, lora=True, lora_path=str(trained[1]),
                               model_name_or_path=str(base))  # fmt: skip
    assert run_entry(arguments) == 0
    expected, found = (json.loads((folder / "all_results.json").read_text()) for folder in (trained[1], out))
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)


def test_answers_and_the_exported_graph_agree(trained, base, small_data, tmp_path):
    export_folder(base, tmp_path / "graph", lora_path=trained[1])
    assert "quantization_config" not in (tmp_path / "graph" / "config.json").read_text()
    commands = {
        "dynamic": ["--model_name_or_path", base, "--lora_path", trained[1]],
        "static": ["--model_name_or_path", tmp_path / "graph"],
    }
    answers = []
    for name, options in commands.items():
        path = tmp_path / f"{name}.jsonl"
        common = ["--data_file", small_data / "dev.json", "--max_new_tokens", "8", "--output_file", path]
        result = launch("predict_generation.py", *options, *common)
        assert result.returncode == 0, result.stderr[-3000:]
        answers.append([json.loads(line)["output"] for line in path.read_text(encoding="utf-8").splitlines()])
    assert answers[0] == answers[1]
    assert any(answers[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": False}, "packed weights cannot be trained: add --lora true"),
        ({"weight_quantize_algo": "nf4"}, "is quantised already (GPTQ, 4 bits, groups of 32)"),
        ({"pissa": True}, "set pissa false"),
    ],
)
def test_what_cannot_be_done_with_it_is_told_first(base, write_run, capsys, settings, message):
    arguments, _ = write_run("refused", **LORA | settings, max_steps=8, model_name_or_path=str(base))
    assert run_entry(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_over_another_quantised_base_is_told(base, sharp_llama, write_run, tmp_path, capsys):
    arguments, out = write_run("other", **LORA, max_steps=4, model_name_or_path=str(sharp_llama),
                               weight_quantize_algo="nf4")  # fmt: skip
    assert run_entry(arguments) == 0
    again, _ = write_run("again", **LORA, max_steps=4, model_name_or_path=str(base), lora_path=str(out))
    capsys.readouterr()
    assert run_entry(again) == 2
    said = "was trained over a base in nf4 in blocks of 64, and model"
    told = capsys.readouterr().err
    assert said in told and 'or set weight_quantize_algo to "off" to use it over this one' in told
    with pytest.raises(UserError, match="add --base original to use it over this one"):
        plan_model(ModelOptions(model_name_or_path=str(base), lora_path=out))
    plan_model(ModelOptions(model_name_or_path=str(base), lora_path=out, base="original"))
    with pytest.raises(UserError, match=said):
        export_folder(base, tmp_path / "graph", lora_path=out)


def test_what_no_layer_can_be_read_from_is_told_before_data_are(base, write_run, tmp_path, capsys):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    facts = config["quantization_config"] | {"sym": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": facts}))
    arguments, out = write_run("contradiction", **LORA, max_steps=8, model_name_or_path=str(folder),
                               dataset_name_or_path="data_that_is_never_read")  # fmt: skip
    assert run_entry(arguments) == 2
    told = capsys.readouterr().err
    assert "zero points are not 8" in told and "although sym is true in config.json" in told
    assert not out.exists()
