"""GPT-2: learned positions, layer norms, a feed-forward layer without a gate, biases everywhere."""

from __future__ import annotations

from typing import Any

from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.head_facts import HeadFacts


class Gpt2Config(HeadConfig):
    """GPT-2's configuration.

    Args:
        attention_dropout: Share of attention's probabilities that are dropped.
        branch_dropout: The same of what attention and feed-forward layers give.
        embedding_dropout: The same of embeddings.
        **fields: As `HeadConfig` has them.
    """

    model_type = "gpt2"

    def __init__(
        self,
        attention_dropout: float = 0.0,
        branch_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        **fields: Any,
    ):
        super().__init__(**fields)
        self.attention_dropout = attention_dropout
        self.branch_dropout, self.embedding_dropout = branch_dropout, embedding_dropout


class Gpt2ForCausalLM(HeadForCausalLM):
    """GPT-2 with its output layer."""

    config_class = Gpt2Config
    base_model_prefix = "gpt2"
    facts = HeadFacts(
        turned_share=0.0,
        learned_positions=True,
        joined_input=True,
        input_bias=True,
        output_bias=True,
        inner_bias=True,
        gated=False,
        activation="gelu_tanh",
        centred_norms=True,
    )
