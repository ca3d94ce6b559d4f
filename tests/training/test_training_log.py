"""What a training counts: since its beginning, and since the last record."""

import math

import pytest

from finetune.training import training_log
from finetune.training.training_log import TrainingLog


@pytest.fixture
def clock(monkeypatch):
    """The seconds that the log sees; set the first item."""
    now = [100.0]
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: now[0])
    return now


def record(step: int, **more) -> dict:
    return {"step": step, "epoch": 0.5, "loss": 2.0, "learning_rate": 1e-3, "grad_norm": 1.0} | more


def test_a_record_covers_the_steps_since_the_one_before(clock):
    log = TrainingLog()
    for seconds, num_tokens in ((2, 30), (4, 50)):
        clock[0] += seconds
        log.count(2.0, num_tokens, num_tokens // 2)
    written = log.write_step(record(2))
    assert (written["num_tokens"], written["num_label_tokens"]) == (80, 40)
    assert written["tokens_per_second"] == pytest.approx(80 / 6)
    clock[0] += 1
    log.count(3.0, 10, 5)
    written = log.write_step(record(3, skipped=True, loss_scale=8.0))
    assert (written["num_tokens"], written["tokens_per_second"], written["seconds"]) == (10, 10, 7)
    assert (written["skipped"], written["loss_scale"]) == (True, 8.0)


def test_what_is_not_a_step_is_not_counted_as_its_time(clock):
    log = TrainingLog()
    clock[0] += 50  # an evaluation, say
    log.restart_clock()
    clock[0] += 2
    log.count(2.0, 10, 5)
    assert log.write_step(record(1))["seconds"] == 2


def test_the_mean_leaves_out_losses_that_are_no_numbers(clock):
    log = TrainingLog()
    for loss in (2.0, math.inf, math.nan, 4.0):
        log.count(loss, 10, 5)
    metrics = log.metrics()
    assert (metrics["train_loss"], metrics["train_steps"], metrics["train_num_tokens"]) == (3.0, 2, 40)


def test_a_restored_log_goes_on(clock):
    interrupted, resumed = TrainingLog(), TrainingLog()
    clock[0] += 3
    interrupted.count(2.0, 10, 5)
    resumed.restore(interrupted.counts())
    for log in (interrupted, resumed):
        log.restart_clock()
        clock[0] += 4
        log.count(3.0, 20, 6)
    assert resumed.counts() == interrupted.counts()
    assert resumed.metrics()["train_seconds"] == 7
