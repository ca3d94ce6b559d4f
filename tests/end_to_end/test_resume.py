"""Killed at any moment, the same command continues and the curve is the uninterrupted one."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path

import pytest

from finetune.checkpoints.folder import find_fault, list_checkpoints
from finetune.machine.stop_signals import STOP_SIGNALS
from tests.conftest import launch, losses, read_log
from tests.watched_runs import logged_steps, start, wait_until

NUM_STEPS = 24
METHODS = {
    "sft": {"neftune": True, "save_steps": 5},
    "lora": {"lora": True, "lora_rank": 4, "lora_dropout": 0.1, "save_steps": 5},
    "prefix": {"prefix_tuning": True, "num_prefix_tokens": 4, "save_steps": 5},
}


@pytest.fixture(scope="module")
def prepare(write_run):
    """Writes the argument file of a method into a fresh folder."""
    settings = {"save_strategy": "steps", "max_steps": NUM_STEPS}
    return lambda method, **more: write_run(method, **METHODS[method] | settings | more)


@pytest.fixture(scope="module")
def uninterrupted(prepare):
    """The loss curve of each method without interruption, trained once."""
    found = {}

    def curve(method: str) -> list[float]:
        if method not in found:
            arguments, out = prepare(method)
            result = launch("finetune_generation.py", arguments)
            assert result.returncode == 0, result.stderr[-3000:]
            found[method] = losses(out)
            assert len(found[method]) == NUM_STEPS
        return found[method]

    return curve


def inside_a_save(out: Path) -> bool:
    return any(out.glob("tmp-checkpoint-10/*"))


MOMENTS = {
    "before the first checkpoint": lambda out: logged_steps(out) >= 3,
    "inside a save": inside_a_save,
    "between two checkpoints": lambda out: logged_steps(out) >= 13,
}


@pytest.mark.parametrize(
    ("method", "moment"),
    [("sft", moment) for moment in MOMENTS]
    + [("lora", "between two checkpoints"), ("prefix", "inside a save")],
)
def test_killed_run_continues_exactly(prepare, uninterrupted, method, moment):
    expected = uninterrupted(method)
    arguments, out = prepare(method)
    process = start(arguments)
    wait_until(lambda: MOMENTS[moment](out), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = logged_steps(out)
    assert done < NUM_STEPS, "it was killed too late to show anything"
    if moment == "inside a save":
        assert any(out.glob("tmp-checkpoint-*")), "the kill missed the save"

    result = launch("finetune_generation.py", arguments)
    assert result.returncode == 0, result.stderr[-3000:]
    assert losses(out) == expected  # to the last digit, and no step twice or missing
    assert [record["step"] for record in read_log(out)] == list(range(1, NUM_STEPS + 1))
    assert not list(out.glob("tmp-*"))
    if moment != "before the first checkpoint":
        assert "Continuing from" in result.stderr


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_saves_first(prepare, uninterrupted, number):
    arguments, out = prepare("sft", save_steps=1000)
    process = start(arguments)
    wait_until(lambda: logged_steps(out) >= 4, process)
    process.send_signal(number)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)  # a launcher passes Ctrl-C of its terminal on in this way
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    last = stderr.splitlines()[-1]
    # Any thread may be handed a signal: the second can be met first.
    names = {number.name, signal.SIGTERM.name}
    assert last.startswith(tuple(f"interrupted: stopped by signal {name} after step" for name in names))
    assert "start the same command again to continue" in last
    assert "stopping: this step is finished and saved first" in stderr and "Traceback" not in stderr
    (checkpoint,) = list_checkpoints(out)
    assert find_fault(checkpoint) is None
    assert launch("finetune_generation.py", arguments).returncode == 0
    assert losses(out) == uninterrupted("sft")


def test_altered_checkpoint_is_noticed_and_the_one_before_is_used(prepare, uninterrupted):
    arguments, out = prepare("sft", max_steps=NUM_STEPS)
    assert launch("finetune_generation.py", arguments).returncode == 0
    newest, before = list_checkpoints(out)[-1], list_checkpoints(out)[-2]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (out / "trainer_state.json").unlink()  # as if it had been killed before the end
    result = launch("finetune_generation.py", arguments)
    assert result.returncode == 0
    assert f"{newest} is not used: model.safetensors has" in result.stderr
    assert f"Continuing from {before}" in result.stderr
    assert losses(out) == uninterrupted("sft")
    state = json.loads((list_checkpoints(out)[-1] / "trainer_state.json").read_text())
    assert state["global_step"] == 20


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_while_libraries_are_imported_ends_in_one_line(prepare, number):
    arguments, out = prepare("sft")
    process = start(arguments)
    wait_until((out / ".lock").exists, process)  # Paddle is imported next
    time.sleep(0.2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    line = f"interrupted: stopped by signal {number.name}; start the same command again to continue"
    assert stderr.splitlines()[-1] == line and "Traceback" not in stderr
    assert list(out.glob("tmp-*")) == list_checkpoints(out) == []
