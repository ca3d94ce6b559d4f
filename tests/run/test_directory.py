"""The files of an output folder may hold anything: that ends in a message or in a run that is safe to go on."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest

from finetune.checkpoints.folder import write_checkpoint
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


@pytest.mark.parametrize("name", [".lock", ".trial.tmp", ".arguments.json.tmp", ".job-secret-1"])
def test_what_a_run_killed_at_its_start_leaves_keeps_nobody_out(args, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("")
    assert open_again(args).resume is None


def test_other_hidden_files_do(args, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".notes").write_text("")
    with pytest.raises(UserError, match="is not empty and holds no run of this program"):
        open_again(args)


def test_training_settings_that_paddlenlp_refuses_end_in_a_message(args):
    from dataclasses import replace
    from types import SimpleNamespace

    from finetune.run.training_arguments import build_training_arguments

    training = SimpleNamespace(**vars(args.training) | {"refined_recompute": "x:y:z"})
    with pytest.raises(
        UserError, match=r"PaddleNLP refuses these training settings .*among .*refined_recompute"
    ):
        build_training_arguments(replace(args, training=training, given=args.given | {"refined_recompute"}))


def test_a_run_keeps_the_day_on_which_it_began(args, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert open_again(args).template_day is None
    args = replace(args, data=replace(args.data, chat_template=str(tmp_path / "t.jinja")))
    today = open_again(args).template_day
    assert today == date.today().isoformat()
    note = tmp_path / "out" / "template_day.json"
    assert json.loads(note.read_text()) == {"day": today}
    note.write_text('{"day": "2020-02-02"}')
    assert open_again(args).template_day == today  # nothing was trained that could be continued
    note.write_text('{"day": "2020-02-02"}')
    write_checkpoint(tmp_path / "out", 1, lambda folder: (folder / "config.json").write_text("{}"))
    assert open_again(args).template_day == "2020-02-02"
