"""The files of a tokenizer and its chat template, taken from an adapter's folder."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Sequence
from pathlib import Path

from finetune.storage.code_files import copy_code
from finetune.storage.template_files import copy_named

_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json",
)  # fmt: skip
_CODE = "tokenization_*.py"
_TEMPLATES = ("chat_template*", "*.jinja")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer's files in place of those that are there, if the source holds a whole tokenizer.

    Its code stays where the source has none: adapters of earlier versions name it and lack it.
    """
    files = [path for path in sorted(source.iterdir()) if path.is_file()]
    if not any(_fits(path.name, _VOCABULARIES) for path in files):
        return
    has_template = copy_named(source, folder) or any(_fits(path.name, _TEMPLATES) for path in files)
    for path in list(folder.iterdir()):
        if _fits(path.name, _TOKENIZER_FILES) or (has_template and _fits(path.name, _TEMPLATES)):
            path.unlink()
    for path in files:
        if _fits(path.name, (*_TOKENIZER_FILES, *_TEMPLATES, _CODE)):
            shutil.copyfile(path, folder / path.name)
    copy_code(source, folder, "tokenizer_config.json")


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
