"""The peak that `plan` tells is the peak of the run, and a trial on the longest rows leaves nothing, through the program."""

from __future__ import annotations

import subprocess
import sys

import pytest

from finetune.errors import UserError
from finetune.run.trial import ENDING, as_trial
from finetune.settings.arguments import parse_arguments
from tests.conftest import ROOT
from tests.end_to_end.memory_cases import CASES, SMALL, run_case

MOST = 0.15
"""Share by which a prediction may be off."""


@pytest.mark.slow
def test_a_small_run_takes_what_its_plan_says_and_its_trial_leaves_nothing(tmp_path):
    result = run_case(SMALL, tmp_path)
    assert abs(result.difference) <= MOST, result
    assert result.micro_batch == (4, 256)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.slow_distributed
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}: {case.name}")
def test_large_runs_take_what_their_plans_say(case, tmp_path):
    result = run_case(case, tmp_path)
    assert abs(result.difference) <= MOST, result


def test_a_plan_needs_no_paddle(tiny_llama, small_data, tmp_path):
    words = ["--model_name_or_path", tiny_llama, "--dataset_name_or_path", small_data, "--output_dir", tmp_path / "out",
             "--do_train", "true", "--data_cache", "false"]  # fmt: skip
    code = (
        "import sys; from finetune.commands.plan import main; main(sys.argv[1:]); "
        "print([name for name in ('paddle', 'paddlenlp') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert not (tmp_path / "out").exists()


def test_a_trial_does_not_remove_what_others_put_there(tiny_llama, small_data, tmp_path):
    words = ["--model_name_or_path", tiny_llama, "--dataset_name_or_path", small_data, "--output_dir", tmp_path / "out",
             "--do_train", "true", "--device", "cpu", "--longest_first", "3", "--save_strategy", "steps"]  # fmt: skip
    args = parse_arguments(list(map(str, words)))
    theirs = tmp_path / f"out{ENDING}" / "notes.txt"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    with pytest.raises(UserError) as caught, as_trial(args):
        pass
    assert "something else is there: move it" in caught.value.faults[0]
    assert theirs.read_text() == "mine"
    theirs.unlink()
    (theirs.parent / "arguments.json").write_text('{"longest_first": 3}')  # of a trial that was killed
    with as_trial(args) as trial:
        assert trial.training.max_steps == 3 and trial.training.save_strategy == "no"
        assert {"max_steps", "save_strategy"} <= trial.given
        assert args.training.output_dir != trial.training.output_dir
    assert not theirs.parent.exists()
