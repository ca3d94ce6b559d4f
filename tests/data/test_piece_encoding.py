"""Texts that name a template's special tokens, before a tokenizer that recognises these in any text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from finetune.data.samples.piece_encoding import PieceEncoder, PlainText
from finetune.data.templates.pieces import Piece

MARKS = {"<|a|>": 1, "<|b|>": 2}


class RecognisingEncoder:
    """One token a character, and one for a mark wherever it stands."""

    eos_token_id = 0
    pad_token_id = 0
    prefix_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            mark = next((mark for mark in MARKS if text.startswith(mark)), text[0])
            ids.append(MARKS[mark] if mark in MARKS else ord(mark))
            text = text[len(mark) :]
        return ids

    encode_special = encode

    def decode(self, ids: Sequence[int]) -> str:
        names = {number: mark for mark, number in MARKS.items()}
        return "".join(names.get(number) or chr(number) for number in ids)


class Marked:
    """What the encoder asks a template for."""

    name = "marked"
    special_tokens = tuple(MARKS)


TEXTS = ["<|a|>", "<|a|>x", "x<|b|>", "x<|a|>y<|a|>", "<|a|><|b|>", "<<|b|>|a|>", "no mark", ""]


@pytest.fixture(scope="module")
def encoder() -> PieceEncoder:
    return PieceEncoder(RecognisingEncoder(), Marked())


@pytest.mark.parametrize("text", TEXTS)
def test_a_mark_in_a_text_is_text(encoder, text):
    parts = encoder.encode([Piece(text, learned=False)], {}, appends_eos=False)
    ids = [number for part, _ in parts for number in part.tolist()]
    assert not set(ids) & set(MARKS.values())
    assert "".join(map(chr, ids)) == text


def test_many_texts_at_once_are_encoded_as_one_by_one(encoder):
    together = encoder.encode_texts(map(PlainText, TEXTS))
    shown = {key.text: "".join(map(chr, ids.tolist())) for key, ids in together.items()}
    assert shown == {text: text for text in TEXTS}


def test_a_mark_of_the_template_is_one_token(encoder):
    ((ids, learned),) = encoder.encode([Piece("<|a|>", learned=False, special=True)], {}, appends_eos=False)
    assert ids.tolist() == [1] and not learned
