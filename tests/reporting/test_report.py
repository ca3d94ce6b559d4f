"""Result files and the last lines on screen."""

import io
import json
import math

import numpy as np
import pytest
from rich.cells import cell_len

from finetune.reporting.report import Generation, print_summary, write_generations, write_results
from tests.training.terminal import Terminal

CHINESE = "西装对于职场人士而言一定是必备的单品，更何况这样一款剪裁优良，版型合身，质感高级的设计。"
ENGLISH = "A light cotton shirt for the warm days of summer, easy to wash and to wear."


def sample(source="类型#上衣*版型#显瘦", output=CHINESE, target=ENGLISH):
    return Generation(source=source, output=output, target=target)


def summary(stream=None, **more):
    stream = stream or io.StringIO()
    print_summary("Trained 600 steps in 3m 20s", **{"metrics": {}, "stream": stream, **more})
    return stream.getvalue()


def cells_of_column(text, column):
    rows = [line.split("│") for line in text.splitlines() if line.count("│") == 4]
    return "".join(row[column + 1].strip() for row in rows[1:])


def test_results_are_valid_json_in_the_order_given(tmp_path):
    path = tmp_path / "all_results.json"
    write_results(
        path, {"eval_loss": np.float32(0.5), "perplexity": math.inf, "train": {"loss": 0.1 + 0.2}, "名": "值"}
    )
    text = path.read_text(encoding="utf-8")
    assert list(json.loads(text).items()) == [
        ("eval_loss", 0.5),
        ("perplexity", None),
        ("train", {"loss": 0.30000000000000004}),
        ("名", "值"),
    ]
    assert "名" in text and text.endswith("}\n")


def test_generations_are_json_lines(tmp_path):
    path = tmp_path / "generated_output.json"
    rows = [{"target": "丙\n丁", "output": "乙", "source": "甲"}, sample(output='"half \ud83d')]
    write_generations(path, rows)
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"source": "甲", "output": "乙", "target": "丙\\n丁"}'
    assert json.loads(lines[1]) == {**sample(), "output": '"half ?'}
    write_generations(path, [])
    assert path.read_text() == ""
    with pytest.raises(KeyError, match="target"):
        write_generations(path, [{"source": "a", "output": "b"}])


def test_figures_have_their_usual_names():
    text = summary(
        metrics={
            "train_loss": np.float32(1.25),
            "eval_loss": 1.31234,
            "eval_bleu4": 0.43214,
            "rougel": 0.5,
            "num_samples": 1200,
            "method": "lora",
        }
    )
    rows = [line.rsplit(maxsplit=1) for line in text.splitlines() if line.startswith("  ")]
    assert [[part.strip() for part in row] for row in rows] == [
        ["train loss", "1.2500"],
        ["eval loss", "1.3123"],
        ["BLEU-4", "0.4321"],
        ["ROUGE-L", "0.5000"],
        ["num samples", "1,200"],
        ["method", "lora"],
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_samples_stand_side_by_side_within_the_width(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    text = summary(Terminal(), samples=[sample()])
    text = text.replace("\x1b[1m", "").replace("\x1b[0m", "")
    table = [line for line in text.splitlines() if line.startswith(("│", "╭", "├", "╰"))]
    assert len({cell_len(line) for line in table}) == 1, "every border stands in one column"
    assert width - 5 <= cell_len(table[0]) <= width
    assert cells_of_column(text, 0) == "类型#上衣*版型#显瘦"
    assert cells_of_column(text, 1) == CHINESE
    assert cells_of_column(text, 2).replace(" ", "") == ENGLISH.replace(" ", "")
    assert not any(
        line.split("│")[2].strip().startswith(("，", "。")) for line in table if line.count("│") == 4
    )


def test_english_breaks_between_words():
    text = summary(samples=[sample(source=ENGLISH)])
    pieces = [line.split("│")[1].strip() for line in text.splitlines() if line.count("│") == 4][1:]
    assert " ".join(pieces).split() == ENGLISH.split()


def test_long_samples_are_cut_and_empty_ones_named():
    text = summary(samples=[sample(output=CHINESE * 9, target="")])
    generated = cells_of_column(text, 1)
    assert generated.startswith(CHINESE) and generated.endswith("…")
    assert len(text.splitlines()) < 20
    assert cells_of_column(text, 2) == "(empty)"


def test_a_narrow_terminal_gets_samples_below_each_other(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    text = summary(Terminal(), samples=[sample()])
    assert "│" not in text
    assert text.index("prompt:") < text.index("generated:") < text.index("reference:")


def test_plain_text_without_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = summary(samples=[sample()], metrics={"loss": 1.0}, files={"a": "b"}, next_commands={"c": "d"})
    assert "\x1b" not in text


def test_what_a_model_writes_is_taken_literally():
    nasty = "[bold]x[/red] \x1b[31m\x07\r\n\tend"
    text = summary(samples=[sample(output=nasty)])
    assert "[bold]x[/red] \ufffd[31m\ufffd" in text
    assert "\x1b" not in text and "\x07" not in text and "\r" not in text


def test_paths_and_commands_are_never_wrapped(tmp_path):
    path = tmp_path / ("long" * 30) / "loss.png"
    command = (
        "python predict_generation.py --model_name_or_path ./checkpoints/"
        + "x" * 100
        + " --data_file dev.json"
    )
    lines = summary(
        files={"loss curve": path, "log": "l"}, next_commands={"try it [now]": command}
    ).splitlines()
    assert f"  loss curve  {path}" in lines
    assert "  log         l" in lines
    assert f"    {command}" in lines
    assert "  try it [now]:" in lines


def test_a_stream_that_cannot_write_chinese_does_not_fail():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print_summary("完成", metrics={"loss": 1.0}, samples=[sample()], stream=stream)
    stream.flush()
    assert b"loss    1.0000" in raw.getvalue() and b"and to wear." in raw.getvalue()


def test_parts_that_are_missing_leave_no_heading():
    text = summary()
    assert "Trained 600 steps" in text
    assert not any(heading in text for heading in ("Samples", "Files", "Next"))
