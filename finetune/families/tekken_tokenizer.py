"""tekken.json as a tokenizer of PaddleNLP's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.families.rank_tokenizer import RankTokenizer
from finetune.families.tekken import TEKKEN_FILE, open_tekken, read_tekken


class TekkenTokenizer(RankTokenizer):
    """A tokenizer of Mistral's file.

    Args:
        vocab_file: Path of tekken.json.
        **kwargs: Special tokens by role, and further fields of tokenizer_config.json.
    """

    resource_files_names = {"vocab_file": TEKKEN_FILE}

    def __init__(self, vocab_file: str, **kwargs: Any):
        path = Path(vocab_file)
        super().__init__(vocab_file, read_tekken(path).ids, open_tekken(path, 1)[0], **kwargs)
