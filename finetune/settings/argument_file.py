"""Reads an argument file, JSON or YAML by the end of its name, as the same plain values."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.settings.yaml_text import YamlFault, parse_yaml
from finetune.storage.files import is_present, open_file

_MAX_FILE_BYTES = 16 * 2**20
_MAX_YAML_BYTES = 2**20  # PyYAML reads about as much in ten seconds
_YAML_ENDINGS = (".yaml", ".yml")
ENDINGS = (".json", *_YAML_ENDINGS)


@dataclass(frozen=True)
class FileEntries:
    """What stands in an argument file.

    Attributes:
        values: Every key with its value.
        lines: The line of each key, counted from one; empty for JSON.
    """

    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)


def is_argument_file(word: str) -> bool:
    """Whether a word of the command line names an argument file."""
    return word.lower().endswith(ENDINGS)


def read_argument_file(path: Path, faults: list[str]) -> FileEntries | None:
    """Reads an argument file.

    Args:
        path: Of the file.
        faults: Takes a line for each fault that is found.

    Returns:
        None where nothing of the file can be used.
    """
    try:
        if path.name.lower().endswith(_YAML_ENDINGS):
            return _read_yaml(path)
        return FileEntries(_read_json(path, faults))
    except UserError as error:
        faults.append(f"argument file {error}")
    except UnicodeDecodeError as error:
        faults.append(f"argument file {path} is not UTF-8 text (byte {error.start}): save it as UTF-8")
    return None


def _read_yaml(path: Path) -> FileEntries:
    try:
        values, lines = parse_yaml(_read_content(path, _MAX_YAML_BYTES))
    except YamlFault as fault:
        column = "" if fault.column is None else f", column {fault.column}"
        raise UserError(f"{path}, line {fault.line}{column}: {fault}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{path} holds no settings: each line must look like `key: value`, with a blank after the colon"
        )
    return FileEntries(values, lines)


def _read_json(path: Path, faults: list[str]) -> dict[str, Any]:
    objects: list[list[tuple[str, Any]]] = []  # the outermost is read last

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        objects.append(pairs)
        return dict(pairs)

    try:
        parsed = json.loads(_read_content(path, _MAX_FILE_BYTES), object_pairs_hook=keep)
    except json.JSONDecodeError as error:
        place = f"{path}, line {error.lineno}, column {error.colno}"
        raise UserError(f"{place}: not valid JSON ({error.msg}){_explain_json_fault(error)}") from None
    except UnicodeDecodeError:
        raise
    except RecursionError:
        raise UserError(
            f"{path} cannot be read as JSON: it is nested too deep, settings are plain values"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise UserError(f'{path} holds no JSON object: it must look like {{"key": value, ...}}')
    keys = [key for key, _ in objects[-1]]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    faults.extend(f'"{key}" stands more than once in {path}: keep one' for key in twice)
    return parsed


def _read_content(path: Path, max_bytes: int) -> str:
    if not is_present(path):
        raise UserError(f"{path} does not exist (looked in {Path.cwd()}): check the path")
    with open_file(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UserError(f"{path} has more than {max_bytes:,} bytes: give the file of the settings alone")
    return content.decode("utf-8-sig")


def _explain_json_fault(error: json.JSONDecodeError) -> str:
    """What to change, for what other formats allow and JSON does not."""
    before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if after.startswith(("//", "#", "/*")):
        return ": JSON has no comments, remove them; in a file that ends in .yaml, # begins one"
    if after.startswith("'"):
        return ": texts stand in double quotes"
    if (before.endswith(",") and after.startswith(("}", "]"))) or after.startswith((",}", ",]")):
        return ": remove the comma after the last entry"
    if word := re.match(r"True|False|None", after):
        return f": write {({'True': 'true', 'False': 'false'}).get(word[0], 'null')} for {word[0]}"
    if after.startswith('"') and not before.endswith((",", "{", "[", ":")):
        return ": a comma is missing between two entries"
    return ""
