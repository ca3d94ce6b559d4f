"""What the reporter prints, with a clock of our own."""

import io
import logging
import re
import subprocess
import sys

import pytest

from finetune.reporting.progress import ProgressReporter, format_duration, format_evaluation, format_metric
from tests.training.terminal import Terminal


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    return Terminal()


def record(step, **more):
    return {
        "step": step,
        "epoch": step / 10,
        "loss": 2.34561,
        "learning_rate": 3e-5,
        "num_tokens": 788,
        **more,
    }


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def last_bar(stream, label="Training"):
    return [line for line in re.split(r"[\r\n]", plain(stream.getvalue())) if line.startswith(label)][-1]


def run_steps(reporter, clock, first, last, *, seconds=0.2, **more):
    for step in range(first, last + 1):
        clock.now += seconds
        reporter.step(record(step, **more))


def test_without_a_terminal_one_line_per_logged_step(clock):
    stream = io.StringIO()
    reporter = ProgressReporter(635, stream=stream, clock=clock)
    reporter.start()
    run_steps(reporter, clock, 1, 10)
    assert stream.getvalue() == ""
    reporter.log(record(10))
    run_steps(reporter, clock, 11, 20)
    reporter.log(record(20, tokens_per_second=12345.6))
    reporter.close()
    assert stream.getvalue().splitlines() == [
        "step  10/635  epoch 1.00  loss 2.3456  lr 3.0e-05    3,940 tok/s  2m 05s left",
        "step  20/635  epoch 2.00  loss 2.3456  lr 3.0e-05   12,346 tok/s  2m 03s left",
    ]


def test_the_last_line_tells_the_time_taken(clock):
    stream = io.StringIO()
    reporter = ProgressReporter(20, stream=stream, start_step=15, clock=clock)
    reporter.start()
    run_steps(reporter, clock, 16, 20, seconds=30)
    reporter.log(record(20))
    assert stream.getvalue().endswith("26 tok/s  took 2m 30s\n")


def test_a_resumed_run_counts_only_its_own_steps(clock):
    stream = io.StringIO()
    reporter = ProgressReporter(100, stream=stream, start_step=90, clock=clock)
    reporter.start()
    run_steps(reporter, clock, 91, 92, seconds=1)
    reporter.log(record(92))
    assert "788 tok/s  8s left" in stream.getvalue()


def test_the_speed_forgets_a_slow_start(clock):
    stream = io.StringIO()
    reporter = ProgressReporter(1000, stream=stream, clock=clock)
    reporter.start()
    run_steps(reporter, clock, 1, 1, seconds=60)
    run_steps(reporter, clock, 2, 100, seconds=1)
    reporter.log(record(100))
    assert "788 tok/s  15m 00s left" in stream.getvalue()


def test_evaluation_time_is_no_training_time(clock):
    stream = io.StringIO()
    reporter = ProgressReporter(100, stream=stream, clock=clock)
    reporter.start()
    run_steps(reporter, clock, 1, 1, seconds=1)
    with reporter.evaluating(3, "Evaluating") as advance:
        for _ in range(3):
            clock.now += 20
            advance()
    run_steps(reporter, clock, 2, 2, seconds=1)
    reporter.log(record(2))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Evaluating 2/3 batches  20s left"
    assert lines[1].endswith("788 tok/s  1m 38s left") and len(lines) == 2


def test_what_is_unknown_is_left_out(clock):
    stream = io.StringIO()
    reporter = ProgressReporter(9, stream=stream, clock=clock)
    reporter.log({"step": 3, "loss": None})
    assert stream.getvalue() == "step 3/9\n"


@pytest.mark.parametrize("terminal_there", [True, False])
def test_disabled_prints_nothing(clock, terminal, terminal_there):
    stream = terminal if terminal_there else io.StringIO()
    reporter = ProgressReporter(2, enabled=False, stream=stream, clock=clock)
    reporter.start()
    run_steps(reporter, clock, 1, 2)
    reporter.log(record(2))
    with reporter.evaluating(2) as advance:
        clock.now += 100
        advance()
    reporter.evaluation({"step": 2, "eval_loss": 1.0})
    reporter.message("hello")
    reporter.close()
    assert stream.getvalue() == ""


def test_the_bar_fits_80_columns(clock, terminal):
    reporter = ProgressReporter(635, stream=terminal, clock=clock)
    reporter.start()
    run_steps(reporter, clock, 1, 10)
    bar = last_bar(terminal)
    assert re.fullmatch(
        r"Training .+ 10/635  loss 2\.3456  lr 3\.0e-05  3,940 tok/s  2m 05s left", bar.rstrip()
    ), bar
    assert len(bar) <= 80
    reporter.close()
    reporter.close()
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1


