"""Gemma with the GELU it was trained with.

PaddleNLP's feed-forward layer computes the exact GELU whatever the config says; the published weights
were trained with the tanh approximation. At activations of order one the logits differ by about 1e-3.
"""

from __future__ import annotations

from typing import Any

import paddle
import paddle.nn.functional as F
from paddlenlp.transformers.gemma import modeling


class TanhGeluMLP(modeling.GemmaMLP):
    """GeGLU with the tanh approximation of GELU."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[batch, length, hidden] -> the same shape."""
        return self.down_proj(F.gelu(self.gate_proj(x), approximate=True) * self.up_proj(x))


class GemmaForCausalLM(modeling.GemmaForCausalLM):
    """Gemma whose feed-forward layers compute the tanh approximation; the record refuses other configs."""

    def __init__(self, config: Any):
        super().__init__(config)
        for layer in self.gemma.layers:
            layer.mlp = TanhGeluMLP(config)

    @classmethod
    def _get_name_mappings(cls, config: Any) -> list[Any]:
        """PaddleNLP's table without the output layer, which is the input embedding."""
        return [each for each in super()._get_name_mappings(config) if each.source_name != "lm_head.weight"]
