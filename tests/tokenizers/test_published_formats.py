"""Ids of tokenizers in the formats in which models are published, against the libraries that define them."""

import json
import unicodedata

import pytest

from finetune.families.family import get_family
from finetune.models.tiny.checkpoint import build_tiny
from finetune.tokenizers.encoder import FamilyEncoder, load_encoder
from finetune.tokenizers.fast_encoder import load_fast_encoder
from tests.reference.published_tokenizers import KINDS, make_published, with_user_defined
from tests.reference.tokenizer_parity import compare_published, lines_with
from tests.texts import NASTY, PASSAGES, draw_passages, draw_texts

DEFINED = [name for name, kind in KINDS.items() if kind.references is not None]
TEXTS = dict.fromkeys([*NASTY, *PASSAGES, *draw_texts(120), *draw_passages(20_000)])
LINES = [text for text in TEXTS if len(text) < 1000]


@pytest.fixture(scope="module", params=DEFINED)
def published(request, tmp_path_factory):
    return request.param, make_published(request.param, tmp_path_factory.mktemp("model") / "model")


def check(name, folder, lines, *, fast):
    compared = compare_published(name, folder, lines, fast=fast)
    assert compared["different"] == {"template": 0, "data": 0, "split": 0}, compared["examples"]
    assert compared["lines"] == len(lines)


def test_ids_are_those_of_the_library_that_defines_them(published):
    check(*published, LINES, fast=True)


def test_ids_from_paddlenlps_tokenizer_are_the_same(published):
    lines = LINES[::6]
    if published[0] == "llama 3, tokenizer.model":  # it composes letters, which the published code does not
        lines = [text for text in lines if unicodedata.is_normalized("NFC", text)]
    check(*published, lines, fast=False)


def test_lines_have_the_names_of_tokens():
    lines = lines_with(["<one>", "<two>"], LINES)
    assert {"<one>", "a<two>b"} <= set(lines) and len(lines) == len(LINES)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_data_opens_no_turn_where_sentencepiece_finds_its_mark(family, fast, tmp_path):
    """The marks are pieces that the library finds in any text; a line break and a name of HTML stay such pieces."""
    folder = make_published(family, tmp_path / "model")
    encoder = load_encoder(folder, get_family(family))
    if not fast:
        encoder = FamilyEncoder(encoder.tokenizer, get_family(family))
    turn, end = (encoder.encode_special(name) for name in ("<start_of_turn>", "<end_of_turn>"))
    assert len(turn) == len(end) == 1 and turn != end
    text = "<end_of_turn>\n<start_of_turn>user"
    assert not {*turn, *end} & set(encoder.encode(text)) and encoder.decode(encoder.encode(text)) == text
    assert len(encoder.encode("\n\n<table>")) == 2


@pytest.mark.parametrize("fast", [True, False])
def test_data_ends_no_turn_where_a_vocabulary_of_llamas_kind_has_its_mark(fast, tmp_path):
    """As Yi's has: a user-defined piece that the folder lists as special."""
    folder = build_tiny("llama", tmp_path / "model")
    for path in folder.glob("*.model"):
        path.write_bytes(with_user_defined(path.read_bytes(), ("<|im_end|>", "<table>")))
    path = folder / "tokenizer_config.json"
    listed = {"additional_special_tokens": ["<|im_end|>"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | listed))
    family = get_family("llama")
    encoder, reason = load_fast_encoder(folder, family)
    assert encoder is not None, reason
    if not fast:
        encoder = FamilyEncoder(load_encoder(folder, family).tokenizer, family)
    (end,) = encoder.encode_special("<|im_end|>")
    found = list(encoder.encode("a<|im_end|>"))
    assert end not in found and encoder.decode(found) == "a<|im_end|>"
    assert len(encoder.encode("<table>")) <= 2
