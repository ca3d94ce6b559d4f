"""Parts of a family's record: names in its config.json, its tokenizer, its files at Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

OUTPUT_LAYER = "lm_head"
"""PaddleNLP's name of output layers, and most publishers'."""
_NUMBER = "{}"


def unchanged(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as it is."""
    return config


@dataclass(frozen=True)
class ConfigFields:
    """Names under which a family's config.json keeps its sizes (None: the family has no such field).

    Attributes:
        inner_parts: Parts of the feed-forward layers that `inner_size` counts together.
    """

    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    num_kv_heads: str | None = None
    hidden_size: str = "hidden_size"
    inner_size: str | None = "intermediate_size"
    inner_parts: int = 1
    head_dim: str | None = None
    max_positions: str = "max_position_embeddings"
    experts: str | None = None


@dataclass(frozen=True)
class PrefixGeometry:
    """Sizes of the keys and values that prefix tuning puts before every layer.

    Attributes:
        postprocess: Dotted path of the function that turns a tensor
            (batch, prefix length, 2 x layers, kv heads, head dim) into the family's past key values.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    postprocess: str


@dataclass(frozen=True)
class TokenizerFacts:
    """How prompts are framed. A token is named by its role ("bos", "eos", "pad", "unk") or by its text.

    Attributes:
        prefix: Tokens that open every sequence.
        answer_prefix: Tokens between a prompt and its answer, of which a sequence then has one only: earlier answers
            are part of the prompt.
        end_of_answer: Token that ends an answer and stops generation.
        pad_fallback: Token used for padding when the tokenizer names none.
        chat_ends: Tokens by which chat templates end an answer; generation stops at them too, where the
            tokenizer has them.
        vocab_files: Vocabulary file names that the PaddleNLP tokenizer can read, in the order of
            preference; the first is the name it writes itself.
        tokenizer_class: Dotted path of the tokenizer for folders that do not name one.
        reads_add_bos: Whether `add_bos_token` of tokenizer_config.json, where it is given, decides about "bos" in
            `prefix`.
        opened_by_file: Whether the tokens that the steps of a tokenizer.json put in front of a text open it, too.
        own_class: Whether `tokenizer_class` is used even where a folder names another, because what
            folders name is not the right one.
    """

    prefix: tuple[str, ...]
    end_of_answer: str
    pad_fallback: str
    vocab_files: tuple[str, ...]
    tokenizer_class: str
    own_class: bool = False
    opened_by_file: bool = False
    chat_ends: tuple[str, ...] = ()
    answer_prefix: tuple[str, ...] = ()
    reads_add_bos: bool = False


@dataclass(frozen=True)
class HuggingFaceForm:
    """How Hugging Face's files of a family differ from PaddleNLP's, beyond the first part of the names.

    Attributes:
        prefix: First part of Hugging Face's names inside the model; `bare`: published files also leave it out.
        head: Hugging Face's name of the output layer.
        turned: Whether linear layers are [out, in] in its files; the output layer always is.
        pairs: Hugging Face's and PaddleNLP's names after the first part where they differ; {} is a number.
        tables: PaddleNLP's names after the first part of embeddings, which are [rows, hidden] in both; that of the
            tokens first.
        always_tied: Whether the output layer is the embedding unless the configuration denies it.
        has_distances: Whether transformers' model, too, adds distances to the scores where `alibi` says so.
        config: PaddleNLP's configuration as the family adapts it -> transformers' fields.
        needs_files: Modeling files to copy beside the weights, for families that transformers does not have.
        own_head: PaddleNLP's name of an output layer that its files hold even where it equals the embedding.
    """

    prefix: str = "model"
    head: str = OUTPUT_LAYER
    bare: bool = False
    turned: bool = True
    pairs: tuple[tuple[str, str], ...] = ()
    tables: tuple[str, ...] = ("embed_tokens",)
    always_tied: bool = False
    has_distances: bool = False
    config: Callable[[dict[str, Any]], dict[str, Any]] = unchanged
    needs_files: str = ""
    own_head: str = ""

    def paddle_name(self, name: str, base_prefix: str) -> str:
        """PaddleNLP's name for Hugging Face's, for a tensor or a layer; unknown ones keep their ends.

        Args:
            name: Hugging Face's.
            base_prefix: First part of PaddleNLP's names.
        """
        inner = name.removeprefix(f"{self.head}.")
        if inner != name:
            return self.own_head if self.own_head and inner == "weight" else f"{OUTPUT_LAYER}.{inner}"
        if name == self.head:
            return OUTPUT_LAYER
        inner = name.removeprefix(f"{self.prefix}.")
        return name if inner == name and not self.bare else f"{base_prefix}.{_translate(inner, self.pairs)}"

    def published_name(self, name: str, base_prefix: str) -> str:
        """Hugging Face's name for PaddleNLP's."""
        inner = name.removeprefix(f"{base_prefix}.")
        if inner != name:
            return f"{self.prefix}.{_translate(inner, [(there, here) for here, there in self.pairs])}"
        if f"{name}.".startswith(f"{OUTPUT_LAYER}."):
            name = self.head + name.removeprefix(OUTPUT_LAYER)
        return name.replace(".decoder_weight", ".weight")


def _translate(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for here, there in pairs:
        pattern = re.escape(here).replace(re.escape(_NUMBER), r"(\d+)")
        if match := re.fullmatch(rf"{pattern}(\..+)?", name):
            *numbers, rest = match.groups()
            return there.format(*numbers) + (rest or "")
    return name
