"""tekken.json: special tokens first, then bytes merged by rank, compared with merging written out here."""

import base64
import json
import shutil
from itertools import pairwise

import pytest
import regex

from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.models.tiny.checkpoint import build_tiny
from finetune.tokenizers.encoder import FamilyEncoder, load_encoder
from finetune.tokenizers.fast_encoder import load_fast_encoder
from finetune.tokenizers.saving import save_tokenizer
from tests.texts import NASTY, PASSAGES, draw_texts

FAMILY = get_family("mistral")
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{Lu}*\p{Ll}+|\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NUM_SPECIAL = 30
UNUSED = 7
"""Pieces of the file behind those that its size leaves room for."""


def train_pieces(text, count):
    """Bytes, and what the commonest neighbours make, in the order in which they were found."""
    words = [[bytes([value]) for value in word.encode()] for word in regex.findall(PATTERN, text)]
    pieces = [bytes([value]) for value in range(256)]
    while len(pieces) < count:
        pairs = {}
        for word in words:
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        pieces.append(best[0] + best[1])
        words = [merge(word, {pieces[-1]: 0}) for word in words]
    return pieces


def merge(word, ranks):
    """Joins the neighbours of the lowest rank, the first of them first, until none is a piece."""
    while True:
        found = [(ranks[a + b], place) for place, (a, b) in enumerate(pairwise(word)) if a + b in ranks]
        if not found:
            return word
        place = min(found)[1]
        word = [*word[:place], word[place] + word[place + 1], *word[place + 2 :]]


PIECES = train_pieces("\n".join(PASSAGES), 256 + 90)
RANKS = {piece: rank for rank, piece in enumerate(PIECES[: len(PIECES) - UNUSED])}


def defined_ids(text):
    words = regex.findall(PATTERN, text)
    parts = [part for word in words for part in merge([bytes([value]) for value in word.encode()], RANKS)]
    return [NUM_SPECIAL + RANKS[part] for part in parts]


def content(**changes):
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for rank, piece in enumerate(PIECES)
    ]
    config = {"pattern": PATTERN, "num_vocab_tokens": len(PIECES), "version": "v3",
              "default_vocab_size": NUM_SPECIAL + len(RANKS), "default_num_special_tokens": NUM_SPECIAL}  # fmt: skip
    return {"vocab": vocab, "config": config, "version": 1, "type": "Tekken", **changes}


@pytest.fixture
def folder(tmp_path):
    """A model with nothing but tekken.json."""
    build_tiny("mistral", tmp_path / "model")
    for pattern in ("tokenizer*", "*.model", "special_tokens_map.json"):
        for path in (tmp_path / "model").glob(pattern):
            if path.name != "model.safetensors":
                path.unlink()
    (tmp_path / "model" / "tekken.json").write_text(json.dumps(content()))
    return tmp_path / "model"


def test_ids_are_those_of_the_definition(folder):
    fast, reason = load_fast_encoder(folder, FAMILY)
    assert fast is not None, reason
    texts = [text for text in [*NASTY, *PASSAGES, *draw_texts(100)] if len(text) < 1000]
    expected = [defined_ids(text) for text in texts]
    assert [list(ids) for ids in fast.encode_many(texts)] == expected
    slow = FamilyEncoder(load_encoder(folder, FAMILY).tokenizer, FAMILY)
    assert [list(ids) for ids in slow.encode_many(texts)] == expected
    assert [fast.decode(ids) for ids in expected] == [slow.decode(ids) for ids in expected] == texts


def test_special_tokens_are_the_first_ids(folder):
    encoder = load_encoder(folder, FAMILY)
    assert (encoder.eos_token_id, encoder.pad_token_id, encoder.prefix_ids) == (2, 11, (1,))
    assert encoder.fast is not None and len(encoder.tokenizer) == NUM_SPECIAL + len(RANKS)
    text = "[INST]Größe 茶[/INST] a</s><SPECIAL_25>"
    assert encoder.encode_special(text) == [3, *defined_ids("Größe 茶"), 4, *defined_ids(" a"), 2, 25]
    assert encoder.encode(text) == defined_ids(text), "text that is data closes no answer"


def test_listed_special_tokens(folder):
    listed = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(
        ["<unk>", "<s>", "</s>", "[THINK]", "[/THINK]", "<pad>"])]  # fmt: skip
    made = content(special_tokens=listed)
    made["config"] |= {"version": "v13"}
    (folder / "tekken.json").write_text(json.dumps(made))
    encoder = load_encoder(folder, FAMILY)
    assert (
        encoder.encode_special("[THINK]a[/THINK]") == [3, *defined_ids("a"), 4] and encoder.pad_token_id == 5
    )


def test_other_files_come_first(folder, tmp_path):
    build_tiny("mistral", tmp_path / "whole")
    shutil.copyfile(folder / "tekken.json", tmp_path / "whole" / "tekken.json")
    plain = load_encoder(build_tiny("mistral", tmp_path / "plain"), FAMILY)
    assert load_encoder(tmp_path / "whole", FAMILY).encode("a b 茶") == plain.encode("a b 茶")


def test_it_is_saved_beside_weights(folder, tmp_path):
    encoder = load_encoder(folder, FAMILY)
    (tmp_path / "out").mkdir()
    save_tokenizer(encoder.tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "tekken.json").read_bytes() == (folder / "tekken.json").read_bytes()
    again = load_encoder(tmp_path / "out", FAMILY)
    text = "[INST]a 茶[/INST]"
    assert again.encode_special(text) == encoder.encode_special(text)


FAULTS = {
    "no config": {"config": None},
    "a rank left out": {"vocab": content()["vocab"][1:]},
    "too few": {"vocab": content()["vocab"][:300]},
    "no base64": {"vocab": [{"rank": 0, "token_bytes": "?"}, *content()["vocab"][1:]]},
    "no names in a late version": {"config": content()["config"] | {"version": "v13"}},
    "more names than room": {"config": content()["config"] | {"default_num_special_tokens": 5}},
    "no expression": {"config": content()["config"] | {"pattern": "("}},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_cannot_be_used_is_named(fault, folder):
    (folder / "tekken.json").write_text(json.dumps(content(**FAULTS[fault])))
    with pytest.raises(
        UserError, match=r"the tokenizer of .* cannot be read: tekken.*Copy tekken\.json again, or put"
    ):
        load_encoder(folder, FAMILY)
