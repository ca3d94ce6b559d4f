"""Gemma 2: windows in every second layer, caps on scores and logits, norms before and behind both branches."""

from __future__ import annotations

from typing import Any

from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.head_facts import HeadFacts, NormNames

_NORMS = NormNames(
    attention="input_layernorm",
    attention_output="post_attention_layernorm",
    inner="pre_feedforward_layernorm",
    inner_output="post_feedforward_layernorm",
)


class GemmaConfig(HeadConfig):
    """Configuration of a Gemma 2 or 3.

    Args:
        query_pre_attn_scalar: Scores are divided by its square root.
        layer_types: For each layer "sliding_attention" or "full_attention".
        attn_logit_softcapping: Cap of the scores.
        final_logit_softcapping: Cap of the logits.
        attention_bias: Whether the projections to and from heads have biases.
        **fields: As `HeadConfig` has them.
    """

    def __init__(
        self,
        query_pre_attn_scalar: float = 256,
        layer_types: list[str] | None = None,
        attn_logit_softcapping: float | None = None,
        final_logit_softcapping: float | None = None,
        attention_bias: bool = False,
        **fields: Any,
    ):
        super().__init__(**fields)
        self.query_pre_attn_scalar, self.layer_types = query_pre_attn_scalar, layer_types
        self.attn_logit_softcapping = attn_logit_softcapping
        self.final_logit_softcapping = final_logit_softcapping
        self.attention_bias = attention_bias


def gemma_facts(config: GemmaConfig) -> HeadFacts:
    """The facts of a Gemma 2, which are Gemma 3's but for its heads and rotary bases."""
    bias = bool(config.attention_bias)
    return HeadFacts(
        window=config.sliding_window or None,
        windowed_layers=tuple(kind == "sliding_attention" for kind in config.layer_types or ()),
        input_bias=bias,
        output_bias=bias,
        activation="gelu_tanh",
        norms=_NORMS,
        norm_offset=1.0,
        score_scale=config.query_pre_attn_scalar**-0.5,
        score_cap=config.attn_logit_softcapping or None,
        logit_cap=config.final_logit_softcapping or None,
        embedding_scale=config.hidden_size**0.5,
    )


class Gemma2Config(GemmaConfig):
    """Gemma 2's configuration."""

    model_type = "gemma2"


class Gemma2ForCausalLM(HeadForCausalLM):
    """Gemma 2 with its output layer."""

    config_class = Gemma2Config
    base_model_prefix = "gemma2"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Windows, caps and factors as the configuration has them."""
        return gemma_facts(config)
