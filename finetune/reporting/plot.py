"""loss.png: the curves of a run, drawn from its train_log.jsonl.

Above, the training loss (with a smoothed line once there are many points) and the evaluation
losses; below, smaller, the learning rate, and between them, where preferences are trained on, the
margins of the rewards with the share of pairs that they order rightly. matplotlib is loaded only here and draws without a
display.
"""

import io
import logging
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from finetune.reporting.run_log import read_log
from finetune.storage.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 10, 6, 100  # 1000 x 600 pixels
MIN_POINTS_TO_SMOOTH = 30
SMOOTHING_FRACTION = 60

TRAIN_COLOR, EVAL_COLOR, RATE_COLOR = "#2563c9", "#d9480f", "#55606e"


def plot_losses(log_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draws the loss curve of a run; a log with one point or none gives a picture too.

    Args:
        log_path: A train_log.jsonl; lines of kind "train" and "eval" are used.
        png_path: The picture to write or to replace.
    """
    # The object interface instead of pyplot: no global state, no choice of a display backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # It tells that it collects the fonts of the machine, once in the life of a home folder.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    records = read_log(log_path)
    train = [record for record in records if record.get("kind") == "train"]
    evaluations = [record for record in records if record.get("kind") == "eval"]
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    margins = _points(train, "rewards_margin")
    heights = (4, 1) if margins is None else (3, 2, 1)
    loss_axes, *others, rate_axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _draw_losses(
        loss_axes,
        _points(train, "loss"),
        _points(evaluations, "eval_loss") or _points(evaluations, "loss"),
        unit="nats per label token" if margins is None else "loss per pair or answer",
    )
    if margins is not None:
        _draw_rewards(others[0], margins, _points(train, "rewards_accuracy"), evaluations)
    _draw_rate(rate_axes, _points(train, "learning_rate"))
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(png_path, picture.getvalue())


def smooth(values: Sequence[float]) -> list[float]:
    """Gaussian mean around each point; unlike a running mean it does not lag behind a falling curve.

    Args:
        values: The curve, in order.

    Returns:
        As many values; the kernel's standard deviation is 1/`SMOOTHING_FRACTION` of the curve, at
        least 2 points, and what sticks out at the ends is cut off and made up for.
    """
    import numpy as np

    deviation = max(2.0, len(values) / SMOOTHING_FRACTION)
    reach = min(math.ceil(3 * deviation), len(values) - 1)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    inner = slice(reach, reach + len(values))
    total = np.convolve(values, kernel)[inner]
    weight = np.convolve(np.ones(len(values)), kernel)[inner]
    return [float(value) for value in total / weight]


def _points(records: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]] | None:
    """Steps and values of one curve, the last record of a step winning; None when there are none."""
    by_step = {
        record["step"]: float(record[name])
        for record in records
        if isinstance(record.get("step"), int) and isinstance(record.get(name), int | float)
    }
    return (sorted(by_step), [by_step[step] for step in sorted(by_step)]) if by_step else None


def _draw_losses(axes: "Axes", train: Any, evaluations: Any, *, unit: str) -> None:
    if train:
        steps, losses = train
        many = len(steps) >= MIN_POINTS_TO_SMOOTH
        alpha, label = (0.3, "training, each logged step") if many else (1.0, "training")
        axes.plot(
            steps, losses, color=TRAIN_COLOR, alpha=alpha, linewidth=1.2, marker=_marker(steps), label=label
        )
        if many:
            axes.plot(steps, smooth(losses), color=TRAIN_COLOR, linewidth=2.0, label="training, smoothed")
        axes.set_ylim(*_loss_limits(losses + (evaluations[1] if evaluations else [])))
    if evaluations:
        steps, losses = evaluations
        axes.plot(
            steps, losses, color=EVAL_COLOR, linewidth=1.2, marker="o", markersize=5, label="evaluation"
        )
        best = min(range(len(losses)), key=losses.__getitem__)
        axes.annotate(
            f"{losses[best]:.4f}",
            (steps[best], losses[best]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            color=EVAL_COLOR,
        )
    if train or evaluations:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "no steps logged yet", transform=axes.transAxes, ha="center", color=RATE_COLOR)
    axes.set_title("Loss", loc="left", fontweight="bold")
    axes.set_ylabel(unit)
    _tidy(axes)


def _draw_rewards(axes: "Axes", margins: Any, accuracies: Any, evaluations: list[dict[str, Any]]) -> None:
    """Margins on the left axis, their accuracies on the right one."""
    right = axes.twinx()
    of_evaluations = (_points(evaluations, f"eval_rewards_{kind}") for kind in ("margin", "accuracy"))
    for side, style, pair in zip(
        (axes, right), ("-", ":"), zip((margins, accuracies), of_evaluations, strict=True), strict=True
    ):
        for points, color, marker in zip(pair, (TRAIN_COLOR, EVAL_COLOR), (None, "o"), strict=True):
            if points:
                side.plot(*points, color=color, linewidth=1.2, linestyle=style, marker=marker, markersize=4)
    right.set_ylim(-0.05, 1.05)
    axes.set_title("Rewards: margin, and accuracy (dotted, right)", loc="left", fontsize="medium")
    _tidy(axes)


def _loss_limits(losses: Sequence[float]) -> tuple[float, float]:
    """Range of the axis; spikes (up to 1% of the points) far above the rest may leave it."""
    ordered = sorted(losses)
    low, high, top = ordered[0], ordered[math.ceil(0.99 * len(ordered)) - 1], ordered[-1]
    if top - low < 1.5 * (high - low):
        high = top
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _draw_rate(axes: "Axes", rates: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    if rates:
        steps, values = rates
        axes.plot(steps, values, color=RATE_COLOR, linewidth=1.5, marker=_marker(steps))
        axes.set_ylim(0, max(values) * 1.1 or 1.0)
    axes.set_title("Learning rate", loc="left", fontsize="medium")
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    left, right = axes.get_xlim()  # of both panels
    if rates and right - left < 2:
        axes.set_xlim(steps[0] - 1, steps[-1] + 1)
    _tidy(axes)


def _marker(steps: Sequence[float]) -> str | None:
    """A line through one point is invisible, few points are worth a dot each."""
    return "." if len(steps) < MIN_POINTS_TO_SMOOTH else None


def _tidy(axes: "Axes") -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
