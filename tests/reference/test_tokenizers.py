"""Ids of texts of many kinds against transformers', for every family that it has, from both kinds of files."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil

import pytest

from finetune.families.family import get_family
from finetune.models.tiny.checkpoint import build_tiny
from finetune.tokenizers.fast_encoder import load_fast_encoder
from tests.reference.published_tokenizers import KINDS, make_published
from tests.reference.tokenizer_parity import (
    ADDED,
    add_tokens,
    by_transformers,
    collect_lines,
    compare,
    lines_with,
    make_folder,
)
from tests.reference.tokenizer_parity import FAMILIES as EVERY_FAMILY

REQUIRED = os.environ.get("FINETUNE_REQUIRE_PARITY") == "1"
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not importlib.util.find_spec("transformers") and not REQUIRED,
        reason="transformers is not installed; make parity installs it",
    ),
]

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "ernie4_5",
    "glm4",
    "phi3",
    "bloom",
    "gpt2",
    "falcon",
    "granite",
    "smollm3",
    "opt",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3",
)


@pytest.fixture(scope="module")
def lines():
    return collect_lines([], 1500)


def check(folder, family, lines, *, fast=True):
    compared = compare(family, folder, lines, fast=fast)
    assert compared["different"] == {"template": 0, "data": 0, "split": 0}, compared["examples"]
    if family in FAMILIES and fast:
        check_roles(folder, family)


def check_roles(folder, family):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours, _ = load_fast_encoder(folder, get_family(family))
    for role in ("eos", "pad"):
        theirs_id = getattr(theirs, f"{role}_token_id")
        assert theirs_id is None or getattr(ours, f"{role}_token_id") == theirs_id


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_ids_from_a_familys_own_vocabulary(family, fast, lines, tmp_path):
    """By the libraries alone, and by PaddleNLP's tokenizer."""
    check(make_folder(family, tmp_path / family, None), family, lines if fast else lines[:500], fast=fast)


@pytest.mark.parametrize("name", ["gpt2", "ernie4_5", "phi3", "gemma2", "gemma3"])
def test_ids_of_formats_as_published(name, lines, tmp_path):
    folder = make_published(name, tmp_path / name)
    kind = KINDS[name]
    texts = lines_with(kind.names, lines)
    compared = compare(kind.family, folder, texts, fast=True, expected=by_transformers(folder))
    assert compared["different"] == {"template": 0, "data": 0, "split": 0}, compared["examples"]


SETTINGS = ({}, {"legacy": True}, {"legacy": False}, {"add_prefix_space": False})
NORMALIZED = {
    " lead": {}, "trail ": {}, "\u2581sign": {}, "a\u2581b c": {}, "K1": {}, "é!": {}, "two  blanks": {},
    "<nl>": {"lstrip": True, "rstrip": True}, "word": {"single_word": True}, "<sp>": {"special": True},
    "wörd2": {"single_word": True, "special": True}, "<spr>": {"special": True, "rstrip": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "settings"), [*(("llama", each) for each in SETTINGS), ("gemma", {}), ("qwen2", {})], ids=str
)
def test_tokens_that_are_looked_for_in_normalised_text(family, settings, tmp_path, monkeypatch):
    """Behind typed blanks of either spelling, in decomposed letters, with blanks of their own, beside one another."""
    for name, flags in NORMALIZED.items():
        monkeypatch.setitem(ADDED, name, {"normalized": True, **flags})
    folder = make_folder(family, tmp_path / family, None)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    generator = random.Random(7)
    others = ["</s>", "<s>", " ", "  ", "\u2581", "\n", "a", "b ", "世界", "e\u0301", "\u212a", "K", "1", "!",
              "wo\u0308rd", "Word", "_", "\u200d", "x", "two", "words", "two\u2581words", "\u3000", "\t"]  # fmt: skip
    parts = [*ADDED, *others]
    texts = ["".join(generator.choices(parts, k=generator.randrange(1, 9))) for _ in range(6000)]
    check(folder, family, texts)
    check(folder, family, texts[:300], fast=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_from_tokenizer_json_alone(tmp_path, family, lines):
    import transformers

    folder = make_folder(family, tmp_path / family, None)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tmp_path / "saved" / name, alone / name)
    shutil.copyfile(folder / "config.json", alone / "config.json")
    check(alone, family, lines)


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_of_both_forms_of_llama(tmp_path, legacy, lines):
    folder = build_tiny("llama", tmp_path / "llama")
    add_tokens(folder, legacy=legacy)
    check(folder, "llama", lines)


def test_ids_without_a_decoder_of_added_tokens(tmp_path, lines):
    folder = build_tiny("llama", tmp_path / "llama")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("added_tokens_decoder", None)
    path.write_text(json.dumps(config | {"pad_token": "[PAD]"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<think>": size, "[PAD]": size + 1}))
    check(folder, "llama", lines)
