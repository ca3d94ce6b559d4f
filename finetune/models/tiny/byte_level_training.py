"""Trains byte-level BPE tokenizers for tiny checkpoints and writes them as each family's files.

The base vocabulary is the 256 bytes, so any text round-trips. The families differ in the pattern that
cuts text before merging, in their special tokens and in their files. Training on a few hundred kB takes
well under a second, and the same corpus and size give the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families.tiny_recipe import ByteLevelKind
from finetune.models.tiny.sentencepiece_training import NUM_BYTES, corpus_lines
from finetune.storage.files import write_json


def train_byte_level(corpus: Path, kind: ByteLevelKind, *, vocab_size: int) -> Any:
    """Trains a tokenizer.

    Args:
        corpus: Text or JSON-lines file.
        kind: Pattern and special tokens.
        vocab_size: Tokens in total, special ones included.

    Returns:
        A `tokenizers.Tokenizer` whose vocabulary has exactly `vocab_size` tokens.

    Raises:
        UserError: Vocabulary too small, or too large for the corpus; corpus unusable.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = NUM_BYTES + len(kind.special_tokens) + 1
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size is {vocab_size} but must be at least {smallest} ({NUM_BYTES} bytes, "
            f"{len(kind.special_tokens)} special tokens, 1 piece): raise --vocab_size"
        )
    cut = pre_tokenizers.Split(Regex(kind.pattern), behavior="isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size if kind.special_first else vocab_size - len(kind.special_tokens),
        special_tokens=list(kind.special_tokens) if kind.special_first else [],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(corpus_lines(corpus)), trainer)
    if not kind.special_first:
        tokenizer.add_special_tokens(list(kind.special_tokens))
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise UserError(
            f"no vocabulary of {vocab_size} pieces can be trained on {corpus}: it gives only {found}; "
            "choose another --vocab_size or a larger --corpus"
        )
    return tokenizer


def write_byte_level_tokenizer(
    folder: Path, tokenizer: Any, kind: ByteLevelKind, *, max_length: int
) -> dict[str, Any]:
    """Writes the files that the family's PaddleNLP and Hugging Face tokenizers read.

    Returns:
        The ids for config.json: `vocab_size`, `bos_token_id`, `eos_token_id`, `pad_token_id`.
    """
    write = _write_tokenizer_json if kind.one_file else _write_vocab_and_merges
    write(folder, tokenizer)
    tokens = {f"{role}_token": token for role, token in kind.roles.items()}
    settings = {**tokens, **kind.settings, "model_max_length": max_length}
    if not kind.special_first:
        settings["added_tokens_decoder"] = _added_tokens(tokenizer, kind)
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", tokens)
    ids = {f"{role}_token_id": tokenizer.token_to_id(kind.roles[role]) for role in ("bos", "eos", "pad")}
    return {"vocab_size": tokenizer.get_vocab_size(), **ids}


def _added_tokens(tokenizer: Any, kind: ByteLevelKind) -> dict[str, dict[str, Any]]:
    """Ids of the tokens that are not in vocab.json, as transformers writes them."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(tokenizer.token_to_id(token)): {"content": token, **flags} for token in kind.special_tokens}


def _write_tokenizer_json(folder: Path, tokenizer: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))


def _write_vocab_and_merges(folder: Path, tokenizer: Any) -> None:
    """vocab.json holds the trained pieces, merges.txt the rules under GPT-2's header line."""
    content = json.loads(tokenizer.to_str())
    write_json(folder / "vocab.json", content["model"]["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
