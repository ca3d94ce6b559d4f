"""Falcon: attention beside a feed-forward layer without a gate, Almazrouei et al., "The Falcon Series" (2023)."""

from __future__ import annotations

from typing import Any

from finetune.families.head_decoder import HeadConfig, HeadForCausalLM
from finetune.families.head_facts import TWO_NORMS, HeadFacts, NormNames
from finetune.families.rotary_config import scaling_of

_SHARED_NORM = NormNames(inner=None)
_NORM_EACH = NormNames(attention="ln_attn", inner="ln_mlp")


class FalconConfig(HeadConfig):
    """Falcon's configuration.

    Args:
        new_decoder_architecture: Whether it is of the form of 40B and 11B, which transformers asks for.
        alibi: Whether scores get distances in place of rotary positions.
        parallel_attn: Whether attention and feed-forward layers stand side by side.
        num_ln_in_parallel_attn: Norms of a layer in which they do: 1 for both, or 2.
        bias: Whether linear layers have biases.
        **fields: As `HeadConfig` has them.
    """

    model_type = "falcon"

    def __init__(
        self,
        new_decoder_architecture: bool = False,
        parallel_attn: bool = True,
        num_ln_in_parallel_attn: int = 1,
        bias: bool = False,
        alibi: bool = False,
        **fields: Any,
    ):
        super().__init__(**fields)
        self.new_decoder_architecture, self.parallel_attn = new_decoder_architecture, parallel_attn
        self.num_ln_in_parallel_attn, self.bias, self.alibi = num_ln_in_parallel_attn, bias, alibi


class FalconForCausalLM(HeadForCausalLM):
    """Falcon with its output layer."""

    config_class = FalconConfig
    base_model_prefix = "falcon"

    @classmethod
    def facts_of(cls, config: Any) -> HeadFacts:
        """Branches, norms and biases as the configuration has them.

        One head of keys and values for all queries, one for each, and groups are one order of the joined layer.
        """
        has_bias = bool(config.bias)
        beside = _NORM_EACH if config.num_ln_in_parallel_attn == 2 else _SHARED_NORM
        return HeadFacts(
            distances=bool(config.alibi),
            # Falcon adds distances to products that are not yet divided, and rounds them.
            rounded_divisor=config.head_dim**0.5,
            scaling=scaling_of(config),
            joined_input=True,
            grouped_input=True,
            input_bias=has_bias,
            output_bias=has_bias,
            inner_bias=has_bias,
            gated=False,
            activation="gelu",
            parallel_branches=bool(config.parallel_attn),
            norms=beside if config.parallel_attn else TWO_NORMS,
            centred_norms=True,
        )
