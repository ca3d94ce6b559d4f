"""What a person sees while a run trains: one progress bar, or plain lines where there is no terminal.

The bar is rich's: it keeps lines that others print above itself, fits any width and leaves tmux's
scroll-back clean. It is redrawn from the training loop, at most ten times a second, not from a
thread of its own: forking data-loading workers beside a running thread can deadlock.
"""

import atexit
import contextlib
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from finetune.machine.screen import format_for, show_line

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

REDRAW_SECONDS = 0.1
RATE_WINDOW_STEPS = 50
"""Speed and time left are taken over this many last steps, so that a slow start is soon forgotten."""
PLAIN_EVALUATION_SECONDS = 30.0
"""Without a terminal, an evaluation says how far it is this often."""

METRIC_FORMATS = {
    "loss": ("loss", ".4f"),
    "perplexity": ("perplexity", ",.2f"),
    "accuracy": ("accuracy", ".4f"),
    "bleu4": ("BLEU-4", ".4f"),
    "rouge1": ("ROUGE-1", ".4f"),
    "rouge2": ("ROUGE-2", ".4f"),
    "rougel": ("ROUGE-L", ".4f"),
    "rewards_accuracy": ("rewards accuracy", ".4f"),
    "rewards_margin": ("rewards margin", ".4f"),
}
"""Metrics worth a place on the screen: label and number format."""


