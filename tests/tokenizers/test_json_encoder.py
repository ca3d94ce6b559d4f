"""Folders whose only vocabulary is tokenizer.json, as transformers saves them."""

from __future__ import annotations

import json

import pytest

from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.models.resolve import resolve_model
from finetune.tokenizers.encoder import load_encoder

SIZE = 259
PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def write_json_tokenizer(folder, **parts):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    content = json.loads(tokenizer.to_str()) | parts
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = {"tokenizer_class": "TokenizersBackend", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def folder(llama_folder):
    for name in ("sentencepiece.bpe.model", "tokenizer.model", "special_tokens_map.json"):
        (llama_folder / name).unlink()
    write_json_tokenizer(llama_folder)
    return llama_folder


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_folder_with_tokenizer_json_alone(folder, family):
    encoder = load_encoder(folder, get_family(family))
    assert (encoder.eos_token_id, encoder.slow_because) == (257, "")
    assert len(encoder.tokenizer) == SIZE
    text = "上衣 <think>a <|end|>"
    ids = encoder.encode(text)
    assert 258 in ids and 257 not in ids and encoder.decode(ids) == text
    assert encoder.encode_special("<|end|>a")[0] == 257
    assert encoder.decode([256, *ids, 257]) == text


def test_text_behind_a_token_gets_no_blank_where_only_the_first_does(folder):
    write_json_tokenizer(folder, pre_tokenizer=METASPACE, model=_characters("▁ab<|end>"))
    encoder = load_encoder(folder, get_family("llama"))
    assert encoder.marks_inner_text
    (first,), (inner,) = encoder.encode_many(["a"]), encoder.encode_many(["a"], inner=True)
    assert (len(first), list(inner)) == (2, list(first)[1:])
    assert encoder.encode_special("<|begin|>a")[1:] == list(inner)


def test_text_behind_a_token_gets_a_blank_where_every_stretch_does(folder):
    write_json_tokenizer(folder, normalizer=PREPEND, pre_tokenizer=None, model=_characters("▁ab<|end>"))
    encoder = load_encoder(folder, get_family("llama"))
    assert not encoder.marks_inner_text
    assert encoder.encode_special("<|begin|>a")[1:] == encoder.encode("a")
    assert len(encoder.encode("a")) == 2


def _characters(characters):
    return {"type": "BPE", "vocab": {c: i for i, c in enumerate(characters)}, "merges": []}


@pytest.mark.parametrize(
    "facts",
    [
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "exl2"},
        {"weight_quantize_algo": "weight_only_int4"},
    ],
)
def test_quantised_folders_are_named_at_once(llama_folder, facts):
    _edit_config(llama_folder, facts)
    with pytest.raises(UserError, match="is quantised"):
        resolve_model(llama_folder)


@pytest.mark.parametrize("facts", [None, {}, {"quant_method": None, "weight_quantize_algo": None}])
def test_empty_notes_of_quantisation_say_nothing(llama_folder, facts):
    _edit_config(llama_folder, facts)
    assert resolve_model(llama_folder).family.name == "llama"


def _edit_config(folder, facts):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": facts}))


@pytest.mark.parametrize("name", ["tokenizer.model", "model.safetensors", "config.json"])
def test_pointers_of_git_lfs_are_named_at_once(llama_folder, name):
    (llama_folder / name).write_text("version https://git-lfs.example/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UserError, match=f"git-lfs pointers in place of {name}: run `git lfs pull`"):
        resolve_model(llama_folder)
