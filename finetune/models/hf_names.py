"""Hugging Face's names of a model's tensors, PaddleNLP's, and which of them are stored as [out, in].

Every family of layers is called alike in both but for the first part of the names; what else differs stands in
the family's record. PaddleNLP has tables of its own, but they need Paddle; the tests compare the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.families.family import Family
from finetune.families.multimodal.tensor_layout import without_wrapper
from finetune.families.record_parts import OUTPUT_LAYER
from finetune.models.reward_head import REWARD_HEAD, is_reward_config, reward_architecture
from finetune.storage.code_files import AUTO_MAP

JOINED_LAYERS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_fused_proj": ("gate_proj", "up_proj"),
}
"""Name of the joined layer -> names of the parts in their order."""

JOINED_ELSEWHERE = {
    "W_pack": "qkv_proj",
    "Wqkv": "qkv_proj",
    "c_attn": "qkv_proj",
    "gate_up_proj": "gate_up_fused_proj",
    "qkv": "qkv_proj",
    "query_key_value": "qkv_proj",
}
"""What other people's models call a joined layer -> its name here."""


def is_hugging_face(names: Iterable[str], family: Family) -> bool:
    """Whether a model's tensors bear Hugging Face's names."""
    return not any(name.startswith(f"{family.base_prefix}.") for name in names)


def to_paddle(name: str, family: Family) -> str:
    """PaddleNLP's name for Hugging Face's, for a tensor or a layer, also of a text part; unknown ones keep their ends."""
    name = without_wrapper(name)
    if f"{name}.".startswith(f"{REWARD_HEAD}."):
        return name
    return family.hugging_face.paddle_name(name, family.base_prefix)


def to_hugging_face(name: str, family: Family) -> str:
    """Hugging Face's name for PaddleNLP's."""
    return family.hugging_face.published_name(name, family.base_prefix)


def is_turned(name: str, shape: tuple[int, ...], family: Family, *, tied: bool) -> bool:
    """Whether Hugging Face stores the transpose.

    Args:
        name: PaddleNLP's name of the tensor.
        shape: Its shape in either form.
        family: Record of the model.
        tied: Whether the output layer is the embedding.
    """
    layer, _, ending = name.rpartition(".")
    if len(shape) != 2 or ending != "weight":
        return False
    if layer == OUTPUT_LAYER:
        return not tied
    form = family.hugging_face
    return form.turned and layer.removeprefix(f"{family.base_prefix}.") not in form.tables


def embedding_name(family: Family) -> str:
    """PaddleNLP's name of the tokens' embedding."""
    return f"{family.base_prefix}.{family.hugging_face.tables[0]}.weight"


def is_output(name: str) -> bool:
    """Whether a tensor, or the layer of that name, is the output layer."""
    return f"{name}.".startswith(f"{OUTPUT_LAYER}.")


def is_token_table(name: str) -> bool:
    """Whether a layer, or its weight, is the tokens' embedding under any family's name in Hugging Face's files."""
    return name.removesuffix(".weight").endswith(("embed_tokens", "word_embeddings", "tok_embeddings"))


def is_tied(config: Mapping[str, Any], family: Family) -> bool:
    """Whether the output layer is the embedding; for some families it is unless the configuration denies it.

    A reward model has no output layer.
    """
    return not is_reward_config(config) and says_tied(config, family)


def says_tied(config: Mapping[str, Any], family: Family) -> bool:
    """What a configuration says of the output layer, also that of a reward model, which keeps the field."""
    said = config.get("tie_word_embeddings")
    return family.hugging_face.always_tied if said is None else bool(said)


def joined_parts(layer: str) -> tuple[str, ...]:
    """Layers that the layer of that name joins (`fuse_attention_qkv`, `fuse_attention_ffn`); () when none."""
    parent, _, leaf = layer.rpartition(".")
    return tuple(f"{parent}.{part}" for part in JOINED_LAYERS.get(leaf, ()))


def joined_columns(layer: str, width: int, config: Mapping[str, Any], family: Family) -> list[NDArray[Any]]:
    """Columns of a joined layer that belong to each of its parts.

    Query, key and value lie in groups: the queries that share a key/value head, its key, its value. Gate and up
    projection are the two halves.

    Args:
        layer: PaddleNLP's name of the joined layer.
        width: Number of its columns.
        config: The model's configuration as the family adapts it.
        family: Record of the model.
    """
    places = np.arange(width)
    if len(joined_parts(layer)) == 2:
        return list(places.reshape(2, -1))
    geometry = family.prefix_geometry(config)
    num_queries = int(config[family.fields.num_heads]) // geometry.num_kv_heads
    groups = places.reshape(geometry.num_kv_heads, num_queries + 2, geometry.head_dim)
    return [
        groups[:, :num_queries].ravel(),
        groups[:, num_queries].ravel(),
        groups[:, num_queries + 1].ravel(),
    ]


def paddle_config(config: Mapping[str, Any], family: Family, *, dtype: str) -> dict[str, Any]:
    """A configuration in PaddleNLP's fields."""
    names = ("torch_dtype", "transformers_version", "_name_or_path")
    adapted = {name: value for name, value in family.adapt_config(dict(config)).items() if name not in names}
    causal = family.class_path(config).rpartition(".")[2]
    architecture = reward_architecture(family) if is_reward_config(config) else causal
    code = {name: config[name] for name in (AUTO_MAP,) if name in config}  # for the way back
    return adapted | code | {"architectures": [architecture], "dtype": dtype}
