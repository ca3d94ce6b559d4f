"""From a folder or a name to what is known of a model before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families.config_file import read_config
from finetune.families.family import Family, find_family
from finetune.models import hub
from finetune.models.shard_files import is_sharded
from finetune.storage.checkpoints import check_weights
from finetune.storage.files import read_json_if_present

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class ResolvedModel:
    """A model that is known to be there.

    Attributes:
        folder: Local folder with config and weights; None for a hub name whose weights come on loading.
        name: As the user gave it.
        config: config.json as found.
        family: The record that covers it.
    """

    folder: Path | None
    name: str
    config: dict[str, Any]
    family: Family


def resolve_model(name_or_path: str | Path, *, needs_weights: bool = True) -> ResolvedModel:
    """Finds a model, before Paddle is imported when it is a local folder.

    Args:
        name_or_path: Its folder, or its name on the hub.
        needs_weights: Whether a folder without weights is a fault.

    Raises:
        UserError: No model folder, no weights, a family that is not covered, or a name while the hub
            cannot be reached.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if path.is_file():
        raise UserError(f"model {name} is a file: give the folder that holds config.json and the weights")
    if not path.is_dir() and _looks_like_path(name):
        raise UserError(f"model folder {name} does not exist: check --model_name_or_path")
    folder = path if path.is_dir() else hub.cached_folder(name)
    if folder is None:
        hub.require_reachable(name)
        config = read_config(hub.download_config(name))
        return ResolvedModel(None, name, config, _covered(config, name))
    config = read_config(folder)
    family = _covered(config, name)
    read_json_if_present(folder / GENERATION_CONFIG)  # a fault of it is told before any weight is read
    if needs_weights and not is_sharded(folder):
        check_weights(folder)
    return ResolvedModel(folder, name, config, family)


def _covered(config: dict[str, Any], name: str) -> Family:
    try:
        return find_family(config)
    except UserError as error:
        raise UserError(f"model {name} is not supported: {error}") from None


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or name.endswith("/")
