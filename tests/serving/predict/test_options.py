"""The command line: what it means, and what is refused before anything expensive."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from finetune.errors import UserError
from finetune.serving.decoding.options import ModelOptions
from finetune.serving.predict.loading import plan_model
from finetune.serving.predict.run import parse_options
from tests.conftest import ROOT, launch


def parse(*argv):
    return parse_options(["--model_name_or_path", "x", *argv])


def test_any_sampling_option_turns_greedy_off():
    assert parse().settings.is_greedy
    assert parse("--temperature", "0.7").settings.top_k == 0
    assert parse("--top_p", "0.9").settings.top_p == 0.9 and not parse("--top_p", "0.9").settings.is_greedy
    assert parse("--top_k", "1", "--top_p", "0.9").settings.is_greedy
    with pytest.raises(UserError, match=r"top_p is 2\.0 but must be above 0"):
        parse("--top_p", "2")


def test_one_file_alone_is_refused():
    with pytest.raises(UserError, match="data_file is given without output_file: add --output_file"):
        parse("--data_file", "x").check()
    with pytest.raises(UserError, match="batch_size is 0 but must be at least 1"):
        parse("--batch_size", "0").check()


def test_faults_of_the_model_are_told_together(sharp_llama, exported_llama, tmp_path):
    options = ModelOptions(
        model_name_or_path=str(sharp_llama),
        lora_path=tmp_path,
        prefix_path=tmp_path,
        dtype="bfloat16",
        src_length=0,
    )
    faults = options.faults()
    for part in (
        "both given",
        "holds no lora_config.json",
        "holds no prefix_config.json",
        "on CPU",
        "src_length is 0",
    ):
        assert any(part in fault for fault in faults), part
    static = ModelOptions(model_name_or_path=str(exported_llama), lora_path=tmp_path, dtype="float32")
    assert any("a static model holds its adapter already" in fault for fault in static.faults())
    assert any("a static model has its own" in fault for fault in static.faults())
    dynamic = ModelOptions(model_name_or_path=str(exported_llama), mode="dynamic")
    assert any("runs with --mode static only" in fault for fault in dynamic.faults())
    wrong = ModelOptions(model_name_or_path=str(sharp_llama), mode="static")
    assert any("is no exported model" in fault for fault in wrong.faults())


def test_the_template_is_that_of_the_training(sharp_llama, tmp_path):
    import shutil

    model = tmp_path / "model"
    shutil.copytree(sharp_llama, model)

    def found(**options):
        return plan_model(ModelOptions(model_name_or_path=str(model), **options)).template_name

    assert found() == "none"
    (model / "chat_template.json").write_text(json.dumps({"conversation": ["{{user}}", "{{bot}}"]}))
    assert found() == "tokenizer"
    (model / "arguments.json").write_text(json.dumps({"chat_template": None}))
    assert found() == "none"
    (model / "arguments.json").write_text(json.dumps({"chat_template": "chatml"}))
    assert found() == "chatml" and found(chat_template="alpaca") == "alpaca"


def test_wrong_arguments_answer_without_paddle(tmp_path):
    code = (
        "import sys, runpy\n"
        "sys.argv = ['predict_generation.py', '--model_name_or_path', '/nowhere/model']\n"
        "try: runpy.run_path('predict_generation.py', run_name='__main__')\n"
        "except SystemExit as end: print('code', end.code, 'paddle' in sys.modules, 'paddlenlp' in sys.modules)\n"
    )
    result = launch("-c", code)
    assert result.stdout.strip() == "code 2 False False", result.stdout + result.stderr
    assert "model folder /nowhere/model does not exist" in result.stderr


def test_the_terminal_of_a_pipe(sharp_llama):
    result = subprocess.run(
        [sys.executable, "predict_generation.py", "--model_name_or_path", str(sharp_llama), "--max_new_tokens", "5"],
        cwd=ROOT, input="上衣\n白色\n".encode(), capture_output=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode()
    assert len(result.stdout.decode("utf-8").splitlines()) >= 2
    assert b"llama, dynamic, chat template none" in result.stderr


def test_a_seed_that_no_generator_takes_is_refused():
    assert parse("--seed", str(2**63 - 1)).settings.seed == 2**63 - 1
    for seed in ("-1", str(2**64)):
        with pytest.raises(UserError, match=rf"seed is {seed} but must be 0 to {2**63 - 1}: change --seed"):
            parse("--seed", seed)


def test_the_largest_seed_draws():
    from finetune.serving.decoding.draws import uniform_draws

    assert uniform_draws(2**63 - 1, 5, 3).shape == (3,)


def test_help_says_what_temperature_does(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    assert "below 1 keeps to the probable tokens" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("static", [False, True])
def test_an_answer_without_room_is_refused_before_the_weights(
    static, sharp_llama, exported_llama, tmp_path, monkeypatch
):
    from finetune.serving.predict import loading
    from finetune.serving.predict.run import predict

    monkeypatch.setattr(loading, "load_responder", lambda plan: pytest.fail("weights were loaded"))
    model = exported_llama if static else sharp_llama
    options = parse_options(["--model_name_or_path", str(model), "--max_new_tokens", "256"])
    with pytest.raises(
        UserError, match=r"max_new_tokens is 256, .*positions for 256 .*lower --max_new_tokens"
    ):
        predict(options)
