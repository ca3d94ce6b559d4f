"""Half precision at its limits, through the entry script: loss scales that overflow, checkpoints of other precisions."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from tests.conftest import read_log
from tests.distributed.layouts import LAYOUTS, ONE, curve_from
from tests.distributed.precisions import NUM_STEPS, SAVED, TOLERANCES, Case, differences
from tests.distributed.server_runs import Kill

pytestmark = pytest.mark.distributed

HUGE = 2.0**24


@pytest.fixture
def run(precision_bench):
    """Runs a Llama for a precision, in a layout, with further settings."""

    def start(precision: str | None, layout: str = "one", **more):
        case = ONE if layout == "one" else LAYOUTS[layout]
        settings = precision_bench.settings("llama", "sft", precision) | case.arguments()
        return precision_bench.server.run(settings | {"save_strategy": "no"} | more, case.world)

    return start


def skipped_steps(folder) -> list[int]:
    return [record["step"] for record in read_log(folder) if record.get("skipped")]


def test_steps_that_overflow_are_skipped_and_said_and_then_training_goes_on(run):
    done = run("fp16 O2", max_steps=20, eval_steps=4, scale_loss=HUGE).check()
    log, skipped = read_log(done.folder), skipped_steps(done.folder)
    assert [record["step"] for record in log] == list(range(1, 21))
    assert skipped[:4] == [1, 2, 3, 4] and len(skipped) < 15
    for before, record in itertools.pairwise(log):
        was_skipped = before["step"] in skipped
        assert record["loss_scale"] == before["loss_scale"] / (2 if was_skipped else 1)
        if was_skipped:
            assert record["learning_rate"] == before["learning_rate"]
            said = (
                f"step {before['step']} skipped: float16 overflowed at a loss scale of {before['loss_scale']:g}; "
                f"the next one is {record['loss_scale']:g}"
            )
            assert said in done.logs[0]
        else:
            assert math.isfinite(before["loss"]) and math.isfinite(before["grad_norm"])
    losses = done.curve()["eval_loss"]
    assert losses[20] < losses[4] - 0.01
    assert "Traceback" not in done.logs[0]


def test_skipped_steps_leave_the_weights_alone(run):
    more = {"scale_loss": HUGE, "eval_steps": 1, "max_steps": 4}
    losses = run("fp16 O2", **more).check().curve()["eval_loss"]
    assert len(losses) == 4 and len(set(losses.values())) == 1


def test_too_many_skipped_steps_in_a_row_stop_the_run(run):
    done = run("fp16 O2", max_steps=20, scale_loss=HUGE, max_skipped_steps=3)
    assert done.codes == (1,)
    (line,) = [line for line in done.logs[0].splitlines() if line.startswith("error: ")]
    assert "3 float16 steps in a row were skipped, the last one step 3" in line
    assert f"a loss scale of {HUGE / 4:g}" in line
    assert "raise max_skipped_steps" in line
    assert "Traceback" not in done.logs[0]


@pytest.mark.parametrize("layout", ["dp2", "pp2", "sharding2 stage2"])
def test_ranks_skip_the_same_steps(run, layout):
    """Steps 3, 6, ... have one sample for two ranks, and ranks with other parameters have other numbers that overflow."""
    more = {"max_steps": 18, "scale_loss": HUGE, "eval_steps": 6, "replica_check_steps": 1}
    one, two = (run("fp16 O2", each, **more).check() for each in ("one", layout))
    skipped = skipped_steps(one.folder)
    assert 3 in skipped and len(skipped) < 15
    assert skipped_steps(two.folder) == skipped
    found = differences(two.curve(), one.curve())
    assert found["loss_scale"] == 0 and found["learning_rate"] == 0
    assert (
        found["loss"] <= TOLERANCES["fp16"]["loss"] and found["grad_norm"] <= TOLERANCES["fp16"]["grad_norm"]
    ), found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fp16_opt_level": "O1"}, "fp16_opt_level ('O2' -> 'O1')"),
        ({"bf16": False}, "bf16 (True -> False)"),
    ],
)
def test_bf16_weights_go_on_in_float32_from_their_master_weights(precision_bench, changes, said):
    case = Case("llama", "sft", "bf16 O2", "one")
    settings = precision_bench.case_settings(case)
    killed = precision_bench.server.run(settings, kill=Kill(f"checkpoint-{SAVED}"))
    assert killed.killed, killed.tails()
    again = precision_bench.server.run(settings | changes, folder=killed.folder).check()
    curve, first = again.curve(), precision_bench.first_run(case).curve()
    assert list(curve["loss"]) == list(range(1, NUM_STEPS + 1))
    for name, values in curve.items():
        assert all(first[name][step] == value for step, value in values.items() if step <= SAVED), name
    assert curve_from(curve, SAVED + 1)["loss"] != curve_from(first, SAVED + 1)["loss"]
    found = differences(curve, precision_bench.float32("llama", "sft"))
    assert found["loss"] <= TOLERANCES["bf16"]["float32"], found
    (line,) = [line for line in again.logs[0].splitlines() if "continues with other settings" in line]
    assert line.startswith("warning: ") and said in line


def test_float32_checkpoints_do_not_go_on_as_half_precision_weights(run):
    first = run(None, save_strategy="steps", max_steps=SAVED).check()
    checkpoint = first.folder / f"checkpoint-{SAVED}"
    weights = checkpoint / "model.safetensors"
    done = run("bf16 O2", resume_from_checkpoint=str(checkpoint))
    assert done.codes == (2,)
    (line,) = [line for line in done.logs[0].splitlines() if line.startswith("error: ")]
    assert str(checkpoint) in line and "holds no master weights" in line
    assert "continue with fp16_opt_level O1 or in float32" in line
    assert "loading weights" not in done.logs[0] and "Traceback" not in done.logs[0]
    assert (
        weights.is_file()
        and json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == SAVED
    )
    going_on = run("bf16 O1", resume_from_checkpoint=str(checkpoint)).check()
    assert going_on.curve()["loss"].keys() == {*range(SAVED + 1, NUM_STEPS + 1)}
