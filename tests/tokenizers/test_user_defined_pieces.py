"""Pieces that a SentencePiece vocabulary finds in any text, with ids as transformers gives them; and tokens of several files."""

from __future__ import annotations

import json

import pytest

from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.models.tiny.checkpoint import build_tiny
from finetune.tokenizers.encoder import FamilyEncoder, load_encoder
from finetune.tokenizers.fast_encoder import load_fast_encoder
from tests.families.cases import FACTS
from tests.reference.published_tokenizers import make_published
from tests.reference.tokenizer_definitions import open_sentencepiece
from tests.reference.tokenizer_folders import add_to_decoder, add_user_defined, edit, entry, make_model
from tests.texts import ADVERSARIAL

# By transformers 4.55, of the same vocabulary; letters that the vocabulary lacks are bytes.
EXPECTED = {
    "a<sep>b": ["a<sep>", "▁", "b"],
    "<sep>lead": ["<sep>", "▁", *"lead"],
    "x two words": ["▁", "x", "▁", *"two", "▁", *"words"],
    "x two▁words": ["▁", "x", "▁", "two▁words"],
    "a▁▁b": ["▁", "a", "▁▁", "▁", "b"],
    "a   b": ["▁", "a", "▁▁▁", "b"],
    "<table><table>\na": ["<table>", "<table>", "\n", "▁", "a"],
    "▁lead": ["▁lead"],
    "a<|im_end|>b": ["▁", "a", "<|im_end|>", "▁", "b"],
}


def without_blank(pieces, *, first):
    """The expected pieces where no blank comes in front of text behind a token, or of none."""
    names = ("sep>", "table>", "▁▁", "\n", "im_end|>")
    kept = []
    for place, piece in enumerate(pieces):
        behind = place > 0 and pieces[place - 1].endswith(names) and pieces[place - 1] != "▁▁▁"
        if piece == "▁" and (behind or (first and place == 0)):
            continue
        kept.append(piece)
    return kept


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("family", "settings"), [("llama", {}), ("llama", {"legacy": False}), ("gemma", {})])
def test_texts_are_cut_at_them_as_they_are_written(family, settings, fast, tmp_path):
    folder = make_model(family, tmp_path / "model")
    add_user_defined(folder)
    edit(folder / "tokenizer_config.json", **settings)
    record = get_family(family)
    encoder, reason = load_fast_encoder(folder, record)
    assert encoder is not None, reason
    if not fast:
        encoder = FamilyEncoder(load_encoder(folder, record).tokenizer, record)
    model = open_sentencepiece((folder / "tokenizer.model").read_bytes())
    for text, pieces in EXPECTED.items():
        opened = FACTS[family].blank_in_front
        if settings or not opened:
            pieces = without_blank(pieces, first=not opened)
        found = [model.id_to_piece(int(index)) for index in encoder.encode_special(text)]
        shown = [chr(int(piece[3:-1], 16)) if piece.startswith("<0x") else piece for piece in found]
        assert shown == pieces, text
    turn = model.piece_to_id("<|im_end|>")
    assert turn not in list(encoder.encode("a<|im_end|>b<|im_end|>"))


COMPOSING = ("qwen2", "qwen")
"""Families whose tokenizers join characters and the marks on them."""


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "qwen2", "bloom", "chatglm2", "qwen", "mistral, tekken.json"]
)
def test_adversarial_texts_come_back_and_open_no_turn(name, tmp_path):
    folder = make_published(name, tmp_path / "model") if "," in name else make_model(name, tmp_path / "model")
    family = get_family(name.partition(",")[0])
    encoder, reason = load_fast_encoder(folder, family)
    assert encoder is not None, reason
    framing = {encoder.eos_token_id, encoder.pad_token_id, *encoder.prefix_ids, *encoder.chat_end_ids}
    for text in ADVERSARIAL:
        ids = list(map(int, encoder.encode(text)))
        assert not framing & set(ids), text
        if "\u2581" not in text and name not in COMPOSING:
            assert encoder.decode(ids) == text
    for half in ("\ud800", "a\udfffb"):
        for encode in (encoder.encode, encoder.encode_special):
            with pytest.raises(UserError, match=r"half of a character .*write the whole character"):
                encode(half)


@pytest.mark.parametrize("family", ["llama", "qwen2", "bloom", "qwen", "chatglm2"])
def test_ids_of_embeddings_without_a_token_are_no_text(family, tmp_path):
    encoder, _ = load_fast_encoder(build_tiny(family, tmp_path / "model"), get_family(family))
    ids = list(map(int, encoder.encode("red")))
    assert encoder.decode([encoder.num_tokens + 7, *ids, 10**6]) == "red"
    assert encoder.pieces([10**6]) == ["<1000000>"]


def test_tokens_of_tokenizer_json_count_beside_others(llama_folder):
    """Of two names for one id that of tokenizer.json counts; the other follows."""
    size = json.loads((llama_folder / "config.json").read_text())["vocab_size"]
    added = [{"id": size, **entry("<injson>")}]
    (llama_folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "normalizer": None}))
    add_to_decoder(llama_folder, {size: entry("<indec>"), size + 9: entry("<gap>")})
    encoder = load_encoder(llama_folder, get_family("llama"))
    assert encoder.fast is not None
    assert encoder.encode("<injson><indec><gap>") == [size, size + 1, size + 2]
    assert encoder.num_tokens == size + 3


def test_a_blank_in_front_of_byte_level_texts(tmp_path):
    folder = build_tiny("gpt2", tmp_path / "model")
    encoder, _ = load_fast_encoder(folder, get_family("gpt2"))
    expected = encoder.encode(" red dress")
    edit(folder / "tokenizer_config.json", add_prefix_space=True)
    encoder, reason = load_fast_encoder(folder, get_family("gpt2"))
    assert encoder is not None, reason
    assert encoder.encode("red dress") == encoder.encode(" red dress") == expected
    slow = FamilyEncoder(load_encoder(folder, get_family("gpt2")).tokenizer, get_family("gpt2"))
    assert slow.encode("red dress") == expected
