"""GLM-4's tokenizer in its first form: a file of tiktoken's ranks that is called tokenizer.model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families.rank_tokenizer import RankTokenizer
from finetune.families.text_backends import TiktokenBackend, UnsupportedTokenizerError, read_ranks
from finetune.families.text_patterns import LLAMA3_PATTERN
from finetune.families.tokenizer_kinds import GLM4_TOKENS
from finetune.storage.files import read_json_or_empty

VOCABULARY_FILE = "tokenizer.model"


class ChatGLM4Tokenizer(RankTokenizer):
    """GLM-4's tokenizer.

    Args:
        vocab_file: Path of tokenizer.model.
        **kwargs: Special tokens by role, and further fields of tokenizer_config.json.

    Raises:
        UserError: The file holds no ranks.
    """

    resource_files_names = {"vocab_file": VOCABULARY_FILE}

    def __init__(self, vocab_file: str, **kwargs: Any):
        path = Path(vocab_file)
        try:
            ranks = read_ranks(path)
            special = _special_ids(path, len(ranks))
            backend = TiktokenBackend(
                path.stem, ranks, pattern=LLAMA3_PATTERN, special_ids=special, num_threads=1
            )
        except UnsupportedTokenizerError as error:
            raise UserError(
                f"the tokenizer of {path.parent} cannot be read: {error}. Copy tokenizer.model of GLM-4 again"
            ) from None
        super().__init__(vocab_file, ranks, backend, **kwargs)

    @property
    def unk_token(self) -> str:
        """What PaddleNLP takes for names that no token has; the vocabulary spells every text."""
        return GLM4_TOKENS[0]

    @unk_token.setter
    def unk_token(self, value: str) -> None:
        """Folders may name a token; nothing is read as it."""


def _special_ids(path: Path, num_ranks: int) -> dict[str, int]:
    """The published tokens behind the ranks; other names for their ids where the folder gives them."""
    names = {num_ranks + place: name for place, name in enumerate(GLM4_TOKENS)}
    added = read_json_or_empty(path.with_name("tokenizer_config.json")).get("added_tokens_decoder") or {}
    named = {int(index): str(entry["content"]) for index, entry in added.items()}
    names = {index: name for index, name in names.items() if name not in named.values()} | named
    return {name: index for index, name in names.items()}
