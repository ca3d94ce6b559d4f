"""What the records of Gemma 2 and Gemma 3 share: published defaults, refusals, tiny checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from finetune.errors import UserError
from finetune.families.gated_decoder import (
    gated_decoder_config,
    gated_decoder_weights,
    require_values,
    sized_decoder_weights,
)
from finetune.families.tiny_recipe import TensorSpec, TinyShape

_KINDS = ("full_attention", "sliding_attention")
_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_TINY_HEADS = 2  # times hidden size / heads: published models have heads of another size than that


def complete_gemma(
    config: dict[str, Any], name: str, *, defaults: dict[str, Any], has_window: Callable[[int], bool]
) -> dict[str, Any]:
    """Adds what the file leaves out, refuses what the layers do not compute.

    Args:
        config: config.json with its rotary settings at the top.
        name: Of the family, as users know it.
        defaults: What transformers takes for fields that are left out.
        has_window: Whether a layer has the window, by its number, where no list says so.

    Raises:
        UserError: Another activation, an output layer of its own, a list that does not fit the layers.
    """
    require_values(
        config,
        name,
        hidden_activation="gelu_pytorch_tanh",
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        use_bidirectional_attention=False,
    )
    # Files have one of the two names of the activation; PaddleNLP's object would write its own default for the other.
    activations = dict.fromkeys(("hidden_act", "hidden_activation"), "gelu_pytorch_tanh")
    whole = {**defaults, **config, **activations, "tie_word_embeddings": True}
    num_layers = whole["num_hidden_layers"]
    if whole.get("layer_types") is None:
        whole["layer_types"] = [_KINDS[has_window(number)] for number in range(num_layers)]
    kinds = whole["layer_types"]
    if len(kinds) != num_layers or not set(kinds) <= set(_KINDS):
        raise UserError(
            f"config.json has layer_types of {len(kinds)} layers, {', '.join(sorted(set(map(str, kinds))))}, but must name "
            f"one of {' and '.join(_KINDS)} for each of num_hidden_layers {num_layers}: copy it again"
        )
    return whole


def tiny_head_dim(shape: TinyShape) -> int:
    """Size of a head of a tiny model."""
    return _TINY_HEADS * shape.hidden_size // shape.num_heads


def tiny_gemma_config(shape: TinyShape, **more: Any) -> dict[str, Any]:
    """config.json of a tiny Gemma 2 or 3.

    Args:
        shape: Its sizes.
        **more: Fields to add, or with other values.
    """
    fields = {
        "head_dim": tiny_head_dim(shape),
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": tiny_head_dim(shape) * 9 // 8,  # not the size of a head, as in Gemma 2 27B
        "sliding_window": 16,
        "layer_types": [_KINDS[number % 2 == 0] for number in range(shape.num_layers)],
        "tie_word_embeddings": True,
        "attention_bias": False,
    }
    return gated_decoder_config(shape, **fields | more)


def tiny_gemma_weights(shape: TinyShape, prefix: str, *, head_norms: bool = False) -> dict[str, TensorSpec]:
    """PaddleNLP's parameters of a tiny Gemma 2 or 3."""
    return gated_decoder_weights(
        shape,
        prefix,
        norm_fill="zeros",
        tied=True,
        head_dim=tiny_head_dim(shape),
        head_norms=head_norms,
        more_norms=_NORMS,
    )


def sized_gemma_weights(
    config: Mapping[str, Any], prefix: str, *, head_norms: bool = False
) -> dict[str, TensorSpec]:
    """The same of a model with this configuration, as the family adapts it."""
    return sized_decoder_weights(config, prefix, tied=True, head_norms=head_norms, more_norms=_NORMS)
