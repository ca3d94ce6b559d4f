"""BLOOM's tokenizer, from the one file its checkpoints hold: tokenizer.json.

PaddleNLP's BloomTokenizer cuts text with GPT-2's pattern, not BLOOM's, and loses the first and the last
merge rule of a tokenizer.json, so it gives other ids than the model was trained with.
"""

from __future__ import annotations

from typing import Any

from finetune.families.json_tokenizer import JsonTokenizer


class BloomTokenizer(JsonTokenizer):
    """Byte-level BPE read from tokenizer.json.

    Args:
        vocab_file: Path of tokenizer.json.
        unk_token: Token of what the vocabulary lacks (never met: it holds all bytes).
        bos_token: Opens documents in BLOOM's own training; not put before prompts.
        eos_token: Ends an answer.
        pad_token: Fills rows.
        **kwargs: Further fields of tokenizer_config.json.
    """

    def __init__(
        self,
        vocab_file: str,
        unk_token: Any = "<unk>",
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        pad_token: Any = "<pad>",
        **kwargs: Any,
    ):
        super().__init__(
            vocab_file,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            **kwargs,
        )
