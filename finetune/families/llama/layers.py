"""Llama with the forward pass, attention and rotary positions of this project; see the modules they come from."""

from __future__ import annotations

from typing import Any

from paddlenlp.transformers.llama import modeling

from finetune.families.gated_layers import GatedDecoder, attend_by_one_mask, keep_rotary_tables
from finetune.families.rotary import turn_in_float32

attend_by_one_mask(modeling)
turn_in_float32(modeling)


class LlamaModel(GatedDecoder, modeling.LlamaModel):
    """Llama's decoder."""


class LlamaForCausalLM(modeling.LlamaForCausalLM):
    """Llama with its output layer, built on the decoder above."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.llama.__class__ = LlamaModel
        keep_rotary_tables(self)
