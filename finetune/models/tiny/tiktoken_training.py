"""Trains the tokenizer of a tiny Qwen or GLM-4: byte-pair merges in tiktoken's file of ranks.

A rank file has one line per token, its bytes in base64 and its rank: the 256 bytes first, then the merges
in the order in which they were learned, which is the order in which tiktoken applies them. The control
tokens are not in the file; they come behind the last rank: Qwen's 208, GLM-4's 14. No token crosses the border
between two words, as Qwen's splits them, and digits stand alone.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families.tokenizer_kinds import GLM4_TOKENS
from finetune.models.tiny.sentencepiece_training import NUM_BYTES, corpus_lines

NUM_CONTROL_TOKENS = 208
"""<|endoftext|>, <|im_start|>, <|im_end|> and 205 that are kept free."""

NUM_GLM4_TOKENS = len(GLM4_TOKENS)
RANK_FILE = "qwen.tiktoken"
GLM4_FILE = "tokenizer.model"


def train_ranks(corpus: Path, *, vocab_size: int, num_control_tokens: int = NUM_CONTROL_TOKENS) -> bytes:
    """Trains byte-level merges.

    Args:
        corpus: Text or JSON-lines file.
        vocab_size: Tokens in total, the control tokens among them.
        num_control_tokens: How many follow the ranks.

    Returns:
        The rank file, byte for byte the same for the same corpus and size.

    Raises:
        UserError: Vocabulary too small, or too large for the corpus; corpus unusable.
    """
    least = NUM_BYTES + num_control_tokens + 1
    if vocab_size < least:
        raise UserError(
            f"vocab_size is {vocab_size} but must be at least {least} ({NUM_BYTES} bytes, "
            f"{num_control_tokens} control tokens, 1 merge): raise --vocab_size"
        )
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    lines = list(corpus_lines(corpus))
    num_ranks = vocab_size - num_control_tokens
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=num_ranks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    ranks = tokenizer.get_vocab()
    if len(ranks) < num_ranks:
        most = len(ranks) + num_control_tokens
        raise UserError(
            f"no vocabulary of {vocab_size} tokens can be trained on {corpus}: it has pairs for {most} only; "
            "choose another --vocab_size or a larger --corpus"
        )
    byte_of = _bytes_of_characters()
    tokens = (bytes(byte_of[char] for char in token) for token in sorted(ranks, key=ranks.__getitem__))
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def count_ranks(ranks: bytes) -> int:
    """Number of tokens in a rank file.

    Raises:
        UserError: It is no rank file, or lacks some of the bytes.
    """
    try:
        pairs = [line.split() for line in ranks.splitlines() if line]
        tokens = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error):
        raise UserError(
            "the tokenizer file is no tiktoken rank file (base64 and a rank on each line): give a .tiktoken file"
        ) from None
    missing = NUM_BYTES - sum(bytes([byte]) in tokens for byte in range(NUM_BYTES))
    if missing or sorted(tokens.values()) != list(range(len(tokens))):
        raise UserError(
            f"the tiktoken file lacks {missing} of the {NUM_BYTES} bytes, or ranks: give a complete one"
        )
    return len(tokens)


def write_tiktoken_tokenizer(out_dir: Path, ranks: bytes, *, max_length: int) -> dict[str, Any]:
    """Writes the files that PaddleNLP's and Hugging Face's QWenTokenizer read.

    Returns:
        The ids for config.json: `vocab_size`, `bos_token_id`, `eos_token_id`, `pad_token_id`, the last
        three that of <|endoftext|>, as Qwen has no other mark for the begin or for padding.
    """
    num_ranks = count_ranks(ranks)
    (out_dir / RANK_FILE).write_bytes(ranks)
    settings = {"model_max_length": max_length, "tokenizer_class": "QWenTokenizer"}
    (out_dir / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), num_ranks)
    return {"vocab_size": num_ranks + NUM_CONTROL_TOKENS, **ids}


def write_glm4_tokenizer(out_dir: Path, ranks: bytes, *, max_length: int) -> dict[str, Any]:
    """Writes the files that the published ChatGLM4Tokenizer reads.

    Returns:
        The ids for config.json: `vocab_size`, `bos_token_id`, `eos_token_id`, `pad_token_id`, the last
        three that of <|endoftext|>.
    """
    num_ranks = count_ranks(ranks)
    (out_dir / GLM4_FILE).write_bytes(ranks)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {
            str(num_ranks + place): {"content": name, **flags} for place, name in enumerate(GLM4_TOKENS)
        },
        "additional_special_tokens": list(GLM4_TOKENS),
        "eos_token": GLM4_TOKENS[0],
        "pad_token": GLM4_TOKENS[0],
        "model_max_length": max_length,
        "padding_side": "left",
        "tokenizer_class": "ChatGLM4Tokenizer",
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), num_ranks)
    return {"vocab_size": num_ranks + NUM_GLM4_TOKENS, **ids}


def _bytes_of_characters() -> dict[str, int]:
    """The byte that each character of the byte-level alphabet stands for.

    Printable Latin-1 characters stand for themselves, the other bytes for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }
