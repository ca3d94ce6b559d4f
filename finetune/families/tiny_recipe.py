"""How a tiny random checkpoint of a family is made: its sizes, its configuration, the shapes of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True, kw_only=True)
class ByteLevelKind:
    """A tokenizer of byte-level pairs, trained for a tiny checkpoint.

    Attributes:
        special_tokens: All special tokens, in the order of their ids.
        roles: The token of each role: "bos", "eos", "pad", and "unk" where there is one.
        pattern: Regular expression whose matches are cut out before merging.
        special_first: Whether special tokens have the first ids, or the last.
        one_file: Whether tokenizer.json holds all of it, or vocab.json and merges.txt.
        settings: Further fields of tokenizer_config.json.
    """

    special_tokens: tuple[str, ...]
    roles: Mapping[str, str]
    pattern: str
    special_first: bool
    one_file: bool
    settings: Mapping[str, Any]


LLAMA_PIECES = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
"""Ids of the control tokens of Llama's SentencePiece model, by the names of the trainer."""


@dataclass(frozen=True, kw_only=True)
class SentencePieceKind:
    """A tokenizer of SentencePiece's byte-pair kind, trained for a tiny checkpoint.

    Attributes:
        pieces: Ids and texts of the control tokens, and further options, by the names of SentencePiece's trainer.
        tokenizer_class: Name of the class that reads the files.
        names: Names that the folder gives to pieces -> these pieces.
        settings: Further fields of tokenizer_config.json, or other values.
    """

    pieces: Mapping[str, Any] = field(default_factory=lambda: LLAMA_PIECES)
    tokenizer_class: str = "LlamaTokenizer"
    names: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TinyRecipe:
    """How to write a random checkpoint of the family without building the model.

    Attributes:
        tokenizer: The tokenizer to train; a name for kinds that only one family has: a key of `TOKENIZER_WRITERS` in
            `finetune.models.tiny`.
        config: Shape -> content of config.json.
        weights: Shape -> PaddleNLP's parameter names (linear layers stored as [in, out]).
        grouped_heads: Whether several heads may share one head of keys and values.
        head_dim_multiple: What the size of a head must be divisible by.
        inner_ratio: Inner size of the feed-forward layers over the hidden size, where the architecture
            fixes it.
    """

    tokenizer: SentencePieceKind | ByteLevelKind | str
    config: Callable[[TinyShape], dict[str, Any]]
    weights: Callable[[TinyShape], dict[str, TensorSpec]]
    grouped_heads: bool = True
    head_dim_multiple: int = 1
    inner_ratio: int | None = None
