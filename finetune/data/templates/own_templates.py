"""The jinja templates in a tokenizer's folder, by name, as transformers finds them.

`chat_template.jinja` is the one called "default", files of the folder `additional_chat_templates` have the names of the
files; where there are any of these, what `tokenizer_config.json` says is not looked at. There it is one text, or a list
of templates with names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune.errors import UserError
from finetune.storage.files import read_json_object, read_text
from finetune.storage.template_files import NAMED_FOLDER, named_files

DEFAULT, TOOL_USE = "default", "tool_use"
JINJA_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"
_FILE_NAME = re.compile(r"\w[\w.-]*")
REMEDY = "correct it, or give chat_template another name or file"


@dataclass(frozen=True)
class OwnTemplates:
    """Templates of one folder.

    Attributes:
        place: The file or folder that holds them, for messages.
        by_name: Their texts.
    """

    place: Path
    by_name: Mapping[str, str] = field(default_factory=dict)


def read_own_templates(folder: Path) -> OwnTemplates:
    """The templates of a folder; none where it has none.

    Raises:
        UserError: A file cannot be read, or what it holds is no template.
    """
    files = {DEFAULT: folder / JINJA_FILE} if (folder / JINJA_FILE).is_file() else {}
    files |= {file.stem: file for file in named_files(folder)}
    if files:
        place = folder / (JINJA_FILE if DEFAULT in files else NAMED_FOLDER)
        return OwnTemplates(place, {name: read_text(file, remedy=REMEDY) for name, file in files.items()})
    path = folder / CONFIG_FILE
    if not path.is_file():
        return OwnTemplates(path)
    return OwnTemplates(path, read_template_field(path, read_json_object(path, remedy=REMEDY)))


def read_template_field(path: Path, fields: Mapping[str, object]) -> dict[str, str]:
    """The templates by name in the field ``chat_template`` of a JSON file; a single text is the default one.

    Raises:
        UserError: The field holds something else.
    """
    source = fields.get("chat_template")
    if source is None:
        return {}
    items: Iterable[tuple[object, object]] = [(DEFAULT, source)]
    if isinstance(source, dict):
        items = source.items()
    elif isinstance(source, list):
        items = [(item.get("name"), item.get("template")) for item in source if isinstance(item, dict)]
    found = {name: text for name, text in items if isinstance(name, str) and isinstance(text, str)}
    if not found:
        raise UserError(
            f"chat_template: the key chat_template of {path} holds no text and no templates by name."
        )
    return found


def keep_named(folder: Path, fields: Mapping[str, object]) -> None:
    """Gives the templates with names of tokenizer_config.json files, where its field is to be left out.

    Args:
        folder: The tokenizer's.
        fields: What the file holds.
    """
    if named_files(folder):
        return
    for name, text in read_template_field(folder / CONFIG_FILE, fields).items():
        if name != DEFAULT and _FILE_NAME.fullmatch(name):
            (folder / NAMED_FOLDER).mkdir(exist_ok=True)
            (folder / NAMED_FOLDER / f"{name}.jinja").write_text(text, encoding="utf-8")
