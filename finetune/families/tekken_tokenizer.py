"""tekken.json as a tokenizer of PaddleNLP's form; tokens are written as Latin-1 has their bytes, one character each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paddlenlp.transformers import PretrainedTokenizer

from finetune.families.tekken import TEKKEN_FILE, copy_tekken, open_tekken, read_tekken


class TekkenTokenizer(PretrainedTokenizer):  # type: ignore[misc]
    """A tokenizer that tiktoken's library reads.

    Args:
        vocab_file: Path of tekken.json.
        **kwargs: Special tokens by role, and further fields of tokenizer_config.json.
    """

    resource_files_names = {"vocab_file": TEKKEN_FILE}
    pretrained_resource_files_map: dict[str, Any] = {"vocab_file": {}}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, vocab_file: str, **kwargs: Any):
        self._vocab_file = vocab_file
        read = read_tekken(Path(vocab_file))
        self._backend, special = open_tekken(Path(vocab_file), 1)
        self.decoder = {index: piece.decode("latin-1") for piece, index in read.ids.items()}
        self.decoder |= {index: name for name, index in special.items()}
        self.encoder = {token: index for index, token in sorted(self.decoder.items(), reverse=True)}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the special ones included."""
        return len(self.decoder)

    def get_vocab(self) -> dict[str, int]:
        """Ids by token."""
        return dict(self.encoder, **self.added_tokens_encoder)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens."""
        special = self._backend.special_ids
        parts = [name.encode() if name in special else name.encode("latin-1", "replace") for name in tokens]
        return b"".join(parts).decode("utf-8", "replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies tekken.json."""
        return (copy_tekken(Path(self._vocab_file), Path(save_directory), filename_prefix),)

    def _tokenize(self, text: str) -> list[str]:
        return [self.decoder[index] for index in self._backend.encode_many([text])[0]]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.encoder.get(token, self.encoder.get(str(self._unk_token)))

    def _convert_id_to_token(self, index: int) -> str:
        return self.decoder[index]
