"""tokenizer.json as a tokenizer of PaddleNLP's, which has no reader for it: cut and merged as the file says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from paddlenlp.transformers import PretrainedTokenizer

from finetune.families.text_backends import open_tokenizer_json

TOKENIZER_FILE = "tokenizer.json"


class JsonTokenizer(PretrainedTokenizer):  # type: ignore[misc]
    """A tokenizer that the `tokenizers` library reads.

    Args:
        vocab_file: Path of tokenizer.json.
        **kwargs: Special tokens by role, and further fields of tokenizer_config.json.
    """

    resource_files_names = {"vocab_file": TOKENIZER_FILE}
    pretrained_resource_files_map: dict[str, Any] = {"vocab_file": {}}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, vocab_file: str, **kwargs: Any):
        self._vocab_file = vocab_file
        self._backend, special = open_tokenizer_json(Path(vocab_file))
        self.encoder = self._backend.get_vocab() | special
        self.decoder = {index: token for token, index in self.encoder.items()}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the special ones included."""
        return len(self.encoder)

    def get_vocab(self) -> dict[str, int]:
        """Ids by token."""
        return dict(self.encoder, **self.added_tokens_encoder)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens."""
        text: str = self._backend.decoder.decode(tokens)
        return text

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies tokenizer.json."""
        target = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{TOKENIZER_FILE}"
        if target.resolve() != Path(self._vocab_file).resolve():
            shutil.copyfile(self._vocab_file, target)
        return (str(target),)

    def _tokenize(self, text: str) -> list[str]:
        return list(self._backend.encode(text, add_special_tokens=False).tokens)

    def _convert_token_to_id(self, token: str) -> int | None:
        found: int | None = self.encoder.get(token, self.encoder.get(str(self._unk_token)))
        return found

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.decoder[index])
