"""The linear layers, norms and feed-forward layers of decoders that `HeadFacts` describe."""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddle import nn
from paddle.distributed.fleet.utils.sequence_parallel_utils import (
    GatherOp,
    mark_as_sequence_parallel_parameter,
)
from paddlenlp.transformers import linear_utils
from paddlenlp.transformers.qwen2.modeling import Qwen2LMHead, parallel_matmul

from finetune.families.attention import soft_capped
from finetune.families.head_facts import HeadFacts


class HeadNorm(nn.Layer):
    """RMS norm over the places of a head, Zhang and Sennrich 2019, in float32; one weight for all heads.

    Args:
        size: Of a head.
        epsilon: Added to the mean square.
        offset: Added to the weight.
    """

    def __init__(self, size: int, epsilon: float, *, offset: float = 0.0):
        super().__init__()
        self.epsilon, self.offset = epsilon, offset
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0 - offset))
        # A tensor-parallel rank has the gradient of its own heads only: to be summed, as of norms of divided rows.
        self.weight.sequence_parallel = True

    def forward(self, heads: Any) -> Any:
        """[batch, length, heads, head dim] -> the same shape and type."""
        with paddle.amp.auto_cast(enable=False):
            wide = heads.astype("float32")
            normed = wide * paddle.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
            return (normed * (self.weight.astype("float32") + self.offset)).astype(heads.dtype)


class OffsetNorm(nn.Layer):
    """RMS norm of hidden states whose weights are differences from one, all of it in float32.

    Args:
        config: Sizes and degrees of parallelism.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.epsilon = config.rms_norm_eps
        self.weight = self.create_parameter(
            [config.hidden_size], default_initializer=nn.initializer.Constant(0.0)
        )
        if config.sequence_parallel:
            mark_as_sequence_parallel_parameter(self.weight)

    def forward(self, x: Any) -> Any:
        """[..., hidden] -> the same shape and type."""
        with paddle.amp.auto_cast(enable=False):
            wide = x.astype("float32")
            normed = wide * paddle.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
            return (normed * (self.weight.astype("float32") + 1.0)).astype(x.dtype)


class GatedFeedForward(nn.Layer):
    """activation(gate) * up, Shazeer 2020.

    Args:
        config: Sizes and degrees of parallelism.
        facts: Activation and biases; whether the files hold the gate and, behind it, what it multiplies as one layer.
    """

    def __init__(self, config: Any, facts: HeadFacts):
        super().__init__()
        self.activation = facts.activation
        hidden, inner, has_bias = config.hidden_size, config.intermediate_size, facts.inner_bias
        if facts.joined_inner:
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
            gate, up = self.gate_proj(x), self.up_proj(x)
            return self.down_proj(F.swiglu(gate, up) if self.activation == "silu" else _tanh_gelu(gate) * up)
        layer = self.gate_up_proj if hasattr(self, "gate_up_proj") else self.gate_up_fused_proj
        joined = layer(x)
        if self.activation == "silu":
            return self.down_proj(F.swiglu(joined))
        gate, up = paddle.chunk(joined, 2, axis=-1)
        return self.down_proj(_tanh_gelu(gate) * up)


class CappedHead(Qwen2LMHead):
    """An output layer whose logits z become cap * tanh(z / cap), Gemma 2 (2024), in float32 and rounded once.

    Args:
        cap: Of the logits.
        **more: As PaddleNLP's.
    """

    def __init__(self, *arguments: Any, cap: float, **more: Any):
        super().__init__(*arguments, **more)
        self.cap = cap

    def forward(self, hidden: Any, tensor_parallel_output: bool | None = None) -> Any:
        """[batch, length, hidden] -> logits."""
        logits = super().forward(hidden, tensor_parallel_output=tensor_parallel_output)
        with paddle.amp.auto_cast(enable=False):
            return soft_capped(logits.astype("float32"), self.cap).astype(logits.dtype)


class DividedHead(Qwen2LMHead):
    """An output layer whose logits are divided by a number of the model (Granite, 2024).

    Args:
        divisor: Of the logits.
        **more: As PaddleNLP's.
    """

    def __init__(self, *arguments: Any, divisor: float, **more: Any):
        super().__init__(*arguments, **more)
        self.divisor = divisor

    def forward(self, hidden: Any, tensor_parallel_output: bool | None = None) -> Any:
        """[batch, length, hidden] -> logits."""
        return super().forward(hidden, tensor_parallel_output=tensor_parallel_output) / self.divisor


class NormedHead(Qwen2LMHead):
    """An output layer that divides the weights of each token by their length, Yang et al., "Baichuan 2" (2023)."""

    def __init__(self, *arguments: Any, **more: Any):
        super().__init__(*arguments, **more)
        self._kept: tuple[Any, Any] | None = None

    def forward(self, hidden: Any, tensor_parallel_output: bool | None = None) -> Any:
        """[batch, length, hidden] -> logits."""
        config = self.config
        if config.sequence_parallel:
            hidden = GatherOp.apply(hidden).reshape([-1, config.seq_length, config.hidden_size])
        if tensor_parallel_output is None:
            tensor_parallel_output = config.tensor_parallel_output
        return parallel_matmul(
            hidden,
            self._unit_weight(),
            transpose_y=self.transpose_y,
            tensor_parallel_output=tensor_parallel_output,
        )

    def _unit_weight(self) -> Any:
        """The weight with columns of length 1; worked out once for all the tokens of an answer."""
        keeps = not (self.training or paddle.is_grad_enabled())
        version = self.weight.inplace_version
        if keeps and self._kept is not None and self._kept[0] == version:
            return self._kept[1]
        with paddle.amp.auto_cast(enable=False):
            wide = self.weight.astype("float32")
            unit = F.normalize(wide, axis=1 if self.transpose_y else 0).astype(self.weight.dtype)
        # Asked for by PaddleNLP's product.
        unit.is_distributed = self.weight.is_distributed
        self._kept = (version, unit) if keeps else None
        return unit


class FeedForward(nn.Layer):
    """GELU (Hendrycks and Gimpel 2016), exact or in its tanh form, between two linear layers.

    Args:
        config: Sizes and degrees of parallelism.
        facts: Activation and biases.
    """

    def __init__(self, config: Any, facts: HeadFacts):
        super().__init__()
        self.is_exact, has_bias = facts.activation == "gelu", facts.inner_bias
        self.up_proj = column_layer(config, config.hidden_size, config.intermediate_size, has_bias=has_bias)
        self.down_proj = row_layer(config, config.intermediate_size, config.hidden_size, has_bias=has_bias)

    def forward(self, x: Any) -> Any:
        """[..., hidden] -> the same shape."""
        return self.down_proj(F.gelu(self.up_proj(x), approximate=not self.is_exact))


def _tanh_gelu(x: Any) -> Any:
    return F.gelu(x, approximate=True)


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