def test_the_bar_is_not_drawn_at_every_step(clock, terminal):
    reporter = ProgressReporter(100_000, stream=terminal, clock=clock)
    reporter.start()
    run_steps(reporter, clock, 1, 1000, seconds=0.001)
    assert terminal.getvalue().count("Training") <= 12
    reporter.close()
    assert " 1,000/100,000 " in last_bar(terminal)


def test_lines_stand_above_the_bar(clock, terminal):
    reporter = ProgressReporter(100, stream=terminal, clock=clock)
    reporter.start()
    run_steps(reporter, clock, 1, 50)
    reporter.message("saved [bold]checkpoint-50")
    reporter.evaluation({"step": 50, "eval_loss": 2.0, "eval_runtime": 3.2})
    lines = [line for line in re.split(r"[\r\n]+", plain(terminal.getvalue())) if line]
    assert "saved [bold]checkpoint-50" in lines
    assert "eval at step 50: loss 2.0000  in 3s" in lines
    assert lines[-1].startswith("Training")
    reporter.close()


def test_evaluation_has_a_bar_of_its_own(clock, terminal):
    reporter = ProgressReporter(100, stream=terminal, clock=clock)
    reporter.start()
    with reporter.evaluating(4, "Generating") as advance:
        clock.now += 5
        advance()
        assert re.search(r" 1/4  15s left", last_bar(terminal, "Generating"))
    mark = len(terminal.getvalue())
    run_steps(reporter, clock, 1, 1)
    assert "Generating" not in terminal.getvalue()[mark:]
    reporter.close()


def test_an_evaluation_alone_shows_and_removes_its_bar(clock, terminal):
    reporter = ProgressReporter(0, stream=terminal, clock=clock)
    with pytest.raises(KeyError), reporter.evaluating(None, "Generating") as advance:
        advance()
        raise KeyError
    assert "Generating" in terminal.getvalue()
    assert terminal.getvalue().count("\x1b[?25l") == terminal.getvalue().count("\x1b[?25h") == 1


def test_bar_false_gives_lines_on_a_terminal(clock, terminal):
    reporter = ProgressReporter(9, bar=False, stream=terminal, clock=clock)
    reporter.start()
    reporter.log({"step": 3, "loss": 1.0})
    assert terminal.getvalue() == "step 3/9  loss 1.0000\n"


def test_a_dumb_terminal_gets_lines(clock, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    reporter = ProgressReporter(9, stream=terminal, clock=clock)
    reporter.start()
    assert terminal.getvalue() == ""


def test_log_handlers_write_above_the_bar_and_get_their_stream_back(clock, terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "__stderr__", terminal)
    handler = logging.StreamHandler(terminal)
    logger = logging.getLogger("test_progress")
    logger.addHandler(handler)
    reporter = ProgressReporter(9, stream=terminal, clock=clock)
    reporter.start()
    logger.warning("from a logger")
    # Each repaint starts by erasing the bar, so the message has a line to itself.
    assert re.search(r"\x1b\[2Kfrom a logger\s*\n", terminal.getvalue())
    reporter.close()
    assert handler.stream is terminal
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0s"),
        (45, "45s"),
        (59.7, "1m 00s"),
        (125, "2m 05s"),
        (11220, "3h 07m"),
        (187200, "2d 04h"),
        (-3, "0s"),
        (float("nan"), "?"),
        (float("inf"), "?"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_metrics_for_people():
    assert format_metric("eval_bleu4", 0.41234) == ("BLEU-4", "0.4123")
    assert format_metric("perplexity", 12345.678) == ("perplexity", "12,345.68")
    assert format_metric("eval_loss", None) is None
    assert format_metric("eval_samples_per_second", 3.0) is None
    line = format_evaluation(
        {"step": 7, "epoch": 1.0, "eval_loss": float("nan"), "eval_rougel": 0.5, "eval_ppl": 3}
    )
    assert line == "eval at step 7: loss nan  ROUGE-L 0.5000"


def test_importing_is_cheap():
    script = (
        "import sys\n"
        "import finetune.reporting.progress, finetune.reporting.run_log, finetune.reporting.report\n"
        "import finetune.training.metrics, finetune.reporting.plot\n"
        "heavy = {'paddle', 'paddlenlp', 'rich', 'matplotlib', 'nltk', 'rouge_score', 'jieba', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
