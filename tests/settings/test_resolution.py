"""Settings that follow from others, and from the device."""

import pytest

from finetune.machine import device
from tests.settings.argument_files import parse

pytestmark = pytest.mark.usefixtures("in_a_folder_with_data")


# What follows from other settings


def test_lora_alpha_follows_the_rank():
    assert parse({"lora_rank": 4}).model.lora_alpha == 8
    assert parse({"lora_rank": 4, "lora_alpha": 32}).model.lora_alpha == 32


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("embed_tokens,lm_head", ["embed_tokens", "lm_head"]),
        (["embed_tokens", "lm_head"], ["embed_tokens", "lm_head"]),
        (["embed_tokens, lm_head"], ["embed_tokens", "lm_head"]),
        ([], None),
        (None, None),
    ],
)
def test_modules_to_save_may_stand_between_commas(given, expected):
    assert parse({"lora": True, "modules_to_save": given}).model.modules_to_save == expected


BEST = {"load_best_model_at_end": True, "evaluation_strategy": "epoch", "save_strategy": "epoch"}


@pytest.mark.parametrize(
    ("settings", "metric", "greater_is_better"),
    [
        ({}, "loss", False),
        ({"eval_with_do_generation": True}, "bleu4", True),
        ({"metric_for_best_model": "ppl"}, "perplexity", False),
        ({"metric_for_best_model": "eval_ppl"}, "perplexity", False),
        ({"metric_for_best_model": "eval_accuracy"}, "accuracy", True),
        ({"metric_for_best_model": "rougeL", "eval_with_do_generation": True}, "rougel", True),
        ({"metric_for_best_model": "accuracy", "greater_is_better": False}, "accuracy", False),
    ],
)
def test_metric_for_best_model(settings, metric, greater_is_better):
    training = parse({**BEST, **settings}).training
    assert (training.metric_for_best_model, training.greater_is_better) == (metric, greater_is_better)


def test_no_metric_without_a_best_model():
    assert parse().training.metric_for_best_model is None


def test_a_best_model_without_checkpoints_is_turned_off_with_a_warning():
    arguments = parse({**BEST, "evaluation_strategy": "no", "save_strategy": "no"})
    assert arguments.training.load_best_model_at_end is False
    assert "load_best_model_at_end is turned off" in arguments.warnings[0]


@pytest.mark.parametrize("eval_steps", [None, 0])
def test_eval_steps_follow_logging_steps(eval_steps):
    settings = {"evaluation_strategy": "steps", "logging_steps": 7, "eval_steps": eval_steps}
    assert parse(settings).training.eval_steps == 7


def test_an_evaluation_strategy_turns_evaluation_on():
    assert parse({"evaluation_strategy": "epoch"}).training.do_eval is True
    arguments = parse({"evaluation_strategy": "epoch", "do_eval": False})
    assert arguments.training.do_eval is True
    assert "do_eval false gives way to evaluation_strategy" in arguments.warnings[0]


def test_evaluation_at_the_end_only():
    arguments = parse({"do_eval": True})
    assert (arguments.training.do_eval, arguments.training.evaluation_strategy) == (True, "no")
    assert "do_eval" not in arguments.training_kwargs()


def test_paths_below_home_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    arguments = parse({"model_name_or_path": "~/weights", "output_dir": "~/out"})
    assert arguments.model.model_name_or_path == str(tmp_path / "weights")
    assert arguments.training.output_dir == str(tmp_path / "out")


@pytest.mark.parametrize(("path", "method"), [("lora_path", "lora"), ("prefix_path", "prefix_tuning")])
def test_an_adapter_path_without_its_method_is_mentioned(path, method):
    assert parse({path: "data"}).warnings == (f"{path} is not read, because {method} is false",)
    assert parse({path: "data", method: True}).warnings == ()


# Device


def test_on_cpu_one_warning_names_what_is_turned_off():
    wanted = {"bf16": True, "use_flash_attention": True, "use_fused_rope": True, "amp_master_grad": True}
    arguments = parse({**wanted, "fuse_attention_qkv": True})
    assert arguments.warnings == (
        "on CPU these settings are turned off: bf16, use_flash_attention, use_fused_rope, amp_master_grad "
        "(rehearse_half_precision true computes in half precision on CPU, slowly)",
    )
    assert not (
        arguments.training.bf16 or arguments.model.use_flash_attention or arguments.model.use_fused_rope
    )
    assert arguments.model.fuse_attention_qkv is True  # a layout of weights, not a kernel
    assert arguments.training_kwargs()["bf16"] is False


def test_a_rehearsal_on_cpu_keeps_half_precision_and_nothing_else_of_a_gpu():
    wanted = {"bf16": True, "amp_master_grad": True, "use_flash_attention": True, "fp16_opt_level": "O2"}
    arguments = parse({**wanted, "rehearse_half_precision": True})
    assert arguments.warnings == ("on CPU these settings are turned off: use_flash_attention",)
    assert arguments.training.bf16 and arguments.training.amp_master_grad
    without = parse({"rehearse_half_precision": True, "amp_master_grad": True})
    assert without.warnings == ("on CPU these settings are turned off: amp_master_grad",)


def test_evaluation_in_another_type_than_training_is_said_to_have_no_effect(monkeypatch):
    monkeypatch.setattr(device, "has_gpu_build", lambda: True)
    monkeypatch.setattr(device, "count_visible_gpus", lambda environ=None: 1)
    (warning,) = parse({"bf16": True, "bf16_full_eval": True}).warnings
    assert warning.startswith(
        "bf16_full_eval has no effect here: weights are evaluated in the type that bf16"
    )


def test_a_rehearsal_has_no_effect_on_a_gpu(monkeypatch):
    monkeypatch.setattr(device, "has_gpu_build", lambda: True)
    monkeypatch.setattr(device, "count_visible_gpus", lambda environ=None: 1)
    arguments = parse({"bf16": True, "rehearse_half_precision": True})
    assert arguments.model.rehearse_half_precision is False and arguments.training.bf16
    assert arguments.warnings == ("rehearse_half_precision is for CPUs and has no effect on this device",)


def test_on_gpu_nothing_is_turned_off(monkeypatch):
    monkeypatch.setattr(device, "has_gpu_build", lambda: True)
    monkeypatch.setattr(device, "count_visible_gpus", lambda environ=None: 1)
    arguments = parse({"bf16": True, "use_flash_attention": True})
    assert (arguments.training.device, arguments.training.bf16, arguments.warnings) == ("gpu", True, ())
    assert parse({"no_cuda": True}).training.device == "cpu"
    assert parse({"device": "cpu"}).training.device == "cpu"
