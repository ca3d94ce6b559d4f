"""The files of an output folder may hold anything: that ends in a message or in a run that is safe to go on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.processes.groups import ProcessGroups
from finetune.run.directory import RunDirectory, open_run_directory
from finetune.settings.arguments import Arguments, parse_arguments
from tests.conftest import FAST, write_arguments


@pytest.fixture
def args(tiny_llama, small_data, tmp_path) -> Arguments:
    path = write_arguments(
        tmp_path / "arguments.json",
        **FAST,
        model_name_or_path=str(tiny_llama),
        dataset_name_or_path=str(small_data),
        output_dir=str(tmp_path / "out"),
        max_steps=2,
    )
    return parse_arguments([str(path)])


@pytest.fixture
def finished(args, tmp_path) -> Path:
    """The output folder of a finished run of these arguments."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "arguments.json").write_text(json.dumps(args.to_json()))
    (out / "trainer_state.json").write_text('{"global_step": 2}')
    (out / "all_results.json").write_text('{"train_steps": 2}')
    return out


def open_again(args: Arguments) -> RunDirectory:
    with open_run_directory(args, ProcessGroups()) as run:
        return run


def test_the_same_run_is_finished(args, finished):
    assert open_again(args).finished


@pytest.mark.parametrize("value", [None, "3", [3], {"steps": 3}])
def test_a_setting_of_another_kind_is_another_setting(args, finished, value):
    (finished / "arguments.json").write_text(json.dumps(args.to_json() | {"max_steps": value}))
    with pytest.raises(UserError, match="holds a finished run with other settings"):
        open_again(args)


@pytest.mark.parametrize("text", ["", "null", "[]", "[" * 100_000])
def test_a_finished_run_with_damaged_arguments_is_not_taken_for_this_one(args, finished, text):
    (finished / "arguments.json").write_text(text)
    with pytest.raises(UserError, match=r"arguments\.json"):
        open_again(args)


@pytest.mark.parametrize("step", ["x", None, [], 2.5, True])
def test_a_state_without_a_step_is_named(args, finished, step):
    (finished / ".trained.json").write_text("{}")
    (finished / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    run = open_again(args)
    assert run.trained
    with pytest.raises(UserError, match="global_step is no number"):
        _ = run.resume_step


def test_a_lock_that_is_a_pipe_does_not_keep_waiting(args, finished):
    os.mkfifo(finished / ".lock")
    with pytest.raises(UserError, match="is a pipe or a device"):
        open_again(args)
