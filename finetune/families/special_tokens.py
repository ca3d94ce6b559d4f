"""Tokens that a family's record names by role or by text, as ids of a tokenizer."""

from __future__ import annotations

from typing import Any

from finetune.errors import UserError
from finetune.families.family import TokenizerFacts


def padding_token(tokenizer: Any, facts: TokenizerFacts) -> str:
    """What names the token that fills rows: the tokenizer's own, or the family's stand-in for it."""
    return "pad" if "pad_token" in tokenizer.special_tokens_map else facts.pad_fallback


def token_id(tokenizer: Any, name: str) -> int:
    """Id of a token given by role ("bos", "eos", "pad", "unk") or by its text.

    Raises:
        UserError: The tokenizer has no such token.
    """
    if name in ("bos", "eos", "pad", "unk"):
        found = getattr(tokenizer, f"{name}_token_id", None)
    else:
        found = tokenizer.convert_tokens_to_ids(name)
    if found is None or found < 0:
        raise UserError(f"the tokenizer has no token {name!r}: check special_tokens_map.json in its folder")
    return int(found)
