"""Gradients of micro-batches, added up in the parameters' dtype or in float32."""

import numpy as np
import paddle
import pytest

from finetune.parallel.sharding.local_gradients import MasterGradients, ParameterGradients


def make_parameter(dtype: str = "float32"):
    return paddle.create_parameter([2], dtype, default_initializer=paddle.nn.initializer.Constant(1.0))


def backward(parameter, factor: float) -> None:
    paddle.multiply(parameter, paddle.full([2], factor, parameter.dtype)).backward(
        paddle.ones([2], parameter.dtype)
    )


@pytest.mark.parametrize("kind", [MasterGradients, lambda parameters: ParameterGradients()])
def test_gradients_of_micro_batches_are_added_up_handed_over_and_dropped(kind):
    used, unused = make_parameter(), make_parameter()
    gradients = kind([used, unused])
    for factor in (1.0, 2.0):
        backward(used, factor)
    assert gradients.exists(used) and not gradients.exists(unused)
    assert gradients.get(used).tolist() == [3.0, 3.0] and gradients.get(unused).tolist() == [0.0, 0.0]
    for parameter, expected in ((used, 3.0), (unused, 0.0)):
        gradients.hand_over(parameter)
        assert parameter.grad.tolist() == [expected, expected]
        parameter.clear_gradient(False)
        gradients.clear(parameter)
        assert not gradients.exists(parameter) and parameter.grad is None
    backward(used, 4.0)
    assert gradients.get(used).tolist() == [4.0, 4.0]


def test_float32_sums_keep_what_bfloat16_sums_lose():
    parameter = make_parameter("bfloat16")
    gradients = MasterGradients([parameter])
    for factor in (256.0, 1.0, 1.0, 1.0):
        backward(parameter, factor)
    assert parameter.grad is None
    gradient = gradients.get(parameter)
    assert gradient.dtype == paddle.float32
    np.testing.assert_array_equal(gradient.numpy(), [259.0, 259.0])
    gradients.hand_over(parameter)
    assert parameter.grad.dtype == paddle.float32 and not gradients.exists(parameter)
