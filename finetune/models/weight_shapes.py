"""Names and shapes of all parameters of a model, worked out from its config.json alone.

What is worked out equals what the built model has, by name and shape (`tests/models/test_weight_shapes.py`, for all
families and their options), so that sizes can be told before Paddle is loaded and weights are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.families.family import Family
from finetune.families.tiny_recipe import TinyShape
from finetune.models.hf_names import JOINED_LAYERS, embedding_name, is_output, is_tied
from finetune.models.reward_head import REWARD_WEIGHT, is_reward_config

Shape = tuple[int, ...]

_JOINED_BY = dict(zip(("fuse_attention_qkv", "fuse_attention_ffn"), JOINED_LAYERS, strict=True))
"""Option -> the layer that it makes of several."""


def weight_shapes(
    family: Family,
    config: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Shape]:
    """The parameters that a model of this configuration has in one process, a tied output layer once.

    Args:
        family: Record of the model.
        config: Its configuration as the family adapts it.
        vocab_size: Rows of the embeddings where they are not those of the configuration.
        options: Settings of the run that join layers: `fuse_attention_qkv`, `fuse_attention_ffn`.

    Returns:
        PaddleNLP's name -> shape; linear layers are [in, out].
    """
    sized = {**config, "vocab_size": vocab_size or config["vocab_size"]}
    specs = family.weights(sized) if family.weights else family.tiny.weights(_sizes(family, sized))
    shapes = {name: spec.shape for name, spec in specs.items()}
    if is_reward_config(sized):
        shapes = {name: each for name, each in shapes.items() if not is_output(name)}
        shapes[REWARD_WEIGHT] = (family.width(sized), 1)
    elif is_tied(sized, family):
        shapes = {name: each for name, each in shapes.items() if not is_output(name)}
    for option, joined in _JOINED_BY.items():
        if (options or {}).get(option):
            shapes = _join(shapes, joined)
    return shapes


def width_of_embedding(family: Family, shapes: Mapping[str, Shape]) -> int:
    """Columns of the tokens' embedding, which are fewer than the hidden size in some models."""
    return shapes[embedding_name(family)][1]


def _sizes(family: Family, config: Mapping[str, Any]) -> TinyShape:
    fields = family.fields
    num_heads = int(config[fields.num_heads])
    num_kv_heads = int(config.get(fields.num_kv_heads or "") or num_heads)
    inner = config.get(fields.inner_size or "") or (family.tiny.inner_ratio or 4) * family.width(config)
    return TinyShape(
        hidden_size=family.width(config),
        intermediate_size=int(inner),
        num_layers=int(config[fields.num_layers]),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        vocab_size=int(config["vocab_size"]),
        max_length=int(config.get(fields.max_positions) or 0),
    )


def _join(shapes: Mapping[str, Shape], joined: str) -> dict[str, Shape]:
    """The same parameters where one layer gives what several did, weights and biases."""
    first, *others = JOINED_LAYERS[joined]
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        layer, _, tensor = name.rpartition(".")
        parent, _, leaf = layer.rpartition(".")
        parts = [f"{parent}.{part}.{tensor}" for part in JOINED_LAYERS[joined]]
        if not set(parts) <= set(shapes):
            found[name] = shape
        elif leaf == first:
            found[f"{parent}.{joined}.{tensor}"] = (*shape[:-1], sum(shapes[part][-1] for part in parts))
        elif leaf not in others:
            found[name] = shape
    return found
