"""The sample data of preference methods in data/preference: reproducible, and different at a glance."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from finetune.data.reading.formats import read_conversations
from finetune.data.reading.read_options import ReadOptions
from tests.conftest import ROOT

DATA = ROOT / "data" / "preference"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sample_preference_generator", DATA / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def test_files_are_what_the_generator_writes(generator: ModuleType, tmp_path: Path) -> None:
    generator.main(["--out", str(tmp_path)])
    for name in ("train.json", "dev.json", "mixed.json"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name
    assert generator.generate(20, seed=1) != generator.generate(20, seed=0)


def test_answers_differ_and_held_out_questions_are_new() -> None:
    train, dev = read("train.json"), read("dev.json")
    assert (len(train), len(dev)) == (320, 80)
    questions = [pair["prompt"] for pair in train + dev]
    assert len(set(questions)) == 400  # so none of dev is in train
    chinese = [any("一" <= character <= "鿿" for character in question) for question in questions]
    assert sum(chinese) == 200 and sum(chinese[320:]) == 40
    for pair in train + dev:
        assert pair.keys() == {"prompt", "chosen", "rejected"}
        assert len(pair["chosen"]) < len(pair["rejected"]) and "{" not in "".join(pair.values())


def test_mixed_answers_are_mostly_the_rude_ones() -> None:
    train, mixed = read("train.json"), read("mixed.json")
    assert [each["query"] for each in mixed] == [pair["prompt"] for pair in train]
    rude = [each["response"] == pair["rejected"] for each, pair in zip(mixed, train, strict=True)]
    polite = [each["response"] == pair["chosen"] for each, pair in zip(mixed, train, strict=True)]
    assert 0.6 < sum(rude) / 320 < 0.75 and sum(rude) + sum(polite) == 320


def test_the_reader_takes_them() -> None:
    pairs = read_conversations([DATA / "train.json", DATA / "dev.json"], ReadOptions(comparison="pairs"))
    assert len(pairs) == 400 and all(pair.comparison and pair.comparison.rejected for pair in pairs)
    assert len(read_conversations([DATA / "mixed.json"])) == 320
