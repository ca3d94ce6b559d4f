"""Tiny checkpoints of the decoders that share Llama's layout: grouped queries, gated feed-forward, RMSNorm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError
from finetune.families.tiny_recipe import TensorSpec, TinyShape

LINEAR_LAYERS = (
    ".*q_proj.*",
    ".*k_proj.*",
    ".*v_proj.*",
    ".*o_proj.*",
    ".*gate_proj.*",
    ".*up_proj.*",
    ".*down_proj.*",
)
"""Patterns of all linear layers of such a decoder, for LoRA."""

TENSOR_SPLITS = {
    "embed_tokens": "vocabulary",
    "lm_head": "head",
    "q_proj": "columns",
    "[kv]_proj": "key_value_columns",
    # Grouped as PaddleNLP joins them: the queries of a key/value head, its key, its value.
    "qkv_proj": "columns",
    "o_proj": "rows",
    "(gate|up)_proj": "columns",
    "gate_up_fused_proj": "halves",
    "down_proj": "rows",
}
"""How tensor parallelism divides the layers of such a decoder."""

JOINED_SPLITS = {
    "embed_tokens": "vocabulary",
    "lm_head": "head",
    "query_key_value_proj": "query_key_value",
    "o_proj": "rows",
    "gate_up_proj": "halves",
    "down_proj": "rows",
}
"""The same where one layer gives queries, then keys, then values, and one the gate and what it multiplies."""


def require_values(config: dict[str, Any], name: str, **allowed: Any) -> None:
    """Raises UserError where config.json asks for what the layers do not compute.

    Args:
        config: As found.
        name: Of the family, as users know it.
        **allowed: The one value of each field; a field that is missing has it, and one of null unless that is true.
    """
    for field, value in allowed.items():
        # A switch of null is off, as transformers reads it.
        given = config.get(field, value)
        if given != value and (given is not None or value is True):
            raise UserError(
                f"config.json has {field} {config[field]!r}, but {name} is run with {value!r} only. Use other weights"
            )


def with_padding_field(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration for transformers that says where there is no padding token.

    Classes of large models take a missing one to be a number that a smaller vocabulary does not have.
    """
    return {"pad_token_id": None, **config}


def gated_decoder_config(shape: TinyShape, **more: Any) -> dict[str, Any]:
    """config.json of a tiny decoder, without the fields that name the model.

    Args:
        shape: Its sizes.
        **more: Fields to add, or to hold other values than Llama's.
    """
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": shape.max_length,
        "seq_length": shape.max_length,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        **more,
    }


def gated_decoder_weights(
    shape: TinyShape,
    prefix: str,
    *,
    norm_fill: str = "ones",
    qkv_bias: bool = False,
    output_bias: bool = False,
    inner_bias: bool = False,
    tied: bool = False,
    head_dim: int | None = None,
    head_norms: bool = False,
    more_norms: tuple[str, ...] = (),
) -> dict[str, TensorSpec]:
    """PaddleNLP's parameters of a tiny decoder, in the order in which they are drawn.

    Args:
        shape: Its sizes.
        prefix: First part of the names.
        norm_fill: What norms start with: "ones", or "zeros" where the layer adds one.
        qkv_bias: Whether query, key and value projections have a bias.
        output_bias: Whether the projection back has one.
        inner_bias: Whether the feed-forward layers have one.
        tied: Whether the embedding is the output projection, too.
        head_dim: Size of a head; None: hidden size / heads.
        head_norms: Whether queries and keys are normed, head by head.
        more_norms: Further norms of hidden states in every layer.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    head_dim = head_dim or hidden // shape.num_heads
    query_size, kv_size = head_dim * shape.num_heads, head_dim * shape.num_kv_heads
    weights = {f"{prefix}.embed_tokens.weight": TensorSpec((shape.vocab_size, hidden))}
    for number in range(shape.num_layers):
        layer = f"{prefix}.layers.{number}."
        for name, size in (("q", query_size), ("k", kv_size), ("v", kv_size)):
            weights[f"{layer}self_attn.{name}_proj.weight"] = TensorSpec((hidden, size))
            if qkv_bias:
                weights[f"{layer}self_attn.{name}_proj.bias"] = TensorSpec((size,), "zeros")
        for name in ("q_norm", "k_norm") if head_norms else ():
            weights[f"{layer}self_attn.{name}.weight"] = TensorSpec((head_dim,), norm_fill)
        weights |= {
            layer + "self_attn.o_proj.weight": TensorSpec((query_size, hidden)),
            **({layer + "self_attn.o_proj.bias": TensorSpec((hidden,), "zeros")} if output_bias else {}),
            layer + "mlp.gate_proj.weight": TensorSpec((hidden, inner)),
            layer + "mlp.up_proj.weight": TensorSpec((hidden, inner)),
            layer + "mlp.down_proj.weight": TensorSpec((inner, hidden)),
            layer + "input_layernorm.weight": TensorSpec((hidden,), norm_fill),
            layer + "post_attention_layernorm.weight": TensorSpec((hidden,), norm_fill),
        }
        for name, size in (("gate", inner), ("up", inner), ("down", hidden)) if inner_bias else ():
            weights[f"{layer}mlp.{name}_proj.bias"] = TensorSpec((size,), "zeros")
        weights |= {f"{layer}{name}.weight": TensorSpec((hidden,), norm_fill) for name in more_norms}
    weights[f"{prefix}.norm.weight"] = TensorSpec((hidden,), norm_fill)
    if not tied:
        weights["lm_head.weight"] = TensorSpec((hidden, shape.vocab_size))
    return weights


def sized_decoder_weights(config: Mapping[str, Any], prefix: str, **facts: Any) -> dict[str, TensorSpec]:
    """The same of a model with this configuration.

    Args:
        config: As the family adapts it, with Llama's names of sizes.
        prefix: First part of the names.
        **facts: Of `gated_decoder_weights`, beside the size of a head and whether the output layer is the embedding.
    """
    shape = TinyShape.of_config(config)
    own: dict[str, Any] = {
        "head_dim": config.get("head_dim"),
        "tied": bool(config.get("tie_word_embeddings")),
    }
    return gated_decoder_weights(shape, prefix, **(own | facts))


def joined_decoder_weights(shape: TinyShape, prefix: str) -> dict[str, TensorSpec]:
    """The same where one layer gives queries, keys and values, and one both halves of the feed-forward layer."""
    return join_inner_layers(join_input_layers(gated_decoder_weights(shape, prefix)))


def join_input_layers(weights: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The same weights where one layer gives queries, keys and values."""
    joined = {}
    for name, spec in weights.items():
        layer, _, part = name.rpartition(".")[0].rpartition(".")
        if part == "q_proj":
            sizes = [weights[f"{layer}.{each}_proj.weight"].shape[1] for each in "qkv"]
            joined[f"{layer}.query_key_value_proj.weight"] = TensorSpec((spec.shape[0], sum(sizes)))
        elif part not in ("k_proj", "v_proj"):
            joined[name] = spec
    return joined


def join_inner_layers(weights: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The same weights where one layer gives both halves of the feed-forward layer."""
    joined = {}
    for name, spec in weights.items():
        layer, _, part = name.rpartition(".")[0].rpartition(".")
        if part == "gate_proj":
            joined[f"{layer}.gate_up_proj.weight"] = TensorSpec((spec.shape[0], 2 * spec.shape[1]))
        elif part != "up_proj":
            joined[name] = spec
    return joined
