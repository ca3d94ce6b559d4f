"""Lines of a run's report that stand in no other test."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from finetune.run.report import Report
from finetune.settings.arguments import parse_arguments
from finetune.settings.data import default_new_tokens

RUN = SimpleNamespace(warnings=[], resume=None)


def report(*words: str, note: str | None = None) -> Report:
    given = [
        "--model_name_or_path",
        "m/x",
        "--dataset_name_or_path",
        ".",
        "--output_dir",
        "out",
        "--do_train",
    ]
    return Report(parse_arguments([*given, "--device", "cpu", *words]), RUN, note)


@pytest.mark.parametrize(
    "words, limit, note",
    [
        (["--max_length", "2048", "--src_length", "1024"], 256, "after 256 tokens, though max_length leaves room for 1024"),
        (["--max_length", "300", "--src_length", "200"], 100, ""),
        (["--max_length", "2048", "--src_length", "1024", "--max_new_tokens", "700"], 256, ""),
    ],
)  # fmt: skip
def test_the_bound_of_generated_texts_is_told_where_it_acts(words, limit, note, capsys):
    made = report("--do_eval", "--eval_with_do_generation", *words)
    capsys.readouterr()
    made.data(SimpleNamespace(reports={}, prompts=[object()]))
    text = capsys.readouterr().err
    assert note in text and bool(note) == bool(text)
    assert default_new_tokens(made.args.data) == limit
    made.data(SimpleNamespace(reports={}, prompts=[]))
    assert capsys.readouterr().err == ""


LAYOUTS = [
    "",
    "--tensor_parallel_degree 2 --sequence_parallel true",
    "--pipeline_parallel_degree 2 --virtual_pp_degree 2 --sharding stage1 --sharding_parallel_degree 2",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_command_that_evaluates_by_text_runs_on_one_process(layout, monkeypatch):
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "4")
    made = report(*layout.split())
    made.run = SimpleNamespace(path="out")
    command = made._next_commands()["evaluate by generated text"].split()
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", "1")
    given = command[command.index("out/arguments.json") + 1 :]
    again = report(*layout.split(), *given).args
    assert again.data.eval_with_do_generation and not again.training.do_train
    assert again.model.virtual_pp_degree == 1 and not again.training.sequence_parallel
    assert layout or not [word for word in given if word.endswith("degree")]


@pytest.mark.parametrize("verbose, shown", [("1", True), ("0", False)])
def test_settings_of_the_processor_are_for_those_who_ask(verbose, shown, capsys, monkeypatch):
    monkeypatch.setenv("FINETUNE_VERBOSE", verbose)
    report(note="CPU: OMP_NUM_THREADS=1")
    assert ("OMP_NUM_THREADS" in capsys.readouterr().err) is shown
