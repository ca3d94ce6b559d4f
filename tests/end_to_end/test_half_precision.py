"""Training in half precision on CPU through the entry script."""

from __future__ import annotations

import json

import pytest

from finetune.machine import half_precision
from tests.conftest import losses, read_log, run_entry

REHEARSED = {"rehearse_half_precision": True, "fp16_opt_level": "O2"}


@pytest.fixture
def train(write_run):
    """Runs a training with some settings and gives its output folder; the process is as before afterwards."""

    def run(name: str, **settings):
        arguments, out = write_run(name, **{"max_steps": 4} | settings)
        try:
            assert run_entry(arguments) == 0
        finally:
            assert not half_precision.is_installed()
        return out

    return run


@pytest.mark.parametrize("method", [{}, {"lora": True}], ids=["sft", "lora"])
def test_bfloat16_is_near_float32_and_not_the_same(train, method):
    single, half = train("single", **method), train("half", **method, **REHEARSED, bf16=True)
    assert losses(half) == pytest.approx(losses(single), rel=2e-3)
    assert losses(half) != losses(single)
    assert all(one != other for one, other in zip(losses(half), losses(single), strict=True))


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_float16_is_nearer(train, level):
    single = train("single")
    half = train("half", **REHEARSED | {"fp16_opt_level": level}, fp16=True, scale_loss=1024)
    assert losses(half) == pytest.approx(losses(single), rel=2e-4) and losses(half) != losses(single)
    assert [record["loss_scale"] for record in read_log(half)] == [1024.0] * 4


def test_a_scale_that_overflows_is_lowered(train):
    """2^30 times any gradient is beyond float16: the first steps are skipped."""
    out = train("half", **REHEARSED, fp16=True, scale_loss=2.0**30, max_steps=20, max_skipped_steps=20)
    records = read_log(out)
    skipped = [record["step"] for record in records if record.get("skipped")]
    assert skipped[:5] == [1, 2, 3, 4, 5] and len(skipped) < 20
    assert records[-1]["loss_scale"] < 2.0**30
    assert records[-1]["loss"] < records[0]["loss"]


def test_operators_of_ones_own_lists_reach_paddle(train):
    plain = train("plain", **REHEARSED | {"fp16_opt_level": "O1"}, bf16=True)
    black = train(
        "black",
        **REHEARSED | {"fp16_opt_level": "O1"},
        bf16=True,
        amp_custom_black_list=["matmul_v2", "linear_v2"],
    )
    single = train("single")
    assert losses(plain) != losses(single)
    # At O1 without products nothing of this model is left to compute in half precision.
    assert losses(black) == pytest.approx(losses(single), rel=1e-6)


def test_float32_gradients_can_be_kept(train):
    kept = train("kept", **REHEARSED, bf16=True, amp_master_grad=True, gradient_accumulation_steps=2)
    rounded = train("rounded", **REHEARSED, bf16=True, gradient_accumulation_steps=2)
    assert losses(kept) == pytest.approx(losses(rounded), rel=2e-3) and losses(kept) != losses(rounded)


def test_the_mode_leaves_float32_as_it_is(train):
    assert losses(train("with", rehearse_half_precision=True)) == pytest.approx(
        losses(train("without")), rel=1e-6
    )


def test_without_the_setting_half_precision_is_off(train, capsys):
    out = train("off", bf16=True, fp16_opt_level="O2")
    assert "rehearse_half_precision true" in capsys.readouterr().err
    assert losses(out) == losses(train("single"))


def test_half_precision_is_evaluated_and_generates(train):
    out = train("half", **REHEARSED, bf16=True, do_eval=True, eval_with_do_generation=True, max_steps=2)
    results = json.loads((out / "all_results.json").read_text(encoding="utf-8"))
    assert 0 <= results["eval_bleu4"] <= 100
