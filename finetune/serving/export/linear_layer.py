"""Linear layers and activations of the exported graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
import paddle.nn.functional as F
from numpy.typing import NDArray
from paddle import nn

from finetune.families.decoder_description import Linear

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate=True),
    "relu": F.relu,
}


def activate_gated(x: Any, activation: str) -> Any:
    """The activation of the first half multiplies the second, [..., 2 x inner] -> [..., inner]."""
    if activation == "silu":
        return F.swiglu(x)
    gate, up = paddle.split(x, 2, axis=-1)
    return ACTIVATIONS[activation](gate) * up


def parameter(array: NDArray[Any], dtype: str) -> Any:
    """A frozen parameter that holds an array."""
    made = paddle.create_parameter(list(array.shape), dtype, default_initializer=nn.initializer.Constant(0.0))
    made.set_value(paddle.to_tensor(array).astype(dtype))
    made.stop_gradient = True
    return made


class LinearLayer(nn.Layer):
    """x @ weight + bias."""

    def __init__(self, linear: Linear, dtype: str):
        super().__init__()
        self.weight = parameter(linear.weight, dtype)
        self.bias = None if linear.bias is None else parameter(linear.bias, dtype)

    def forward(self, x: Any) -> Any:
        """[..., in] -> [..., out]."""
        if self.bias is not None and x.dtype != paddle.float32:
            return F.linear(x, self.weight, self.bias)  # rounds once, as in training
        product = paddle.matmul(x, self.weight)
        return product if self.bias is None else product + self.bias
