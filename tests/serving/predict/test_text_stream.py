"""Text as it comes: nothing twice, nothing lost, no half characters."""

from __future__ import annotations

import random

import pytest

from finetune.families.family import families
from finetune.models.tiny.checkpoint import build_tiny
from finetune.serving.predict.text_stream import TextStream
from finetune.tokenizers.encoder import FamilyEncoder
from finetune.tokenizers.loading import load_tokenizer

TEXTS = ("上衣 12 🙂🏽 naïve 龘𠮷", "  two  blanks\n\nand lines \t", "日本語とEnglishを混ぜる", "🙂")


@pytest.mark.parametrize("name", sorted(families()))
def test_the_stretches_make_up_the_text(name, tmp_path):
    family = families()[name]
    folder = build_tiny(name, tmp_path / name, vocab_size=600)
    encoder = FamilyEncoder(load_tokenizer(folder, family), family)
    for text in TEXTS:
        ids = encoder.encode(text)
        stream = TextStream(encoder.decode)
        parts = [stream.push([index]) for index in ids]
        assert all("\ufffd" not in part for part in parts), parts
        assert "".join([*parts, stream.finish()]) == encoder.decode(ids)
        assert sum(map(bool, parts)) > 1 or len(ids) < 6


def test_an_incomplete_character_at_the_end_is_marked():
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"))
    assert stream.push("上".encode()[:2]) == ""
    assert stream.finish() == "\ufffd"


def test_any_bytes_cut_anywhere():
    draw = random.Random(1)
    for _ in range(200):
        text = "".join(draw.choice("aé上🙂 \n") for _ in range(30))
        data, stream, parts = text.encode(), TextStream(lambda ids: bytes(ids).decode(errors="replace")), []
        while data:
            size = draw.randint(1, 3)
            parts.append(stream.push(data[:size]))
            data = data[size:]
        assert "".join([*parts, stream.finish()]) == text
        assert not any("\ufffd" in part for part in parts)
