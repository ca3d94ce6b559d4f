"""Tiny checkpoints of every family, built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.families.family import Family, get_family
from finetune.models.tiny.checkpoint import build_tiny
from tests.families.cases import CASES, FACTS, IDS, FamilyCase

CORPUS_LINES = (
    '{"src": "类型#上衣*版型#显瘦*风格#职场", "tgt": "这款上衣版型显瘦，职场必备，质感高级。"}',
    '{"src": ["a red dress"], "tgt": ["The red dress fits well, and it is light."]}',
    "plain text, with no JSON at all: 上衣和裙子都很好看",
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.json"
    path.write_text("\n".join(CORPUS_LINES * 20) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session", params=FACTS)
def family(request) -> Family:
    """The record of a family; every one in turn."""
    return get_family(request.param)


@pytest.fixture(scope="session", params=CASES, ids=IDS)
def case(request) -> FamilyCase:
    return request.param


@pytest.fixture(scope="session")
def tiny_folder(case, corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / case.name
    options = {"vocab_size": 330, "num_layers": 2} | case.options
    return build_tiny(case.name, folder, corpus=corpus, **options)


@pytest.fixture
def llama_folder(corpus, tmp_path) -> Path:
    """A checkpoint that the test may damage."""
    return build_tiny("llama", tmp_path / "model", corpus=corpus, vocab_size=330, num_layers=2)
