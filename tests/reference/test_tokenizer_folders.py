"""Ids of texts that make trouble, from folders as people have them, against transformers' fast tokenizer."""

from __future__ import annotations

import importlib.util
import os
import random

import pytest

from finetune.families.family import get_family
from finetune.tokenizers.encoder import FamilyEncoder, load_encoder
from finetune.tokenizers.fast_encoder import load_fast_encoder
from tests.reference.tokenizer_folders import (
    CHANGES,
    USER_DEFINED,
    add_to_decoder,
    add_user_defined,
    edit,
    entry,
    make_model,
)
from tests.reference.tokenizer_parity import by_transformers, compare
from tests.texts import ADVERSARIAL, NASTY

REQUIRED = os.environ.get("FINETUNE_REQUIRE_PARITY") == "1"
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not importlib.util.find_spec("transformers") and not REQUIRED,
        reason="transformers is not installed; make parity installs it",
    ),
]

NAMES = [
    "<injson>",
    "<alsojson>",
    "<indec>",
    "<gap>",
    "<ex>",
    "<spec>",
    "</s>",
    "<s>",
    "<unk>",
    "<|endoftext|>",
]
OTHERS = [" ", "  ", "\u2581", "\n", "a", "b ", "世界", "two words", "x", "\t", "     ", "é", "\r\n", "12345",
          "Hello, world .", "don't", "！", "e\u0301"]  # fmt: skip
NONE = {"template": 0, "data": 0, "split": 0}


def draw(parts, count):
    generator = random.Random(5)
    return ["".join(generator.choices(parts, k=generator.randrange(1, 9))) for _ in range(count)]


TEXTS = [*draw([*NAMES, *OTHERS], 200), *NASTY[:40]]


FAILS_THERE = {("qwen2", "add_prefix_space")}


def check(family, folder, texts, *, fast=True):
    compared = compare(family, folder, texts, fast=fast, expected=by_transformers(folder))
    assert compared["different"] == NONE, compared["examples"]


FAILS_THERE = (("qwen2", "add_prefix_space"),)
"""Families and changes with which transformers itself fails."""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "gpt2"])
def test_ids_from_folders_whose_files_disagree(family, change, tmp_path):
    import transformers

    folder = make_model(family, tmp_path / "model")
    CHANGES[change](folder)
    if (family, change) in FAILS_THERE:
        pytest.skip("transformers itself fails here")
    check(family, folder, TEXTS)
    if (folder / "vocab.json").is_file() or (folder / "tokenizer.model").is_file():
        check(family, folder, TEXTS[:100], fast=False) if change != "add_prefix_space, both" else None
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    encoder, _ = load_fast_encoder(folder, get_family(family))
    assert encoder.eos_token_id == theirs.eos_token_id
    assert encoder.num_tokens == len(theirs)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "phi3", "qwen2", "gpt2", "opt", "bloom"])
def test_ids_and_decoded_text_of_adversarial_texts(family, tmp_path):
    import transformers

    folder = make_model(family, tmp_path / "model")
    check(family, folder, ADVERSARIAL)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    encoder, _ = load_fast_encoder(folder, get_family(family))
    for text in ADVERSARIAL:
        framed = theirs(text)["input_ids"]
        assert [*encoder.prefix_ids, *encoder.encode_special(text)] == framed, text
        shown = theirs.decode(framed, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert encoder.decode(framed) == shown, text


SETTINGS = ({}, {"legacy": False}, {"add_prefix_space": False}, {"add_prefix_space": False, "legacy": False})


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("family", "settings"), [*(("llama", each) for each in SETTINGS), ("mistral", {}), ("gemma", {})], ids=str
)
def test_ids_of_user_defined_pieces(family, settings, listed, tmp_path):
    """In the middle, at the ends, one behind the other, with blanks in either spelling and with flags of their own."""
    folder = make_model(family, tmp_path / "model")
    ids = add_user_defined(folder)
    edit(folder / "tokenizer_config.json", **settings)
    if listed:
        flags = {"<sep>": {"lstrip": True}, "<table>": {"rstrip": True}, "\n": {"rstrip": True}}
        add_to_decoder(folder, {ids[name]: entry(name, **each) for name, each in flags.items()})
    others = [" ", "  ", "\u2581", "\n", "a", "b ", "世界", "two words", "two", "words", "lead", " lead", "trail ",
              "x", "<s>", "</s>", "<unk>", "\t", "table>", "<", "     ", "茶", "é", "\r\n"]  # fmt: skip
    texts = draw([*USER_DEFINED, *others], 2000)
    for fast in (True, False):
        some = texts if fast else texts[:300]
        compared = compare(family, folder, some, fast=fast, expected=by_transformers(folder))
        different = compared["different"]
        assert (different["template"], different["data"]) == (0, 0), compared["examples"]
        # A mark of a turn is text in data here, a user-defined piece there.
        unmarked = [text for text in some if "<|im_end|>" not in text]
        check(family, folder, unmarked, fast=fast)
    encoder = load_encoder(folder, get_family(family))
    for each in (encoder, FamilyEncoder(encoder.tokenizer, get_family(family))):
        assert ids["<|im_end|>"] not in list(each.encode("a<|im_end|>b <|im_end|>"))
