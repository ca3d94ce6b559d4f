"""The linear layers, norms and feed-forward layers of decoders that `HeadFacts` describe."""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddlenlp.transformers import linear_utils


class HeadNorm(nn.Layer):
    """RMS norm over the places of a head, Zhang and Sennrich 2019, in float32; one weight for all heads.

    Args:
        size: Of a head.
        epsilon: Added to the mean square.
    """

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.epsilon = epsilon
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0))
        # A tensor-parallel rank has the gradient of its own heads only: to be summed, as of norms of divided rows.
        self.weight.sequence_parallel = True

    def forward(self, heads: Any) -> Any:
        """[batch, length, heads, head dim] -> the same shape and type."""
        with paddle.amp.auto_cast(enable=False):
            wide = heads.astype("float32")
            normed = wide * paddle.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
            return (normed * self.weight.astype("float32")).astype(heads.dtype)


class GatedFeedForward(nn.Layer):
    """silu(gate) * up, Shazeer 2020.

    Args:
        config: Sizes and degrees of parallelism.
        joined: Whether the files hold the gate and, behind it, what it multiplies as one layer.
        has_bias: Whether the layers have biases.
    """

    def __init__(self, config: Any, *, joined: bool, has_bias: bool):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        if joined:
            self.gate_up_proj = column_layer(config, hidden, 2 * inner, has_bias=has_bias)
        elif config.fuse_attention_ffn:
            self.gate_up_fused_proj = column_layer(config, hidden, 2 * inner, has_bias=has_bias)
        else:
            self.gate_proj = column_layer(config, hidden, inner, has_bias=has_bias)
            self.up_proj = column_layer(config, hidden, inner, has_bias=has_bias)
        self.down_proj = row_layer(config, inner, hidden, has_bias=has_bias)

    def forward(self, x: Any) -> Any:
        """[..., hidden] -> the same shape."""
        if hasattr(self, "gate_proj"):
            return self.down_proj(F.swiglu(self.gate_proj(x), self.up_proj(x)))
        layer = self.gate_up_proj if hasattr(self, "gate_up_proj") else self.gate_up_fused_proj
        return self.down_proj(F.swiglu(layer(x)))


def column_layer(config: Any, num_in: int, num_out: int, *, has_bias: bool = False) -> Any:
    """A linear layer whose outputs tensor parallelism divides."""
    if config.tensor_parallel_degree <= 1:
        return nn.Linear(num_in, num_out, bias_attr=None if has_bias else False)
    kind = (
        linear_utils.ColumnSequenceParallelLinear
        if config.sequence_parallel
        else linear_utils.ColumnParallelLinear
    )
    return kind(num_in, num_out, has_bias=has_bias, gather_output=False)


def row_layer(config: Any, num_in: int, num_out: int, *, has_bias: bool = False) -> Any:
    """A linear layer whose inputs tensor parallelism divides; a bias is whole on every rank."""
    if config.tensor_parallel_degree <= 1:
        return nn.Linear(num_in, num_out, bias_attr=None if has_bias else False)
    kind = (
        linear_utils.RowSequenceParallelLinear if config.sequence_parallel else linear_utils.RowParallelLinear
    )
    return kind(num_in, num_out, has_bias=has_bias, input_is_parallel=True)
