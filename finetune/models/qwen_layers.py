"""Qwen that trains the same whatever was evaluated before.

For prompts longer than `seq_length` Qwen stretches its rotary positions (dynamic NTK), outside of training
only. PaddleNLP's layers remember the last stretch and go on with it in training.
"""

from __future__ import annotations

from typing import Any

from paddlenlp.transformers.qwen import modeling


class QWenForCausalLM(modeling.QWenForCausalLM):
    """Qwen whose rotary positions are never stretched in training."""

    def __init__(self, config: Any):
        super().__init__(config)
        for block in self.qwen.h:
            block.attn.register_forward_pre_hook(_forget_stretch)


def _forget_stretch(attention: Any, _inputs: tuple) -> None:
    if attention.training:
        attention._ntk_cached = 1.0
