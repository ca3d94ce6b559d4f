"""Adapters of hubs, by name: found as models are (`finetune.models.hubs.repository`), and small enough to come whole."""

from __future__ import annotations

import re
from pathlib import Path

from finetune.errors import UserError, list_some
from finetune.models.hubs.repository import (
    SMALL_FILES,
    Repository,
    candidates,
    find_remote,
)
from finetune.storage.checkpoints import shard_names
from finetune.storage.rank_files import LORA_STEM, PREFIX_STEM

_CONFIGS = ("adapter_config.json", "lora_config.json", "prefix_config.json")
_WEIGHTS = (
    "adapter_model.safetensors", "adapter_model.bin", "peft_model.safetensors.index.json", f"{LORA_STEM}.pdparams",
    f"{PREFIX_STEM}.pdparams",
)  # fmt: skip
"""In the order in which they are looked for; one of them is enough."""
_ONE_SLASH = re.compile(r"^(\w+):/(?=[^/])")


def is_hub_name(path: str | Path) -> bool:
    """Whether what was given for an adapter's folder can only be a name on a hub: no such place is here.

    Raises:
        UserError: It begins with a hub that is not known.
    """
    return not Path(path).exists() and bool(candidates(name_of(path)))


def name_of(path: str | Path) -> str:
    """The name as it was given; `Path` leaves one slash of ``hf://``."""
    return _ONE_SLASH.sub(r"\1://", str(path))


def local_adapter(path: str | Path, setting: str = "lora_path") -> Path:
    """Folder of an adapter; what is neither here nor a name on a hub stays as it is.

    A folder and what is in a hub's cache cause no network traffic.

    Args:
        path: A folder, or a name.
        setting: Which one it was given as, for messages.

    Raises:
        UserError: No hub has it, or what it has is no adapter.
    """
    if not is_hub_name(path):
        return Path(path)
    name = name_of(path)
    for repository in candidates(name):
        folder = repository.cached()
        if folder and _is_complete(folder):
            return folder
    found, reasons = find_remote(name)
    if found is None:
        raise UserError(
            f"{setting} {name} is no folder here, and {'; '.join(reasons)}. Check the path or the name; on a machine "
            "without a network, copy the adapter's folder here and give that"
        )
    return _fetch(found, setting)


def _fetch(repository: Repository, setting: str) -> Path:
    names = repository.files() or []
    weights = next((name for name in _WEIGHTS if name in names), None)
    if weights is None or not any(name in names for name in _CONFIGS):
        what = (
            "a whole model, which is given as model_name_or_path" if "config.json" in names else "no adapter"
        )
        raise UserError(f"{setting} {repository} is {what}: it holds {list_some(names, 6)}")
    small = [name for name in names if SMALL_FILES.fullmatch(name) and not name.endswith(".index.json")]
    folder = repository.fetch([*small, weights])
    return repository.fetch(shard_names(folder / weights)) if weights.endswith(".index.json") else folder


def _is_complete(folder: Path) -> bool:
    """Whether configuration and weights are there, which come last."""
    weights = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None or not any((folder / name).is_file() for name in _CONFIGS):
        return False
    shards = shard_names(folder / weights) if weights.endswith(".index.json") else []
    return all((folder / name).is_file() for name in shards)
