"""ChatGLM-6B's tokenizer, whose special tokens are spelled by no text.

PaddleNLP's class puts [gMASK] <sop> behind every text by itself, loses the first blanks of a text that it decodes by
single tokens, and reads names of tokens in data as these tokens.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from paddlenlp.transformers import PretrainedTokenizer

from finetune.errors import UserError
from finetune.families.blank_pieces import CHATGLM_ROLES, BlankPieceBackend
from finetune.families.text_backends import UnsupportedTokenizerError

VOCABULARY_FILE = "ice_text.model"


class ChatGLMTokenizer(PretrainedTokenizer):  # type: ignore[misc]
    """A tokenizer that SentencePiece's library reads.

    Args:
        vocab_file: Path of ice_text.model.
        **kwargs: Special tokens by role, and further fields of tokenizer_config.json.

    Raises:
        UserError: The file is no SentencePiece model.
    """

    resource_files_names = {"vocab_file": VOCABULARY_FILE}
    pretrained_resource_files_map: dict[str, Any] = {"vocab_file": {}}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(self, vocab_file: str, **kwargs: Any):
        self._vocab_file = vocab_file
        try:
            self._backend = BlankPieceBackend(Path(vocab_file), 1)
        except UnsupportedTokenizerError as error:
            raise UserError(
                f"the tokenizer of {Path(vocab_file).parent} cannot be read: {error}. Copy ice_text.model of ChatGLM-6B "
                "again"
            ) from None
        super().__init__(**CHATGLM_ROLES | kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, those of images included."""
        return self._backend.num_pieces

    def __len__(self) -> int:
        # What a folder calls an added token may be one of the vocabulary's own.
        return len(self.get_vocab())

    def get_vocab(self) -> dict[str, int]:
        """Ids by token."""
        known = {self._backend.piece(index): index for index in range(self.vocab_size)}
        return dict(known, **self.added_tokens_encoder)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens."""
        return self._backend.decode([self._convert_token_to_id(token) for token in tokens])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies ice_text.model."""
        target = Path(save_directory) / f"{filename_prefix + '-' if filename_prefix else ''}{VOCABULARY_FILE}"
        if target.resolve() != Path(self._vocab_file).resolve():
            shutil.copyfile(self._vocab_file, target)
        return (str(target),)

    def _tokenize(self, text: str) -> list[str]:
        return [self._backend.piece(index) for index in self._backend.encode_many([text])[0]]

    def _convert_token_to_id(self, token: str) -> int:
        if token.startswith("<image_") and token[7:-1].isdigit() and int(token[7:-1]) < self._backend.offset:
            return int(token[7:-1])
        index = self._backend.id_of(token)
        return self._backend.special_ids["<unk>"] if index is None else index

    def _convert_id_to_token(self, index: int) -> str:
        return self._backend.piece(index)
