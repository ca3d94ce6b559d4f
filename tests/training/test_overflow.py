"""What happens to numbers that are none: a run stops at once, or skips a step in float16."""

import math

import numpy as np
import paddle
import pytest

from finetune.errors import RunError
from finetune.training.overflow import OverflowGuard, check_finite


@pytest.fixture(autouse=True)
def enabled_scaler(monkeypatch):
    """Paddle switches its scaler off on a CPU; the arithmetic of float32 gradients runs there all the same."""
    from paddle.amp import grad_scaler

    tracer = grad_scaler._dygraph_tracer()

    class GpuPlace:
        def is_gpu_place(self):
            return True

    class Tracer:
        _expected_place = GpuPlace()

        def __getattr__(self, name):
            return getattr(tracer, name)

    monkeypatch.setattr(grad_scaler, "_dygraph_tracer", Tracer)


def make_scaler(scale: float = 1024.0, **options):
    return paddle.amp.GradScaler(init_loss_scaling=scale, **options)


def make_optimizer(*values: float):
    parameters = [paddle.create_parameter([1], "float32") for _ in values]
    for parameter, value in zip(parameters, values, strict=True):
        parameter.set_value(np.array([value], np.float32))
    return paddle.optimizer.AdamW(0.5, parameters=parameters, weight_decay=0.0), parameters


@pytest.mark.parametrize(
    ("loss", "norm", "words"),
    [
        (math.nan, 1.0, "loss of step 8 is nan"),
        (math.inf, 1.0, "loss of step 8 is inf"),
        (1.0, math.nan, "gradient norm of step 8 is nan"),
        (1.0, math.inf, "gradient norm of step 8 is inf"),
        (1.0, 1.0, None),
    ],
)
def test_a_step_without_a_number_never_reaches_the_weights(loss, norm, words):
    if words is None:
        check_finite(loss, norm, 7)
        return
    with pytest.raises(RunError, match=words):
        check_finite(loss, norm, 7)


def test_an_overflow_is_skipped_and_halves_the_scale_and_the_next_step_counts():
    scaler = make_scaler()
    guard = OverflowGuard(scaler, 20)
    optimizer, (weight,) = make_optimizer(2.0)
    assert guard.check(1.0, math.inf, 0) == {"loss_scale": 1024.0, "skipped": True}
    weight.grad = paddle.to_tensor([math.inf])
    guard.step(optimizer, skips=True)
    assert weight.tolist() == [2.0] and guard.scale == 512.0
    assert guard.check(1.0, 3.0, 1) == {"loss_scale": 512.0}
    weight.grad = paddle.to_tensor([512.0 * 3])
    guard.step(optimizer, skips=False)
    assert weight.tolist() == pytest.approx([1.5]) and guard.scale == 512.0  # AdamW's first step is the rate


@pytest.mark.parametrize("skips", [True, False])
def test_processes_with_and_without_gradients_keep_one_scale(skips):
    """The norm says to all of them whether any gradient overflowed."""
    scales = []
    for gradient in (math.inf if skips else 1.0, None):
        guard = OverflowGuard(make_scaler(incr_every_n_steps=1), 20)
        optimizer, (weight,) = make_optimizer(2.0)
        if gradient is not None:
            weight.grad = paddle.to_tensor([gradient])
        guard.step(optimizer, skips=skips)
        scales.append(guard.scale)
        assert (weight.tolist() == [2.0]) == (skips or gradient is None)
    assert scales == [512.0, 512.0] if skips else scales == [2048.0, 2048.0]


def test_what_overflowed_elsewhere_is_not_applied_here():
    guard = OverflowGuard(make_scaler(), 20)
    optimizer, (weight,) = make_optimizer(2.0)
    weight.grad = paddle.to_tensor([1.0])
    guard.step(optimizer, skips=True)
    assert weight.tolist() == [2.0]
    moments = optimizer._accumulators.get("moment1", {})
    assert all(each.tolist() == [0.0] for each in moments.values())


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_a_remedy():
    guard = OverflowGuard(make_scaler(), 3)
    for step in range(2):
        guard.check(1.0, math.nan, step)
    guard.check(1.0, 1.0, 2)
    for step in range(3, 5):
        assert guard.check(math.nan, math.nan, step)["skipped"]
    with pytest.raises(RunError, match=r"3 float16 steps in a row were skipped, the last one step 6.*bf16"):
        guard.check(1.0, math.inf, 5)


def test_the_scale_of_a_checkpoint_is_taken_up():
    scaler = make_scaler()
    guard = OverflowGuard(scaler, 3)
    state = make_scaler(64.0).state_dict()
    scaler.load_state_dict(state)
    guard.read_scale()
    assert guard.scale == 64.0


def test_paddles_lines_about_the_scale_stay_off_the_screen(capfd):
    guard = OverflowGuard(make_scaler(), 3)
    optimizer, (weight,) = make_optimizer(2.0)
    weight.grad = paddle.to_tensor([math.inf])
    guard.step(optimizer, skips=True)
    assert "Found inf" not in capfd.readouterr().out


def test_skipped_steps_are_counted_on_where_a_run_continues():
    guard = OverflowGuard(make_scaler(), max_skipped_steps=3)
    for step in range(2):
        assert guard.check(1.0, math.inf, step)["skipped"]
    again = OverflowGuard(make_scaler(), max_skipped_steps=3)
    again.restore(guard.counts())
    with pytest.raises(RunError, match="3 float16 steps in a row were skipped, the last one step 3:"):
        again.check(1.0, math.inf, 2)
    older = OverflowGuard(make_scaler(), max_skipped_steps=3)
    older.restore({})  # checkpoints written before these counts
    assert older.check(1.0, math.inf, 2)["skipped"] and older.num_skipped == 1


def test_a_training_that_learned_nothing_says_so():
    guard = OverflowGuard(make_scaler(), max_skipped_steps=9)
    assert guard.describe_end(4) is None
    for step in range(3):
        guard.check(1.0, math.inf, step)
    assert guard.describe_end(3).startswith("warning: nothing was learned: all 3 steps were skipped")
    guard.check(1.0, 1.0, 3)
    assert guard.describe_end(4) == "3 of 4 steps were skipped, because float16 overflowed"
