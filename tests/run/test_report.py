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


@pytest.mark.parametrize("verbose, shown", [("1", True), ("0", False)])
def test_settings_of_the_processor_are_for_those_who_ask(verbose, shown, capsys, monkeypatch):
    monkeypatch.setenv("FINETUNE_VERBOSE", verbose)
    report(note="CPU: OMP_NUM_THREADS=1")
    assert ("OMP_NUM_THREADS" in capsys.readouterr().err) is shown
