"""Trains the tokenizer of a tiny checkpoint from a text file, on one thread, the same bytes every time.

The kind here is SentencePiece byte-pair encoding set up as Llama's: text is not normalised, single
digits stand alone, and what the vocabulary lacks falls back to bytes, so that any text round-trips
(Chinese, emoji, line breaks). 512 pieces hold the 256 bytes, 3 control tokens and the commonest
characters and words of the corpus. Training on a few hundred kB takes well under a second.
"""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families.blank_pieces import CHATGLM_ROLES, CHATGLM_TOKENS
from finetune.families.tiny_recipe import LLAMA_PIECES, SentencePieceKind
from finetune.families.tokenizer_kinds import CHATGLM2_TOKENS
from finetune.storage.files import write_json

NUM_BYTES = 256
SPECIAL_PIECES = ("<unk>", "<s>", "</s>")
MIN_VOCAB_SIZE = NUM_BYTES + len(SPECIAL_PIECES) + 1
MAX_CORPUS_CHARS = 2_000_000
# SentencePiece silently drops longer lines (the limit is in bytes), so they are cut before.
_MAX_LINE_CHARS = 1000

PADDLE_VOCAB_FILE, _PADDLE_CLASS = "sentencepiece.bpe.model", "LlamaTokenizer"
HUGGING_FACE_VOCAB_FILE = "tokenizer.model"
CHATGLM_VOCAB_FILE = "ice_text.model"

NUM_CHATGLM2_TOKENS = len(CHATGLM2_TOKENS)
"""Control tokens of ChatGLM2 that are no pieces: [MASK], [gMASK], [sMASK], sop, eop and four roles."""


def corpus_lines(path: Path) -> Iterator[str]:
    """Lines of plain text of a corpus file.

    Lines that are JSON objects (`src`/`tgt` and the like) give the text of their string fields; a file
    that is one JSON array gives the text of its rows; any other line is text as it stands.

    Raises:
        UserError: The file is missing, is no UTF-8, or holds no text.
    """
    if not path.is_file():
        raise UserError(f"corpus {path} is not a file: give a text or JSON-lines file with --corpus")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"corpus {path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    budget = MAX_CORPUS_CHARS
    for piece in _texts(text):
        for start in range(0, len(piece), _MAX_LINE_CHARS):
            line = piece[start : start + _MAX_LINE_CHARS]
            budget -= len(line)
            yield line
        if budget <= 0:
            return
    if budget == MAX_CORPUS_CHARS:
        raise UserError(f"corpus {path} holds no text: give another file with --corpus")


CHATGLM_PIECES = {
    **{"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3},
    "user_defined_symbols": [
        *CHATGLM_TOKENS[:6],
        "<n>",
        "<|tab|>",
        *(f"<|blank_{count}|>" for count in (2, 3, 4, 80)),
    ],
}


def train_sentencepiece(
    corpus: Path, *, vocab_size: int, control_pieces: Mapping[str, Any] = LLAMA_PIECES
) -> bytes:
    """Trains a byte-pair SentencePiece model.

    Args:
        corpus: Text or JSON-lines file.
        vocab_size: Pieces in total, at least `MIN_VOCAB_SIZE`.
        control_pieces: Ids and texts of the control tokens by the trainer's names.

    Returns:
        The serialised model, byte for byte the same for the same corpus and size.

    Raises:
        UserError: Vocabulary too small, or too large for the corpus; corpus unusable.
    """
    check_vocab_size(vocab_size)
    import sentencepiece

    lines = _common_characters_only(list(corpus_lines(corpus)), vocab_size=vocab_size)
    output = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=output,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            num_threads=1,
            minloglevel=2,
            **control_pieces,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"no vocabulary of {vocab_size} pieces can be trained on {corpus}: {_reason(error)}; "
            "choose another --vocab_size or a larger --corpus"
        ) from None
    return output.getvalue()


def check_vocab_size(vocab_size: int) -> None:
    """Raises UserError when the bytes and control tokens alone would not fit."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size is {vocab_size} but must be at least {MIN_VOCAB_SIZE} ({NUM_BYTES} bytes, "
            f"{len(SPECIAL_PIECES)} control tokens, 1 piece): raise --vocab_size"
        )


def open_sentencepiece(model: bytes) -> Any:
    """The processor of a serialised model.

    Raises:
        UserError: `model` is no SentencePiece model, or lacks a begin, end or unknown token.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError:
        raise UserError("the tokenizer file is not a SentencePiece model: give a .model file") from None
    if min(processor.bos_id(), processor.eos_id(), processor.unk_id()) < 0:
        raise UserError(
            "the SentencePiece model lacks a begin, end or unknown token: train it with all three"
        )
    return processor