class ProgressReporter:
    """Shows the progress of a run to a person.

    On a terminal: a bar with loss, learning rate, tokens per second and time left, and a second
    one during an evaluation. Elsewhere: one short line per logged step and per evaluation.

    Args:
        total_steps: Optimizer steps of the whole run.
        enabled: False shows nothing at all (every process but the first). None and True show.
        bar: None shows the bar where `stream` is a terminal, False never.
        stream: Where to write; stderr by default, which leaves stdout to results.
        start_step: Steps already done, when a run is resumed.
        clock: Returns seconds; replaced in tests.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        enabled: bool | None = None,
        bar: bool | None = None,
        stream: TextIO | None = None,
        start_step: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.total_steps = total_steps
        self.enabled = enabled is not False
        self._stream = stream if stream is not None else sys.stderr
        self._show_bar = self.enabled and bar is not False and _is_terminal(self._stream)
        self._clock = clock
        self._step = start_step
        self._shown: dict[str, float] = {}
        self._window: deque[tuple[float, float]] = deque(maxlen=RATE_WINDOW_STEPS)  # (seconds, tokens)
        self._began = self._last_step_at = clock()
        self._last_drawn_at = -math.inf
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._exits = contextlib.ExitStack()

    def start(self) -> None:
        """Starts the clock of the first step and shows the bar of the training."""
        self._began = self._last_step_at = self._clock()
        if self._show_bar:
            self._task = self._open_bar().add_task(
                "Training", total=self.total_steps, completed=self._step, stats=""
            )
            self._redraw(force=True)

    def step(self, record: Mapping[str, Any]) -> None:
        """Notes an optimizer step; call it after every one, it costs microseconds.

        Args:
            record: `step`, and what is known without extra work of `loss`, `learning_rate`, `num_tokens` (of this
                step, without padding) and `tokens_per_second`. What is missing keeps its last shown value; the speed
                is worked out from `num_tokens` when it is not given.
        """
        now = self._clock()
        self._window.append((now - self._last_step_at, float(record.get("num_tokens", 0))))
        self._last_step_at = now
        self._step = int(record["step"])
        self._keep(record)
        self._redraw()

    def log(self, record: Mapping[str, Any]) -> None:
        """Shows a logged step: a line without a terminal, fresh figures in the bar with one.

        Args:
            record: As written to train_log.jsonl (`run_log.TrainRecord`).
        """
        self._keep(record)
        if self._show_bar:
            self._redraw(force=True)
            return
        width = len(str(self.total_steps))
        parts = [f"step {int(record['step']):>{width}}/{self.total_steps}"]
        parts += [f"epoch {record['epoch']:.2f}"] if "epoch" in record else []
        self._write("  ".join([*parts, *self._figures(aligned=True)]))

    @contextlib.contextmanager
    def evaluating(self, num_batches: int | None, what: str = "Evaluating") -> Iterator[Callable[[], None]]:
        """Shows how far an evaluation is; its time does not count as training time.

        Args:
            num_batches: Batches to come, None when not known.
            what: Label before the bar, such as "Evaluating" or "Generating".

        Yields:
            A function to call after every batch.
        """
        began = self._clock()
        track = self._track_in_bar if self._show_bar else self._track_in_lines
        try:
            with track(num_batches, what) as advance:
                yield advance
        finally:
            self._last_step_at += self._clock() - began

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Shows the result of an evaluation in one line, above the bar if there is one.

        Args:
            record: `step` and metrics by name, with or without the prefix "eval_".
        """
        self._write(format_evaluation(record))

    def message(self, text: str) -> None:
        """Shows a line of text, above the bar if there is one."""
        self._write(text)

    def close(self) -> None:
        """Leaves the bar as it stands and gives the terminal back; may be called more than once."""
        if self._progress is not None:
            self._redraw(force=True)
        self._exits.close()
        self._progress = None
        self._task = None
        atexit.unregister(self.close)

    def _keep(self, record: Mapping[str, Any]) -> None:
        for name in ("loss", "rewards_accuracy", "learning_rate", "tokens_per_second"):
            if record.get(name) is not None:
                self._shown[name] = float(record[name])

    def _figures(self, *, aligned: bool = False) -> list[str]:
        """Loss, learning rate, speed and time left, each left out while unknown."""
        forms = {"loss": "loss {:.4f}", "rewards_accuracy": "accuracy {:.2f}", "learning_rate": "lr {:.1e}"}
        texts = [form.format(self._shown[name]) for name, form in forms.items() if name in self._shown]
        seconds = sum(duration for duration, _ in self._window)
        tokens = sum(count for _, count in self._window)
        speed = self._shown.get("tokens_per_second") or (tokens / seconds if seconds > 0 else 0)
        if speed > 0:
            texts.append(f"{speed:{'7' if aligned else ''},.0f} tok/s")
        if self._step >= self.total_steps:
            texts.append(f"took {format_duration(self._last_step_at - self._began)}")
        elif seconds > 0:
            left = seconds / len(self._window) * max(0, self.total_steps - self._step)
            texts.append(f"{format_duration(left)} left")
        return texts

    def _redraw(self, *, force: bool = False) -> None:
        if self._progress is None:
            return
        now = self._clock()
        if not force and now - self._last_drawn_at < REDRAW_SECONDS and self._step < self.total_steps:
            return
        self._last_drawn_at = now
        if self._task is not None:
            self._progress.update(
                self._task,
                completed=self._step,
                stats="  ".join([_count(self._step, self.total_steps), *self._figures()]),
            )
        self._progress.refresh()

    def _write(self, text: str) -> None:
        if not self.enabled:
            return
        if self._progress is not None:
            from rich.text import Text

            shown = Text.from_ansi(format_for(text, self._stream))
            self._progress.console.print(shown, soft_wrap=True)
        else:
            show_line(text, self._stream)

    def _open_bar(self) -> "Progress":
        """The bars' display, shown on first use (an evaluation may come without a training)."""
        if self._progress is None:
            self._progress = _make_progress(self._stream)
            self._exits.enter_context(self._progress)
            self._exits.enter_context(_log_handlers_above_bar())
            # A crash past our caller must not leave the terminal without its cursor.
            atexit.register(self.close)
        return self._progress

    @contextlib.contextmanager
    def _track_in_bar(self, num_batches: int | None, what: str) -> Iterator[Callable[[], None]]:
        alone = self._progress is None
        progress = self._open_bar()
        task = progress.add_task(what, total=num_batches, stats="")
        began = self._clock()
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            left = _time_left(self._clock() - began, done, num_batches)
            stats = "  ".join(filter(None, (_count(done, num_batches), left)))
            progress.update(task, completed=done, stats=stats)
            self._redraw(force=done == num_batches)

        try:
            self._redraw(force=True)
            yield advance
        finally:
            progress.remove_task(task)
            self._redraw(force=True)
            if alone:
                self.close()

    @contextlib.contextmanager
    def _track_in_lines(self, num_batches: int | None, what: str) -> Iterator[Callable[[], None]]:
        began = said = self._clock()
        done = 0

        def advance() -> None:
            nonlocal done, said
            done += 1
            now = self._clock()
            if now - said >= PLAIN_EVALUATION_SECONDS and done != num_batches:
                said = now
                left = _time_left(now - began, done, num_batches)
                self._write(f"{what} {_count(done, num_batches)} batches  {left}".rstrip())

        yield advance


def format_duration(seconds: float) -> str:
    """Seconds for a person: "45s", "2m 05s", "3h 07m", "2d 04h"."""
    if not math.isfinite(seconds):
        return "?"
    total = max(0, round(seconds))
    minutes, seconds_left = divmod(total, 60)
    hours, minutes_left = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days}d {hours_left:02}h"
    if hours:
        return f"{hours}h {minutes_left:02}m"
    return f"{minutes}m {seconds_left:02}s" if minutes else f"{seconds_left}s"


def format_metric(name: str, value: Any) -> tuple[str, str] | None:
    """Label and figure of a metric for a person, such as ("BLEU-4", "0.4123").

    Args:
        name: Name of the metric, with or without the prefix "eval_".
        value: Its value.

    Returns:
        None where the name is no metric (throughput, counters) or there is no value.
    """
    known = METRIC_FORMATS.get(name.removeprefix("eval_"))
    if known is None or value is None:
        return None
    label, form = known
    return label, format(value, form)


def format_evaluation(record: Mapping[str, Any]) -> str:
    """One line for an evaluation: "eval at step 100: loss 2.1034  perplexity 8.19  BLEU-4 0.4123"."""
    figures = [" ".join(known) for name in record if (known := format_metric(name, record[name]))]
    runtime = record.get("eval_runtime", record.get("seconds"))
    if runtime is not None:
        figures.append(f"in {format_duration(runtime)}")
    where = f"eval at step {record['step']}: " if "step" in record else "eval: "
    return where + "  ".join(figures)


def _count(done: int, total: int | None) -> str:
    return f"{done:,}" if total is None else f"{done:,}/{total:,}"


def _time_left(seconds: float, done: int, total: int | None) -> str:
    if total is None or done == 0:
        return ""
    return f"{format_duration(seconds / done * (total - done))} left"


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def _make_progress(stream: TextIO) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    # rich sends what others print to the bar's own stream, so only streams that show on the
    # same screen may be taken over: `command > file` must keep its stdout.
    return Progress(
        TextColumn("{task.description}", style="bold"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[stats]}", markup=False),
        console=Console(file=stream, force_terminal=True, force_jupyter=False),
        auto_refresh=False,
        expand=True,
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )


@contextlib.contextmanager
def _log_handlers_above_bar() -> Iterator[None]:
    """Points log handlers at the redirected streams; the ones they hold would write through the bar."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    current = {sys.__stderr__: sys.stderr, sys.__stdout__: sys.stdout}
    moved: list[tuple[logging.StreamHandler[Any], Any]] = []
    for logger in loggers:
        for handler in getattr(logger, "handlers", []):
            if isinstance(handler, logging.StreamHandler) and handler.stream in current:
                moved.append((handler, handler.setStream(current[handler.stream])))
    try:
        yield
    finally:
        for handler, stream in moved:
            if stream is not None:
                handler.setStream(stream)
