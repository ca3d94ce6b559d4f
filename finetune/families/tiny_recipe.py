"""How a tiny random checkpoint of a family is made: its sizes, its configuration, the shapes of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TinyShape:
    """Sizes of a checkpoint; counts except `max_length`, which is in tokens."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_length: int

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> TinyShape:
        """The sizes that a config.json tells under Llama's names."""
        num_heads = int(config["num_attention_heads"])
        return cls(
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_layers=int(config["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            vocab_size=int(config["vocab_size"]),
            max_length=int(config.get("max_position_embeddings") or 0),
        )


@dataclass(frozen=True)
class TensorSpec:
    """Shape of one weight and how a tiny checkpoint fills it: "normal", "ones" or "zeros"."""

    shape: tuple[int, ...]
    fill: str = "normal"


@dataclass(frozen=True)
class TinyRecipe:
    """How to write a random checkpoint of the family without building the model.

    Attributes:
        tokenizer: Kind of tokenizer to train; a key of `TOKENIZER_WRITERS` in `finetune.models.tiny`.
        config: Shape -> content of config.json.
        weights: Shape -> PaddleNLP's parameter names (linear layers stored as [in, out]).
        grouped_heads: Whether several heads may share one head of keys and values.
        head_dim_multiple: What the size of a head must be divisible by.
        inner_ratio: Inner size of the feed-forward layers over the hidden size, where the architecture
            fixes it.
    """

    tokenizer: str
    config: Callable[[TinyShape], dict[str, Any]]
    weights: Callable[[TinyShape], dict[str, TensorSpec]]
    grouped_heads: bool = True
    head_dim_multiple: int = 1
    inner_ratio: int | None = None
