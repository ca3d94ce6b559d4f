"""LLaMA-Factory's ``dataset_info.json``: data sets by name, with their files, columns and tags."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.storage.files import read_json

REGISTRY_FILE = "dataset_info.json"
_DEFAULT_FOLDERS = (".", "data")
REMOTE_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


@dataclass(frozen=True)
class RegistryEntry:
    """One data set of a registry.

    Attributes:
        registry: The file that names it.
        name: Its name there.
        content: What stands there.
    """

    registry: Path
    name: str
    content: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The file or folder of the data.

        Raises:
            UserError: The registry names none, or one that does not exist.
        """
        named = self.content.get("file_name")
        if not isinstance(named, str) or not named:
            remote = next((key for key in REMOTE_KEYS if self.content.get(key)), None)
            where = f" but {remote}: download the data, and name the file" if remote else ""
            raise UserError(f"{self.registry}: {self.name} has no file_name{where}")
        path = self.registry.parent / named
        if not path.exists():
            raise UserError(
                f"{self.registry}: the file_name of {self.name} is {named}, and {path} does not exist"
            )
        return path


def find_entry(path: str, dataset_dir: str | None = None) -> RegistryEntry | None:
    """The entry that a name stands for; None where the path exists or no registry has the name.

    Args:
        path: ``FOLDER/NAME``, or a name in the registry of `dataset_dir`, of this folder, or of ``data/``.
        dataset_dir: The folder of the registry.

    Raises:
        UserError: A registry that names nothing usable.
    """
    if os.path.exists(os.path.expanduser(path)):
        return None
    place = Path(path).expanduser()
    folders = [Path(dataset_dir).expanduser()] if dataset_dir else [Path(each) for each in _DEFAULT_FOLDERS]
    candidates = [(folder / REGISTRY_FILE, path) for folder in folders]
    if len(place.parts) > 1:
        candidates.insert(0, (place.parent / REGISTRY_FILE, place.name))
    for registry, name in candidates:
        content = read_registry(registry).get(name)
        if isinstance(content, dict):
            return RegistryEntry(registry, name, content)
    return None


def read_registry(file: Path) -> Mapping[str, Any]:
    """The entries of a registry; none where there is no such file, or one of another kind.

    Raises:
        UserError: The file is no JSON, or cannot be read.
    """
    if not file.is_file():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        return {}
    return {
        name: entry
        for name, entry in content.items()
        if isinstance(entry, dict) and entry.keys() & {"file_name", *REMOTE_KEYS}
    }
