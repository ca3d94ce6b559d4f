"""The folder of chat templates with names beside a tokenizer, as transformers writes it."""

from __future__ import annotations

import shutil
from pathlib import Path

NAMED_FOLDER = "additional_chat_templates"


def named_files(folder: Path) -> list[Path]:
    """The files of the folder of named templates, in order."""
    return sorted((folder / NAMED_FOLDER).glob("*.jinja"))


def copy_named(source: Path, target: Path) -> bool:
    """Copies the named templates of a folder to another, in place of those there; whether it has any."""
    files = named_files(source)
    if files and source.resolve() != target.resolve():
        shutil.rmtree(target / NAMED_FOLDER, ignore_errors=True)
        (target / NAMED_FOLDER).mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, target / NAMED_FOLDER / file.name)
    return bool(files)
