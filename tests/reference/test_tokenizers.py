"""Ids of texts of many kinds against transformers', for every family that it has, from both kinds of files."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil

import pytest

from finetune.families.family import get_family
from finetune.models.tiny.checkpoint import build_tiny
from finetune.tokenizers.fast_encoder import load_fast_encoder
from tests.texts import NASTY, draw_passages, draw_texts

REQUIRED = os.environ.get("FINETUNE_REQUIRE_PARITY") == "1"
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not importlib.util.find_spec("transformers") and not REQUIRED,
        reason="transformers is not installed; make parity installs it",
    ),
]

FAMILIES = ("llama", "qwen2", "qwen3", "ernie4_5", "phi3", "bloom", "opt", "mistral", "gemma")
PREFIXED_VOCABULARY = {"gemma"}
"""The tiny vocabulary puts a blank in front, which transformers' converter for this family never does."""

FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
ADDED = {
    "<think>": {},
    "<think>x": {},
    "<norm>": {"normalized": True},
    "two words": {"normalized": True},
    "<l>": {"lstrip": True},
    "<r>": {"rstrip": True},
    "<lr>": {"lstrip": True, "rstrip": True, "special": True},
    "wörd": {"single_word": True},
    "词语": {},
    "[INST]": {"special": True},
}
CALL = '<think>\n{"name": "天气", "arguments": {"city": "Köln", "n": [1, 2.5e3]}}</think>'
CODE = "def f(x):\n\treturn x  # </s> [INST]\r\n    if x<l>y: <r>  pass\n"


def add_tokens(folder, **config):
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    path = folder / "tokenizer_config.json"
    found = json.loads(path.read_text()) | config
    added = {
        str(size + place): {"content": name, **FLAGS, **flags}
        for place, (name, flags) in enumerate(ADDED.items())
    }
    found["added_tokens_decoder"] = (found.get("added_tokens_decoder") or {}) | added
    path.write_text(json.dumps(found))


def texts():
    placed = [
        form.format(name=name)
        for name in [*ADDED, "</s>", "<s>", "<|im_end|>"]
        for form in (
            "{name}",
            "a{name}b",
            "a {name} b",
            " {name}",
            "{name}{name} x",
            "你好{name}\n\n世",
            "x\n{name}",
        )
    ]
    return [*NASTY, *draw_texts(300), *draw_passages(40_000), *placed, CALL, CODE]


def check(folder, family):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours, reason = load_fast_encoder(folder, get_family(family))
    assert ours is not None, reason
    lines = texts()
    expected = [theirs(line, add_special_tokens=False)["input_ids"] for line in lines]
    wrong = [line for line, ids in zip(lines, expected, strict=True) if ours.encode_special(line) != ids]
    assert not wrong, wrong[:3]
    as_ids, _ = load_fast_encoder(folder, get_family(family), splits_special=False)
    assert [list(map(int, ids)) for ids in as_ids.encode_many(lines)] == expected
    theirs.backend_tokenizer.encode_special_tokens = True
    expected = [theirs.backend_tokenizer.encode(line, add_special_tokens=False).ids for line in lines]
    found = [list(map(int, ids)) for ids in ours.encode_many(lines)]
    assert [line for line, a, b in zip(lines, found, expected, strict=True) if a != b] == []
    for role in ("eos", "pad"):
        theirs_id = getattr(theirs, f"{role}_token_id")
        assert theirs_id is None or getattr(ours, f"{role}_token_id") == theirs_id


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in PREFIXED_VOCABULARY])
def test_ids_from_a_familys_own_vocabulary(tmp_path, family):
    folder = build_tiny(family, tmp_path / family)
    add_tokens(folder)
    check(folder, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_from_tokenizer_json_alone(tmp_path, family):
    import transformers

    folder = build_tiny(family, tmp_path / family)
    add_tokens(folder)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "saved" / name, alone / name)
    shutil.copyfile(folder / "config.json", alone / "config.json")
    check(alone, family)


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_of_both_forms_of_llama(tmp_path, legacy):
    folder = build_tiny("llama", tmp_path / "llama")
    add_tokens(folder, legacy=legacy)
    check(folder, "llama")


def test_ids_without_a_decoder_of_added_tokens(tmp_path):
    folder = build_tiny("llama", tmp_path / "llama")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("added_tokens_decoder", None)
    path.write_text(json.dumps(config | {"pad_token": "[PAD]"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<think>": size, "[PAD]": size + 1}))
    check(folder, "llama")
