"""What is said about the course of the learning rate."""

from types import SimpleNamespace

import pytest

from finetune.run.training_arguments import schedule_notes


def notes(num_steps: int, **training: float) -> list[str]:
    settings = {"warmup_steps": 0, "warmup_ratio": 0.0, "learning_rate": 3e-4, **training}
    return list(schedule_notes(SimpleNamespace(training=SimpleNamespace(**settings)), num_steps))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_steps", "training", "given"),
    [
        (30, {"warmup_steps": 30}, "30 steps (warmup_steps)"),
        (9, {"warmup_ratio": 1.0}, "9 steps (warmup_ratio 1)"),
    ],
)
def test_a_warm_up_as_long_as_the_training_is_said(num_steps, training, given):
    (line,) = notes(num_steps, **training)
    assert given in line and f"the training has {num_steps}" in line and "0.0003" in line


def test_a_shorter_one_is_not():
    assert notes(31, warmup_steps=30) == notes(10, warmup_ratio=0.1) == notes(10) == []
