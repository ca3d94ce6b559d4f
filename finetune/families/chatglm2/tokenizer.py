"""ChatGLM2's tokenizer, with text as text.

PaddleNLP's class looks for the names of its special tokens in every text, and two of them are letters
only: it turns "people" into "p", the token that ends a piece ("eop"), and "le", and "isopropyl" likewise
by way of "sop". The published tokenizer gives plain pieces there, and so does this one. Names stand for
tokens only where a template asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from paddlenlp.transformers import ChatGLMv2Tokenizer as _PaddleTokenizer

from finetune.families.tokenizer_kinds import CHATGLM2_PATTERN

_NAMES = re.compile(CHATGLM2_PATTERN)


# The name goes into tokenizer_config.json, and PaddleNLP finds its own class by it.
class ChatGLMv2Tokenizer(_PaddleTokenizer):  # type: ignore[misc]
    """PaddleNLP's tokenizer of ChatGLM2 with literal text, and with ids that turn back into names."""

    def tokenize(self, text: str, allowed_special: str | Collection[str] = "all", **kwargs: Any) -> list[str]:
        """Pieces of a text.

        Args:
            text: Any text.
            allowed_special: "all" lets names of special tokens stand for these tokens; an empty set
                makes them text like any other.
            kwargs: Switches of other kinds of tokenizers; `split_special_tokens` is honoured.
        """
        processor = self.tokenizer.sp_model
        if not allowed_special or kwargs.get("split_special_tokens"):
            return list(processor.EncodeAsPieces(text))
        pieces: list[str] = []
        start = 0
        for match in _NAMES.finditer(text):
            pieces += [*processor.EncodeAsPieces(text[start : match.start()]), match.group()]
            start = match.end()
        return [*pieces, *processor.EncodeAsPieces(text[start:])]

    @property
    def pad_token(self) -> str:
        """The published padding token, which is the unknown one."""
        return "<unk>"

    @pad_token.setter
    def pad_token(self, value: str) -> None:
        """Folders and callers may name a token; the vocabulary has room for this one only."""

    def _convert_id_to_token(self, index: int) -> str:
        special = self.tokenizer.index_special_tokens.get(index)
        return special if special is not None else str(self.tokenizer.sp_model.IdToPiece(index))
