"""tekken.json, the tokenizer file that Mistral publishes: what stands in it, and a tokenizer of PaddleNLP's form.

Byte-level merging by rank, as tiktoken does it, by the file's own expression for words. The first ids, as many as
`default_num_special_tokens` says, are special tokens: those that the file lists, then unnamed ones; of files before
version 11 that list none, those of `_UNLISTED`. A piece's id is its rank behind them. Only as many pieces as
`default_vocab_size` leaves room for are used. The definition is mistral-common's.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.families.text_backends import TiktokenBackend, UnsupportedTokenizerError
from finetune.storage.files import read_json_object

TEKKEN_FILE = "tekken.json"
TEKKEN_ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_NAMELESS = "<SPECIAL_{}>"
_UNLISTED = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
    "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
_LAST_UNLISTED_VERSION = 7


@dataclass(frozen=True)
class TekkenFile:
    """What a file says.

    Attributes:
        pattern: What cuts text into words.
        ids: Ids of the pieces by their bytes.
        special: Ids of the special tokens by name.
    """

    pattern: str
    ids: dict[bytes, int]
    special: dict[str, int]


def read_tekken(path: Path) -> TekkenFile:
    """Reads the file.

    Raises:
        UserError: It is no JSON.
        UnsupportedTokenizerError: It is not of the form that mistral-common reads.
    """
    content = read_json_object(path)
    try:
        config = content["config"]
        num_special, size = int(config["default_num_special_tokens"]), int(config["default_vocab_size"])
        special = _special_tokens(content, num_special)
        entries = content["vocab"][: size - num_special]
        if len(entries) != size - num_special or any(
            int(each["rank"]) != i for i, each in enumerate(entries)
        ):
            raise UnsupportedTokenizerError(
                f"{path.name} has no vocabulary of {size} tokens in the order of ranks"
            )
        pieces = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries]
        if pieces[:256] != [bytes([value]) for value in range(256)] or len(set(pieces)) != len(pieces):
            raise UnsupportedTokenizerError(
                f"{path.name} does not begin with the 256 bytes, or has a piece twice"
            )
        return TekkenFile(
            str(config["pattern"]), {piece: num_special + rank for rank, piece in enumerate(pieces)}, special
        )
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise UnsupportedTokenizerError(
            f"{path.name} is not of the form that Mistral publishes ({type(error).__name__}: {error})"
        ) from None


def _special_tokens(content: dict[str, Any], count: int) -> dict[str, int]:
    listed = content.get("special_tokens")
    if listed is None:
        version = int(str(content["config"].get("version") or "v3").removeprefix("v").partition("m")[0])
        if version > _LAST_UNLISTED_VERSION:
            raise ValueError("special_tokens are missing")
        listed = [{"rank": rank, "token_str": name} for rank, name in enumerate(_UNLISTED)]
    special = {str(entry["token_str"]): int(entry["rank"]) for entry in listed}
    special |= {_NAMELESS.format(rank): rank for rank in range(len(listed), count)}
    if sorted(special.values()) != list(range(count)):
        raise ValueError(f"special_tokens are not the first {count} ids")
    return special


def open_tekken(path: Path, num_threads: int) -> tuple[TiktokenBackend, dict[str, int]]:
    """The backend of a file, and the ids of its special tokens."""
    read = read_tekken(path)
    backend = TiktokenBackend(
        path.stem, read.ids, pattern=read.pattern, special_ids=read.special, num_threads=num_threads
    )
    return backend, read.special
