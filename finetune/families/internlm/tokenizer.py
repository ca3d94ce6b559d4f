"""InternLM's tokenizer: a SentencePiece model of which the folder names the class that reads it."""

from __future__ import annotations

from paddlenlp.transformers import LlamaTokenizer


class InternLMTokenizer(LlamaTokenizer):  # type: ignore[misc]
    """SentencePiece as Llama's tokenizer reads it."""

    resource_files_names = {"vocab_file": "tokenizer.model"}  # as published; PaddleNLP's have another name