def write_sentencepiece_tokenizer(
    out_dir: Path,
    model: bytes,
    *,
    max_length: int,
    kind: SentencePieceKind,
) -> dict[str, Any]:
    """Writes the files that PaddleNLP's and Hugging Face's LlamaTokenizer, or one of its kind, read.

    Args:
        out_dir: Folder.
        model: The serialised model.
        max_length: Most tokens of a text.
        kind: Class, names and further settings.

    Returns:
        The ids for config.json: `vocab_size`, `bos_token_id`, `eos_token_id`, `pad_token_id`. Padding
        uses the end token where the model has no padding token, as for the published Llama weights.

    Raises:
        UserError: `model` is no SentencePiece model, or lacks a begin or end token.
    """
    processor = open_sentencepiece(model)
    bos_id, eos_id, unk_id = processor.bos_id(), processor.eos_id(), processor.unk_id()
    (out_dir / HUGGING_FACE_VOCAB_FILE).write_bytes(model)
    if kind.tokenizer_class == _PADDLE_CLASS:  # other families' folders have the published name alone
        shutil.copyfile(out_dir / HUGGING_FACE_VOCAB_FILE, out_dir / PADDLE_VOCAB_FILE)
    tokens = {
        "bos_token": processor.id_to_piece(bos_id),
        "eos_token": processor.id_to_piece(eos_id),
        "unk_token": processor.id_to_piece(unk_id),
    }
    if (pad_id := processor.pad_id()) >= 0:
        tokens["pad_token"] = processor.id_to_piece(pad_id)
    settings = {
        **tokens,
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
        "model_max_length": max_length,
        "tokenizer_class": kind.tokenizer_class,
        **kind.settings,
    }
    if kind.names:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        settings["added_tokens_decoder"] = {
            str(processor.piece_to_id(piece)): {"content": name, **flags}
            for name, piece in kind.names.items()
        }
        settings["additional_special_tokens"] = list(kind.names)
    write_json(out_dir / "tokenizer_config.json", settings)
    write_json(out_dir / "special_tokens_map.json", tokens)
    return {
        "vocab_size": processor.get_piece_size(),
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id if pad_id >= 0 else eos_id,
    }


def write_chatglm_tokenizer(out_dir: Path, model: bytes, *, max_length: int) -> dict[str, Any]:
    """Writes the files that PaddleNLP's and Hugging Face's ChatGLM-6B tokenizers read.

    Returns:
        The ids for config.json: `vocab_size`, `bos_token_id`, `eos_token_id`, `pad_token_id`, `mask_token_id` and
        `gmask_token_id`.

    Raises:
        UserError: `model` is no SentencePiece model, or lacks a begin, end or unknown token.
    """
    processor = open_sentencepiece(model)
    (out_dir / CHATGLM_VOCAB_FILE).write_bytes(model)
    settings = {
        **CHATGLM_ROLES,
        "gmask_token": "[gMASK]",
        "end_token": "</s>",
        "do_lower_case": False,
        "remove_space": False,
        "num_image_tokens": 0,
        "model_max_length": max_length,
        "tokenizer_class": "ChatGLMTokenizer",
    }
    write_json(out_dir / "tokenizer_config.json", settings)
    names = {"bos": "<sop>", "eos": "<eop>", "pad": "<pad>", "mask": "[MASK]", "gmask": "[gMASK]"}
    ids = {f"{role}_token_id": processor.piece_to_id(name) for role, name in names.items()}
    return {"vocab_size": processor.get_piece_size(), **ids}


def write_chatglm2_tokenizer(out_dir: Path, model: bytes, *, max_length: int) -> dict[str, Any]:
    """Writes the files that PaddleNLP's and Hugging Face's ChatGLM2 tokenizers read.

    Returns:
        The ids for config.json: `vocab_size` (pieces and control tokens), `bos_token_id`,
        `eos_token_id`, `pad_token_id`. Padding uses the unknown token, as in the published weights.

    Raises:
        UserError: `model` is no SentencePiece model, or lacks a begin, end or unknown token.
    """
    processor = open_sentencepiece(model)
    (out_dir / HUGGING_FACE_VOCAB_FILE).write_bytes(model)
    settings = {"model_max_length": max_length, "tokenizer_class": "ChatGLMv2Tokenizer"}
    write_json(out_dir / "tokenizer_config.json", settings)
    return {
        "vocab_size": processor.get_piece_size() + NUM_CHATGLM2_TOKENS,
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "pad_token_id": processor.unk_id(),
    }


def _texts(text: str) -> Iterator[str]:
    rows = _json_array(text) if text.lstrip().startswith("[") else None
    for row in rows if rows is not None else map(_json_object_or_text, text.splitlines()):
        yield from (line for string in _strings(row) for line in string.splitlines() if line.strip())


def _json_array(text: str) -> list[Any] | None:
    try:
        values: list[Any] = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values


def _json_object_or_text(line: str) -> Any:
    if line.lstrip().startswith("{"):
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            return line
    return line


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _common_characters_only(lines: list[str], *, vocab_size: int) -> list[str]:
    """Cuts the lines at every rare character.

    The trainer wants pieces for at least 98% of the characters it sees, too many for a small vocabulary
    and Chinese text. The commonest characters get at most half of the room beside the bytes, the rest of
    the text stays out of the training and is written in bytes.
    """
    room = max(1, (vocab_size - NUM_BYTES - len(SPECIAL_PIECES)) // 2)
    counts = Counter("".join(lines))
    common = {char for char, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:room]}
    if len(common) == len(counts):
        return lines
    cut = ("".join(char if char in common else "\n" for char in line).split("\n") for line in lines)
    return [piece for pieces in cut for piece in pieces if piece]


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].rpartition("] ")[2] or "unknown reason"
