"""Checkpoints without the optimizer's moments: what they hold, and how a run continues from one."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from finetune.storage.checkpoints import TensorFiles
from tests.conftest import losses, read_log, run_entry

WEIGHTS_ONLY = {"ignore_save_lr_and_optim": True}
STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
HALF = {"rehearse_half_precision": True, "fp16_opt_level": "O2", "bf16": True}
LACK = r"checkpoint-2 holds no moments of the optimizer .*: they start anew, while weights, learning-rate"


def run(write_run, name: str, **settings):
    arguments, out = write_run(name, **STEPS | settings)
    assert run_entry(arguments) == 0
    return arguments, out


def cut(out, step: int) -> None:
    """Leaves a run as if it had been killed after a step."""
    for path in out.glob("checkpoint-*"):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    (out / "trainer_state.json").unlink()
    (out / "all_results.json").unlink()


def continue_run(arguments, out, capsys) -> str:
    cut(out, 2)
    capsys.readouterr()
    assert run_entry(arguments) == 0
    return capsys.readouterr().err


@pytest.mark.parametrize("method", [{}, {"lora": True, "lora_rank": 4}], ids=["sft", "lora"])
def test_moments_start_anew_and_all_else_goes_on(write_run, capsys, method):
    settings = method | {"warmup_steps": 2, "adam_epsilon": 1e-12}
    _, whole = run(write_run, "whole", **settings)
    arguments, out = run(write_run, "weights_only", **settings | WEIGHTS_ONLY)
    assert losses(out) == losses(whole)
    checkpoint = out / "checkpoint-2"
    assert not list(checkpoint.glob("optimizer*")) and list((whole / "checkpoint-2").glob("optimizer*"))
    assert json.loads((checkpoint / "manifest.json").read_text())["weights_only"] is True

    told = continue_run(arguments, out, capsys)
    assert len(re.findall(LACK, told)) == 1
    before, after = read_log(whole), read_log(out)
    assert [each["step"] for each in after] == [1, 2, 3, 4]
    assert [each["learning_rate"] for each in after] == [each["learning_rate"] for each in before]
    # The weights and the samples of step 3 are the same; its update is not.
    assert after[2]["loss"] == before[2]["loss"] and after[3]["loss"] != before[3]["loss"]
    (name,) = [path.name for path in checkpoint.glob("*.safetensors")]
    old, new = (TensorFiles([out / f"checkpoint-{step}" / name]) for step in (2, 3))
    change = np.concatenate([(new.read(key) - old.read(key)).ravel() for key in old.names])
    # Adam's first step is the learning rate, whatever the gradient, where there is one.
    changed = np.abs(change[change != 0])
    assert np.median(changed) == pytest.approx(after[2]["learning_rate"], rel=1e-3)
    assert changed.max() <= after[2]["learning_rate"] * 1.001


def test_half_precision_keeps_the_float32_weights(write_run, capsys):
    """So the loss of the next step is that of the uninterrupted run, and float32 can go on as well."""
    _, whole = run(write_run, "whole", **HALF)
    arguments, out = run(write_run, "weights_only", **HALF | WEIGHTS_ONLY)
    state = TensorFiles([out / "checkpoint-2" / "optimizer.safetensors"])
    assert {name.rpartition("/")[2] for name in state.names} == {"master_weight"}
    complete = TensorFiles([whole / "checkpoint-2" / "optimizer.safetensors"])
    for name in state.names:
        np.testing.assert_array_equal(state.read(name), complete.read(name))
    assert re.search(LACK, continue_run(arguments, out, capsys))
    assert losses(out)[2] == losses(whole)[2] and losses(out)[3] != losses(whole)[3]


def test_float32_weights_alone_begin_no_masters(write_run, capsys):
    arguments, out = run(write_run, "weights_only", **WEIGHTS_ONLY)
    cut(out, 2)
    half = [word for name, value in HALF.items() for word in (f"--{name}", value)]
    assert run_entry(arguments, *half) == 2
    assert "holds no master weights" in capsys.readouterr().err


def test_the_best_model_is_found_among_them(write_run):
    best = {
        "do_eval": True, "evaluation_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True,
        "save_total_limit": 1, "learning_rate": 3e-2,
    }  # fmt: skip
    _, whole = run(write_run, "whole", **best)
    _, out = run(write_run, "weights_only", **best | {"save_only_model": True})
    assert [each["eval_loss"] for each in read_log(out, "eval")] == [
        each["eval_loss"] for each in read_log(whole, "eval")
    ]
    one, two = (TensorFiles([folder / "model.safetensors"]) for folder in (whole, out))
    for name in one.names:
        np.testing.assert_array_equal(one.read(name), two.read(name))
