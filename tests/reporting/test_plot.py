"""loss.png for logs of every size."""

import math

import matplotlib.image
import numpy as np
import pytest

from finetune.reporting.plot import _loss_limits, plot_losses, smooth
from finetune.reporting.run_log import RunLog


def write_log(path, num_steps, *, with_evaluation=False):
    log = RunLog(path, None)
    for step in range(1, num_steps + 1):
        log.step({"step": step, "loss": 1 + 4 * math.exp(-step / 50), "learning_rate": 1e-4 / step})
    if with_evaluation:
        log.evaluation({"step": num_steps, "eval_loss": 1.5})
    return log


def draw(log):
    picture = log.path.with_name("loss.png")
    plot_losses(log.path, picture)
    assert sorted(p.name for p in log.path.parent.iterdir()) == ["log.jsonl", "loss.png"]
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (600, 1000)
    return pixels


def count_pixels(pixels, red, green, blue):
    return int((np.abs(pixels[..., :3] * 255 - (red, green, blue)) < 24).all(axis=-1).sum())


BLUE, ORANGE = (0x25, 0x63, 0xC9), (0xD9, 0x48, 0x0F)


@pytest.mark.parametrize("num_steps", [2, 29, 500])
def test_curves_are_drawn(tmp_path, num_steps):
    pixels = draw(write_log(tmp_path / "log.jsonl", num_steps, with_evaluation=True))
    assert count_pixels(pixels, *BLUE) > 200
    assert count_pixels(pixels, *ORANGE) > 50


def test_without_an_evaluation_there_is_no_such_curve(tmp_path):
    assert count_pixels(draw(write_log(tmp_path / "log.jsonl", 20)), *ORANGE) == 0


@pytest.mark.parametrize("with_evaluation", [True, False])
def test_one_step_or_none(tmp_path, with_evaluation):
    pixels = draw(write_log(tmp_path / "log.jsonl", 1, with_evaluation=with_evaluation))
    assert count_pixels(pixels, *BLUE) > 10
    empty = draw(write_log(tmp_path / "log.jsonl", 0))
    assert count_pixels(empty, *BLUE) == 0


def test_only_an_evaluation(tmp_path):
    log = RunLog(tmp_path / "log.jsonl", None)
    log.evaluation({"step": 0, "loss": 1.5})
    assert count_pixels(draw(log), *ORANGE) > 50


def test_a_missing_log_gives_an_empty_picture(tmp_path):
    plot_losses(tmp_path / "none.jsonl", tmp_path / "loss.png")
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[:2] == (600, 1000)


def test_missing_and_constant_values(tmp_path):
    log = RunLog(tmp_path / "log.jsonl", None)
    log.step({"step": 1, "loss": math.nan, "learning_rate": 0.0})
    log.step({"step": 2, "loss": 2.0, "learning_rate": 0.0})
    log.step({"step": 3, "loss": 2.0, "learning_rate": None})
    draw(log)


def test_an_old_picture_is_replaced(tmp_path):
    (tmp_path / "loss.png").write_bytes(b"old")
    draw(write_log(tmp_path / "log.jsonl", 3))


def test_smoothing_keeps_a_line_and_calms_noise():
    assert smooth([2.0] * 40) == pytest.approx([2.0] * 40)
    line = [float(i) for i in range(200)]
    assert smooth(line)[50:150] == pytest.approx(line[50:150])
    noise = np.random.default_rng(0).normal(size=1000)
    assert np.std(smooth(list(noise))) < 0.3
    assert smooth([3.0]) == [3.0]


def test_a_far_spike_leaves_the_axis_but_a_high_start_does_not():
    falling = [8 - i * 0.05 for i in range(100)]
    assert _loss_limits(falling)[1] > 8
    low, high = _loss_limits([2.0 + i % 10 * 0.1 for i in range(200)] + [500.0])
    assert low < 2 and 2.9 < high < 4
    assert _loss_limits([0.0])[0] < 0 < _loss_limits([0.0])[1]


def test_rewards_have_a_panel_of_their_own(tmp_path):
    import json

    records = [
        {"kind": "train", "step": step, "loss": 0.7 / step, "learning_rate": 1e-3, "rewards_margin": step / 2,
         "rewards_accuracy": 1.0}
        for step in range(1, 6)
    ]  # fmt: skip
    records.append({"kind": "eval", "step": 5, "eval_loss": 0.2, "eval_rewards_margin": 2.0,
                    "eval_rewards_accuracy": 0.9})  # fmt: skip
    sizes = []
    for name, rows in (
        ("with", records),
        ("without", [{**each, "rewards_margin": None} for each in records]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        plot_losses(tmp_path / f"{name}.jsonl", tmp_path / f"{name}.png")
        sizes.append((tmp_path / f"{name}.png").read_bytes())
    assert sizes[0][:4] == b"\x89PNG" and sizes[0] != sizes[1]
