"""config.json of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.storage.files import is_present, read_json_object


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        UserError: It is missing or is no JSON object.
    """
    path = folder / "config.json"
    if not is_present(path):
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    return read_json_object(path)
