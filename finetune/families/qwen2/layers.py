"""Qwen2 with the forward pass, attention and rotary positions of this project; see the modules they come from."""

from __future__ import annotations

from typing import Any

from paddlenlp.transformers.qwen2 import modeling

from finetune.families.gated_layers import GatedDecoder, attend_by_one_mask, keep_rotary_tables
from finetune.families.rotary import turn_in_float32

attend_by_one_mask(modeling)
turn_in_float32(modeling)


class Qwen2Model(GatedDecoder, modeling.Qwen2Model):
    """Qwen2's decoder."""


class Qwen2ForCausalLM(modeling.Qwen2ForCausalLM):
    """Qwen2 with its output layer, built on the decoder above."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.qwen2.__class__ = Qwen2Model
        keep_rotary_tables(self)
