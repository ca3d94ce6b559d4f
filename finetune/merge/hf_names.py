"""Hugging Face's names of a model's tensors, PaddleNLP's, and which of them are stored as [out, in].

Every family of layers is called alike in both but for the first part of the names; what else differs stands in
`_DIALECTS`. PaddleNLP has tables of its own, but they need Paddle; the tests compare the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.models.family import Family

_NUMBER = "{}"


@dataclass(frozen=True)
class Dialect:
    """How a family's names differ.

    Attributes:
        prefix: First part of Hugging Face's names inside the model.
        bare: Whether published files also leave that part out.
        pairs: Hugging Face's and PaddleNLP's names after the first part where they differ; {} is a number.
        tables: PaddleNLP's names after the first part of embeddings, which are [rows, hidden] in both; that of the
            tokens first.
        always_tied: Whether the output layer is the embedding whatever the configuration says.
    """

    prefix: str = "model"
    bare: bool = False
    pairs: tuple[tuple[str, str], ...] = ()
    tables: tuple[str, ...] = ("embed_tokens",)
    always_tied: bool = False


_DIALECTS: Mapping[str, Dialect] = {
    "bloom": Dialect(prefix="transformer", bare=True, tables=("word_embeddings",), always_tied=True),
    "chatglm2": Dialect(prefix="transformer", tables=("embedding.word_embeddings",)),
    "gemma": Dialect(always_tied=True),
    "qwen": Dialect(prefix="transformer", tables=("wte",)),
    "opt": Dialect(
        bare=True,
        pairs=(
            ("decoder.embed_tokens", "embeddings.word_embeddings"),
            ("decoder.embed_positions", "embeddings.position_embeddings"),
            ("decoder.project_in", "embeddings.project_in"),
            ("decoder.layers.{}.self_attn_layer_norm", "decoder.layers.{}.norm1"),
            ("decoder.layers.{}.final_layer_norm", "decoder.layers.{}.norm2"),
            ("decoder.layers.{}.fc1", "decoder.layers.{}.linear1"),
            ("decoder.layers.{}.fc2", "decoder.layers.{}.linear2"),
        ),
        tables=("embeddings.word_embeddings", "embeddings.position_embeddings"),
        always_tied=True,
    ),
}
# The model's configuration says which layers these join: names of the parts in their order.
_JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_fused_proj": ("gate_proj", "up_proj"),
}


def dialect_of(family: Family) -> Dialect:
    """How this family's names differ; a family without an entry is named as Llama is."""
    return _DIALECTS.get(family.name, Dialect())


def is_hugging_face(names: Iterable[str], family: Family) -> bool:
    """Whether a model's tensors bear Hugging Face's names."""
    return not any(name.startswith(f"{family.base_prefix}.") for name in names)


def to_paddle(name: str, family: Family) -> str:
    """PaddleNLP's name for Hugging Face's, for a tensor or a layer; unknown ones keep their ends."""
    dialect = dialect_of(family)
    if f"{name}.".startswith("lm_head."):
        return name
    inner = name.removeprefix(f"{dialect.prefix}.")
    if inner == name and not dialect.bare:
        return name
    return f"{family.base_prefix}.{_translate(inner, dialect.pairs)}"


def to_hugging_face(name: str, family: Family) -> str:
    """Hugging Face's name for PaddleNLP's."""
    dialect = dialect_of(family)
    inner = name.removeprefix(f"{family.base_prefix}.")
    if inner == name:
        return name.replace(".decoder_weight", ".weight")
    return f"{dialect.prefix}.{_translate(inner, [(there, here) for here, there in dialect.pairs])}"


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
    if layer == "lm_head":
        return not tied
    return layer.removeprefix(f"{family.base_prefix}.") not in dialect_of(family).tables


def embedding_name(family: Family) -> str:
    """PaddleNLP's name of the tokens' embedding."""
    return f"{family.base_prefix}.{dialect_of(family).tables[0]}.weight"


def is_tied(config: Mapping[str, Any], family: Family) -> bool:
    """Whether the output layer is the embedding; some families have no other."""
    return dialect_of(family).always_tied or bool(config.get("tie_word_embeddings"))


def joined_parts(layer: str) -> tuple[str, ...]:
    """Layers that the layer of that name joins (`fuse_attention_qkv`, `fuse_attention_ffn`); () when none."""
    parent, _, leaf = layer.rpartition(".")
    return tuple(f"{parent}.{part}" for part in _JOINED.get(leaf, ()))


def joined_columns(layer: str, width: int, config: Mapping[str, Any], family: Family) -> list[np.ndarray]:
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


def _translate(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for here, there in pairs:
        pattern = re.escape(here).replace(re.escape(_NUMBER), r"(\d+)")
        if match := re.fullmatch(rf"{pattern}(\..+)?", name):
            *numbers, rest = match.groups()
            return there.format(*numbers) + (rest or "")
    return name
