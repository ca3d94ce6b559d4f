"""Byte pieces by rank as a tokenizer of PaddleNLP's form; tokens are written as Latin-1 has their bytes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paddlenlp.transformers import PretrainedTokenizer

from finetune.families.text_backends import TiktokenBackend


class RankTokenizer(PretrainedTokenizer):  # type: ignore[misc]
    """A tokenizer that tiktoken's library reads.

    Args:
        vocab_file: Path of the vocabulary.
        pieces: Ids of the pieces by their bytes.
        backend: Spells text with them; it knows the special tokens.
        **kwargs: Special tokens by role, and further fields of tokenizer_config.json.
    """

    pretrained_resource_files_map: dict[str, Any] = {"vocab_file": {}}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, vocab_file: str, pieces: Mapping[bytes, int], backend: TiktokenBackend, **kwargs: Any):
        self._vocab_file, self._backend = vocab_file, backend
        self.decoder = {index: piece.decode("latin-1") for piece, index in pieces.items()}
        self.decoder |= {index: name for name, index in backend.special_ids.items()}
        self.encoder = {token: index for index, token in sorted(self.decoder.items(), reverse=True)}
        super().__init__(**kwargs)

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids of the special tokens that the vocabulary has by itself."""
        return self._backend.special_ids

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the special ones included."""
        return len(self.decoder)

    def __len__(self) -> int:
        # What a folder calls an added token may be one of the vocabulary's own.
        return len(self.get_vocab())

    def get_vocab(self) -> dict[str, int]:
        """Ids by token."""
        return dict(self.encoder, **self.added_tokens_encoder)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens."""
        special = self._backend.special_ids
        parts = [name.encode() if name in special else name.encode("latin-1", "replace") for name in tokens]
        return b"".join(parts).decode("utf-8", "replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies the vocabulary's file."""
        name = self.resource_files_names["vocab_file"]
        target = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{name}"
        if target.resolve() != Path(self._vocab_file).resolve():
            shutil.copyfile(self._vocab_file, target)
        return (str(target),)

    def _tokenize(self, text: str) -> list[str]:
        return [self.decoder[index] for index in self._backend.encode_many([text])[0]]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.encoder.get(token, self.encoder.get(str(self._unk_token)))

    def _convert_id_to_token(self, index: int) -> str:
        return self.decoder[index]
