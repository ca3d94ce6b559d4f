"""ChatGLM2 with two faults of PaddleNLP's model put right.

With flash attention PaddleNLP reads the result, [batch, length, ...], as [length, batch, ...], so that the
rows of a batch are mixed up (logits of a tiny model off by 6; a batch of one is right). And its functions that
cut fused weights for tensor parallelism take Paddle tensors only, while checkpoints are read as arrays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddlenlp.transformers.chatglm_v2 import modeling


class FlashAttention(paddle.nn.Layer):
    """The core of attention by Paddle's fused kernel, with the axes that the layers around it expect."""

    def __init__(self, config: Any):
        super().__init__()
        self.dropout = config.attention_dropout
        self.sequence_parallel = config.sequence_parallel

    def forward(
        self, query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, attention_mask: paddle.Tensor
    ) -> paddle.Tensor:
        """[length, batch, heads, head dim] each, mask [batch, 1, length, keys] -> [length, batch, hidden]."""
        batch_first = [part.transpose([1, 0, 2, 3]) for part in (query, key, value)]
        output = F.scaled_dot_product_attention(
            *batch_first, attn_mask=attention_mask, dropout_p=self.dropout, training=self.training
        )
        output = output.transpose([1, 0, 2, 3]).flatten(2)
        return output.flatten(0, 1) if self.sequence_parallel else output


class ChatGLMv2ForCausalLM(modeling.ChatGLMv2ForCausalLM):
    """ChatGLM2 whose flash attention keeps the rows of a batch apart."""

    def __init__(self, config: Any):
        super().__init__(config)
        if config.use_flash_attention:
            plain = copy.copy(config)
            plain.use_flash_attention = False
            for layer in self.chatglm_v2.encoder.layers:
                layer.self_attention.config = plain
                layer.self_attention.core_attention = FlashAttention(config)

    @classmethod
    def _get_tensor_parallel_mappings(
        cls, config: Any, is_split: bool = True
    ) -> dict[str, Callable[[Any], Any]]:
        actions = super()._get_tensor_parallel_mappings(config, is_split=is_split)
        return (
            {name: partial(_on_tensor, action) for name, action in actions.items()} if is_split else actions
        )


def _on_tensor(action: Callable[[Any], Any], weight: Any) -> Any:
    if not isinstance(weight, np.ndarray):
        return action(weight)
    return np.asarray(action(paddle.to_tensor(weight, place=paddle.CPUPlace())))
