"""Tokenizer files beside trained weights."""

from __future__ import annotations

import json

from finetune.families.family import get_family
from finetune.tokenizers.fast_encoder import load_fast_encoder
from finetune.tokenizers.loading import load_tokenizer
from finetune.tokenizers.saving import save_tokenizer


def test_the_saved_tokenizer_reads_like_its_source(llama_folder, tmp_path):
    family = get_family("llama")
    path = llama_folder / "tokenizer_config.json"
    size = json.loads((llama_folder / "config.json").read_text())["vocab_size"]
    added = {str(size): {"content": "<think>", "special": False, "normalized": False}}
    settings = json.loads(path.read_text()) | {"added_tokens_decoder": added, "chat_template": "{{ x }}"}
    path.write_text(json.dumps(settings))
    (llama_folder / "chat_template.jinja").write_text("{{ y }}")
    (llama_folder / "special_tokens_map.json").unlink()
    saved = tmp_path / "saved"
    saved.mkdir()
    save_tokenizer(load_tokenizer(llama_folder, family), saved)
    assert json.loads((saved / "tokenizer_config.json").read_text()) == settings
    assert (saved / "chat_template.jinja").read_text() == "{{ y }}"
    assert not (saved / "special_tokens_map.json").exists() and not (saved / "added_tokens.json").exists()
    ours, theirs = (load_fast_encoder(folder, family)[0] for folder in (llama_folder, saved))
    text = "a <think> 上衣"
    assert ours.encode(text) == theirs.encode(text) and size in theirs.encode(text)
    assert ours.named == theirs.named
