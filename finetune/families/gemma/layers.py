"""Gemma with the GELU it was trained with, and norms that keep what their weights have learned.

PaddleNLP's feed-forward layer computes the exact GELU whatever the config says; the published weights
were trained with the tanh approximation. At activations of order one the logits differ by about 1e-3.

Forward pass, attention and rotary positions are those of `gated_layers`, `attention` and `rotary`.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddlenlp.transformers.gemma import modeling

from finetune.families.gated_layers import GatedDecoder, attend_by_one_mask, keep_rotary_tables
from finetune.families.rotary import turn_in_float32

attend_by_one_mask(modeling)
turn_in_float32(modeling)


class TanhGeluMLP(modeling.GemmaMLP):
    """GeGLU with the tanh approximation of GELU."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[batch, length, hidden] -> the same shape."""
        return self.down_proj(F.gelu(self.gate_proj(x), approximate=True) * self.up_proj(x))


class RMSNorm(modeling.GemmaRMSNorm):
    """The norm whose weights are differences from one, Zhang and Sennrich 2019.

    PaddleNLP adds the one in the type of the weights: near 1 bfloat16 has steps of 1/128, larger than many a
    learned difference. Here the sum, the norm and their product are float32 and rounded once.
    """

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[..., hidden] -> the same shape and type."""
        if self.config.use_fused_rms_norm:
            return super().forward(x)
        with paddle.amp.auto_cast(enable=False):
            return (self._norm(x.astype("float32")) * (self.weight.astype("float32") + 1)).astype(x.dtype)


class GemmaModel(GatedDecoder, modeling.GemmaModel):
    """Gemma's decoder."""

    def _enter(self, hidden: paddle.Tensor) -> paddle.Tensor:
        """Word embeddings are scaled up by the square root of their size."""
        return super()._enter(hidden) * (self.config.hidden_size**0.5)


class GemmaForCausalLM(modeling.GemmaForCausalLM):
    """Gemma whose feed-forward layers compute the tanh approximation; the record refuses other configs."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.gemma.__class__ = GemmaModel
        for layer in self.sublayers():
            if isinstance(layer, modeling.GemmaRMSNorm):
                layer.__class__ = RMSNorm
        for layer in self.gemma.layers:
            layer.mlp = TanhGeluMLP(config)
        keep_rotary_tables(self)

    def forward(
        self,
        input_ids: Any = None,
        position_ids: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        *,
        attn_mask_startend_row_indices: Any = None,
        **more: Any,
    ) -> Any:
        """Logits [batch, length, vocabulary] first; see `GatedDecoder.forward`."""
        if attn_mask_startend_row_indices is not None:
            attention_mask = attn_mask_startend_row_indices
        return super().forward(
            input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **more,
        )

    @classmethod
    def _get_name_mappings(cls, config: Any) -> list[Any]:
        """PaddleNLP's table without the output layer, which is the input embedding."""
        return [each for each in super()._get_name_mappings(config) if each.source_name != "lm_head.weight"]
