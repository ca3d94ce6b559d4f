"""The chat template that a model or an adapter was trained with, kept with it through merges and exports.

A run notes it in arguments.json, which belongs to the run and is not copied. What is made of the run gets
`RECORD_FILE`: the name of the template, or of the copy of a template file that lies beside it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.storage.files import read_json_object, read_json_or_empty, read_text, write_json

if TYPE_CHECKING:
    from finetune.families.family import TokenizerFacts

RECORD_FILE = "trained_template.json"
PATTERN = "trained_template*"
"""Files of ours: the record and the copy of a template file."""

RUN_FILE = "arguments.json"
_COPY_STEM = "trained_template_source"
_KEY = "chat_template"
_CHECKPOINT = re.compile(r"checkpoint-\d+")


def trained_template(folder: Path) -> str | None:
    """What the setting ``chat_template`` was when a folder's weights were trained.

    A checkpoint without a note of its own belongs to the run whose folder it lies in.

    Returns:
        A name or the path of a file, as `load_template` takes it; None where nothing is known.
    """
    notes = [folder / RUN_FILE, folder / RECORD_FILE]
    if _CHECKPOINT.fullmatch(folder.absolute().name):
        notes.append(folder.absolute().parent / RUN_FILE)
    for path in notes:
        note = read_json_or_empty(path)
        if isinstance(note, dict) and _KEY in note:
            return _located(note[_KEY], [folder, Path(str(note.get("model_name_or_path") or folder))])
    return None


def carry_template(sources: Sequence[Path], target: Path) -> str | None:
    """Notes in a folder the template that the first of some folders was trained with.

    Args:
        sources: Folders of the adapters and the model, what counts most first.
        target: Folder of the result.

    Returns:
        The template; None where no source knows one, and `target` stays as it is.
    """
    name = next((found for source in sources if (found := trained_template(source)) is not None), None)
    if name is None:
        return None
    drop_template(target)
    path, recorded = Path(name), name
    if not _is_name(name):
        if path.is_file():
            recorded = _COPY_STEM + path.suffix
            shutil.copyfile(path, target / recorded)
        else:
            print(
                f"note: the template file {name} of the training is not there: give it with --chat_template later"
            )
    write_json(target / RECORD_FILE, {_KEY: recorded})
    return name


def drop_template(folder: Path) -> None:
    """Removes what `carry_template` wrote."""
    for path in folder.glob(PATTERN):
        path.unlink()


def template_source(folder: Path, tokenizer: TokenizerFacts) -> str | None:
    """The template of a folder as jinja text for transformers.

    Args:
        folder: Where `carry_template` has noted it.
        tokenizer: How the model's sequences are framed.

    Returns:
        The text; None where there is none or jinja of one piece cannot express it.
    """
    from finetune.data.templates.chat_jinja import write_jinja
    from finetune.data.templates.chat_templates import CHAT_FORMATS

    name = trained_template(folder)
    if name is None or _is_name(name):
        return write_jinja(CHAT_FORMATS[name], tokenizer) if name in CHAT_FORMATS else None
    path = Path(name)
    if not path.is_file():
        return None
    if path.suffix != ".json":
        return read_text(path)
    source = read_json_object(path).get(_KEY)
    return source if isinstance(source, str) else None


def _located(value: object, folders: Sequence[Path]) -> str:
    """A template's name, or the path of its file as it is found from here."""
    from finetune.data.templates.template import PLAIN_NAMES

    name = PLAIN_NAMES[0] if value is None else str(value)
    if not _is_name(name):
        # Beside the record first: a copy is never meant to be taken from the working directory.
        own = [folders[0] / name] if name.startswith(_COPY_STEM) else []
        for path in (*own, Path(name), *(folder / name for folder in folders)):
            if path.is_file():
                return str(path)
    return name


def _is_name(name: str) -> bool:
    from finetune.data.templates.chat_templates import CHAT_FORMATS
    from finetune.data.templates.template import OWN_NAME, PLAIN_NAMES

    return name in (*CHAT_FORMATS, *PLAIN_NAMES, OWN_NAME)
