"""Writes a tiny model with random weights and its own tokenizer, offline, in about a second.

    python -m finetune.models.tiny llama ./tiny-llama

What it is for: rehearsing a run (same argument file, `--model_name_or_path ./tiny-llama`) before the
real weights and cards are at hand, tests, and benchmarks with a chosen size. It knows nothing until it
is trained. The tokenizer is trained on a text file, `data/train.json` by default; `--tokenizer` takes a
ready SentencePiece model instead, for instance to measure with a real vocabulary.

The weights are written with NumPy alone (normal, standard deviation 0.02; norms are ones), so neither
Paddle nor PaddleNLP is imported. The same options give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.families.tiny_recipe import (
    LLAMA_PIECES,
    ByteLevelKind,
    SentencePieceKind,
    TensorSpec,
    TinyRecipe,
    TinyShape,
)
from finetune.models.tiny import byte_level_training, sentencepiece_training, tiktoken_training
from finetune.storage.shipped_files import sample_data

DEFAULT_CORPUS = sample_data() / "train.json"
_INITIALIZER_RANGE = 0.02
# Llama's ratio of the inner to the hidden size, rounded up to a multiple of 16.
_INNER_RATIO = 8 / 3


@dataclass(frozen=True, kw_only=True)
class TinyOptions:
    """Options of the command; sizes are counts, `max_length` is in tokens."""

    corpus: Path | None = None
    tokenizer: Path | None = None
    hidden_size: int = 64
    intermediate_size: int | None = None
    num_layers: int = 4
    num_heads: int = 4
    num_key_value_heads: int | None = None
    vocab_size: int = 512
    max_length: int = 512
    seed: int = 0

    def faults(self) -> list[str]:
        """What cannot be built, one message each."""
        found = []
        for name in ("hidden_size", "num_layers", "num_heads", "max_length"):
            if getattr(self, name) < 1:
                found.append(f"{name} is {getattr(self, name)} but must be at least 1: raise --{name}")
        for name in ("intermediate_size", "num_key_value_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name} is {value} but must be at least 1: raise --{name}")
        if found:
            return found
        if self.hidden_size % self.num_heads:
            found.append(
                f"hidden_size is {self.hidden_size} but must be divisible by num_heads {self.num_heads}: "
                "change --hidden_size or --num_heads"
            )
        elif self.hidden_size // self.num_heads % 2:
            found.append(
                f"hidden_size / num_heads is {self.hidden_size // self.num_heads} but rotary positions need "
                "an even number: change --hidden_size or --num_heads"
            )
        if self.num_heads % (self.num_key_value_heads or self.num_heads):
            found.append(
                f"num_key_value_heads is {self.num_key_value_heads} but must divide num_heads {self.num_heads}: "
                "change --num_key_value_heads"
            )
        if self.seed < 0:
            found.append(f"seed is {self.seed} but must be 0 or more: change --seed")
        return found


def build_tiny(family_name: str, out_dir: str | Path, **options: Any) -> Path:
    """Writes a tiny checkpoint of a family.

    Args:
        family_name: Name of a registered family.
        out_dir: Folder to create; must be absent or empty.
        **options: Fields of `TinyOptions`.

    Returns:
        The folder: config.json, generation_config.json, model.safetensors, tokenizer files.

    Raises:
        UserError: Unknown family, sizes that do not fit, unusable corpus or tokenizer, folder not empty.
    """
    chosen = TinyOptions(**options)
    recipe = get_family(family_name).tiny
    faults = chosen.faults() or _recipe_faults(chosen, recipe, family_name)
    if faults:
        raise UserError(faults)
    folder = Path(out_dir)
    _check_empty(folder)
    write_tokenizer = tokenizer_writer(recipe.tokenizer, chosen)
    folder.mkdir(parents=True, exist_ok=True)
    token_ids = write_tokenizer(folder)
    shape = _shape(chosen, vocab_size=token_ids["vocab_size"])
    _write_json(folder / "config.json", {**recipe.config(shape), **token_ids, "dtype": "float32"})
    generation = {name: token_ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {**generation, "max_length": chosen.max_length})
    _write_weights(folder / "model.safetensors", recipe.weights(shape), seed=chosen.seed)
    return folder


def _recipe_faults(options: TinyOptions, recipe: TinyRecipe, family_name: str) -> list[str]:
    """What this family cannot be built with."""
    found = []
    head_dim, multiple = options.hidden_size // options.num_heads, recipe.head_dim_multiple
    if head_dim % multiple:
        found.append(
            f"hidden_size / num_heads is {head_dim} but family {family_name} needs a multiple of {multiple}: "
            "change --hidden_size or --num_heads"
        )
    num_kv_heads = options.num_key_value_heads or options.num_heads
    if num_kv_heads != options.num_heads and not recipe.grouped_heads:
        found.append(
            f"num_key_value_heads is {num_kv_heads} but family {family_name} has as many as heads "
            f"({options.num_heads}): leave --num_key_value_heads out"
        )
    if recipe.inner_ratio and options.intermediate_size not in (
        None,
        recipe.inner_ratio * options.hidden_size,
    ):
        found.append(
            f"intermediate_size is {options.intermediate_size} but family {family_name} always has "
            f"{recipe.inner_ratio} x hidden_size: leave --intermediate_size out"
        )
    return found


def tokenizer_writer(
    kind: SentencePieceKind | ByteLevelKind | str, options: TinyOptions
) -> Callable[[Path], dict[str, Any]]:
    """Trains or reads a tokenizer, before anything is written, and returns what writes its files.

    Returns:
        Folder -> the ids for config.json.

    Raises:
        UserError: Unusable corpus or tokenizer, or a vocabulary that cannot be trained on it.
    """
    if isinstance(kind, str):
        return TOKENIZER_WRITERS[kind](options)
    if isinstance(kind, ByteLevelKind):
        return _byte_level_writer(options, kind)
    model = _sentencepiece_model(options, control_pieces=kind.pieces)
    return lambda folder: sentencepiece_training.write_sentencepiece_tokenizer(
        folder, model, max_length=options.max_length, kind=kind
    )


def _byte_level_writer(options: TinyOptions, kind: ByteLevelKind) -> Callable[[Path], dict[str, Any]]:
    if options.tokenizer is not None:
        raise UserError("byte-level tokenizers are always trained: leave --tokenizer out")
    corpus = Path(options.corpus or DEFAULT_CORPUS)
    tokenizer = byte_level_training.train_byte_level(corpus, kind, vocab_size=options.vocab_size)
    return lambda folder: byte_level_training.write_byte_level_tokenizer(
        folder, tokenizer, kind, max_length=options.max_length
    )


def _sentencepiece_model(
    options: TinyOptions, *, num_control_tokens: int = 0, control_pieces: Mapping[str, Any] = LLAMA_PIECES
) -> bytes:
    """A trained or given model that leaves room for control tokens in the vocabulary."""
    if options.tokenizer is None:
        num_pieces = options.vocab_size - num_control_tokens
        corpus = Path(options.corpus or DEFAULT_CORPUS)
        return sentencepiece_training.train_sentencepiece(
            corpus, vocab_size=num_pieces, control_pieces=control_pieces
        )
    if Path(options.tokenizer).is_file():
        model = Path(options.tokenizer).read_bytes()
        sentencepiece_training.open_sentencepiece(model)
        return model
    raise UserError(f"tokenizer {options.tokenizer} is not a file: give a SentencePiece .model file")


def _chatglm_writer(options: TinyOptions) -> Callable[[Path], dict[str, Any]]:
    """The same for ChatGLM-6B, which has pieces for line breaks and runs of blanks."""
    model = _sentencepiece_model(options, control_pieces=sentencepiece_training.CHATGLM_PIECES)

    def write(folder: Path) -> dict[str, Any]:
        return sentencepiece_training.write_chatglm_tokenizer(folder, model, max_length=options.max_length)

    return write


def _chatglm2_writer(options: TinyOptions) -> Callable[[Path], dict[str, Any]]:
    """The same for ChatGLM2, whose control tokens come behind the pieces."""
    model = _sentencepiece_model(options, num_control_tokens=sentencepiece_training.NUM_CHATGLM2_TOKENS)

    def write(folder: Path) -> dict[str, Any]:
        return sentencepiece_training.write_chatglm2_tokenizer(folder, model, max_length=options.max_length)

    return write


def _tiktoken_writer(
    num_control_tokens: int, write_files: Callable[..., dict[str, Any]]
) -> Callable[[TinyOptions], Callable[[Path], dict[str, Any]]]:
    """Trains or reads a rank file, before anything is written, and returns what writes the files."""

    def prepare(options: TinyOptions) -> Callable[[Path], dict[str, Any]]:
        if options.tokenizer is None:
            ranks = tiktoken_training.train_ranks(
                Path(options.corpus or DEFAULT_CORPUS),
                vocab_size=options.vocab_size,
                num_control_tokens=num_control_tokens,
            )
        elif Path(options.tokenizer).is_file():
            ranks = Path(options.tokenizer).read_bytes()
            tiktoken_training.count_ranks(ranks)
        else:
            raise UserError(f"tokenizer {options.tokenizer} is not a file: give a .tiktoken rank file")
        return lambda folder: write_files(folder, ranks, max_length=options.max_length)

    return prepare


TOKENIZER_WRITERS: dict[str, Callable[[TinyOptions], Callable[[Path], dict[str, Any]]]] = {
    "sentencepiece_chatglm": _chatglm_writer,
    "sentencepiece_chatglm2": _chatglm2_writer,
    "tiktoken": _tiktoken_writer(
        tiktoken_training.NUM_CONTROL_TOKENS, tiktoken_training.write_tiktoken_tokenizer
    ),
    "tiktoken_glm4": _tiktoken_writer(
        tiktoken_training.NUM_GLM4_TOKENS, tiktoken_training.write_glm4_tokenizer
    ),
}


def _shape(options: TinyOptions, *, vocab_size: int) -> TinyShape:
    inner = options.intermediate_size or -(-int(options.hidden_size * _INNER_RATIO) // 16) * 16
    return TinyShape(
        hidden_size=options.hidden_size,
        intermediate_size=inner,
        num_layers=options.num_layers,
        num_heads=options.num_heads,
        num_kv_heads=options.num_key_value_heads or options.num_heads,
        vocab_size=vocab_size,
        max_length=options.max_length,
    )


def _write_weights(path: Path, specs: dict[str, TensorSpec], *, seed: int) -> None:
    from safetensors.numpy import save_file

    generator = np.random.Generator(np.random.PCG64(seed))
    tensors = {name: _fill(spec, generator) for name, spec in specs.items()}
    # PaddleNLP's reader takes "np" and refuses "pd".
    save_file(tensors, path, metadata={"format": "np"})


def _fill(spec: TensorSpec, generator: np.random.Generator) -> NDArray[Any]:
    if spec.fill == "normal":
        return generator.standard_normal(spec.shape, dtype=np.float32) * np.float32(_INITIALIZER_RANGE)
    return np.full(spec.shape, {"ones": 1.0, "zeros": 0.0}[spec.fill], dtype=np.float32)


def _check_empty(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is a file: give a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"output folder {folder} is not empty: give a new folder, or empty this one")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
