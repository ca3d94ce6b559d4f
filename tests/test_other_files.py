"""Files that are no JSON objects, weights, vocabularies, templates and data: whatever they hold, a message names them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.data.reading.formats import ReadOptions, read_conversations
from finetune.data.reading.records import FaultCollector
from finetune.data.templates.template import load_template
from finetune.errors import UserError
from finetune.models.tiny.sentencepiece_training import open_sentencepiece
from finetune.storage.checkpoints import read_file
from finetune.tokenizers.encoder import load_tokenizer
from tests.test_json_files import SHAPES, folder, model_folder, place, read

__all__ = ["folder", "model_folder"]  # fixtures
ONE_LINE = ("null", "a list", "a string", "a number", "nested", "nested inside", "cut", "a long number")
"""Read as the names of columns, without a row below."""
NO_FILES = ("a folder", "a pipe", "unreadable")


def read_data(path: Path) -> Any:
    faults = FaultCollector()
    conversations = list(read_conversations([path], ReadOptions(), faults))
    faults.raise_if_any()
    return conversations


READERS: dict[str, Callable[[Path], Any]] = {
    "model.safetensors": read_file,
    "model_state.pdparams": read_file,
    "pytorch_model.bin": read_file,
    "tokenizer.model": lambda path: load_tokenizer(path.parent),
    "template.jinja": load_template,
    "data.json": read_data,
    "data.jsonl": read_data,
    "data.csv": read_data,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", READERS)
def test_a_file_of_another_kind_is_told(folder, name, shape):
    path = folder / name
    place(path, shape)
    found = read(lambda _folder: READERS[name](path), folder, shape)
    if found == []:
        assert shape == "empty" or (name == "data.csv" and shape in ONE_LINE), shape
        return
    assert isinstance(found, UserError), repr(found)
    assert name in str(found) or str(folder) in str(found)
    if shape in NO_FILES and name != "tokenizer.model":
        assert "cannot be read" in str(found) or "is missing" in str(found) or " folder" in str(found), str(
            found
        )


@pytest.mark.parametrize("content", [b"", b"null", bytes(256), b"\xff" * 100])
def test_a_vocabulary_that_is_none(content):
    with pytest.raises(UserError):
        open_sentencepiece(content)
