"""Model names that are no local folder: is the hub there at all, and what to do when it is not.

PaddleNLP retries an unreachable hub for minutes and then says little. One connection attempt with a
time-out answers first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import UserError
from finetune.families.family import families
from finetune.models.hubs import reach
from finetune.models.hubs.reach import CONNECT_TIMEOUT_SECONDS
from finetune.storage.checkpoints import WEIGHT_FILES, has_weights, shard_names

_DEFAULT_ENDPOINT = "https://bj.bcebos.com/paddlenlp"


def endpoint() -> str:
    """Address of the hub that PaddleNLP downloads from; `PPNLP_ENDPOINT` changes it, as for PaddleNLP."""
    return os.environ.get("PPNLP_ENDPOINT") or _DEFAULT_ENDPOINT


def cached_folder(name: str) -> Path | None:
    """The folder where PaddleNLP keeps an earlier download of `name`, when it is complete."""
    home = Path(os.environ.get("PPNLP_HOME") or Path.home() / ".paddlenlp")
    folder = home / "models" / name
    return folder if (folder / "config.json").is_file() and has_weights(folder) else None


def is_reachable(timeout_seconds: float = CONNECT_TIMEOUT_SECONDS) -> bool:
    """Whether PaddleNLP's hub, or the proxy on the way to it, can be connected to in time."""
    return reach.is_reachable(endpoint(), timeout_seconds)


def absence(name: str, reasons: Sequence[str]) -> UserError:
    """The fault of a model that is nowhere to be had, with what to do."""
    known = sorted(families(), key=len, reverse=True)  # "qwen2" before "qwen"
    family = next((each for each in known if each in name.lower()), None)
    choice = "" if family else f" (FAMILY is one of {', '.join(sorted(known))})"
    family = family or "FAMILY"
    return UserError(
        f"model {name!r} is no local folder, and {'; '.join(reasons)}. Either: "
        f"(1) on a machine with a network, download the model and copy its folder here: config.json, the "
        f"weights (one of {', '.join(WEIGHT_FILES)}, with the shards an index names) "
        "and the tokenizer files (tokenizer_config.json and the "
        "vocabulary); then pass that folder as --model_name_or_path. Or (2) rehearse with a tiny checkpoint: "
        f"python -m finetune.models.tiny {family} ./tiny-{family}, then --model_name_or_path ./tiny-{family}{choice}"
    )


def has_model(name: str) -> bool:
    """Whether PaddleNLP's hub, which can be reached, has a model of that name."""
    try:
        download_config(name)
    except UserError:
        return False
    return True


def download_config(name: str) -> Path:
    """Fetches config.json through PaddleNLP; returns the folder that holds it.

    Raises:
        UserError: The hub has no such model.
    """
    return _fetch(name, ["config.json"]).parent


def download(name: str) -> Path:
    """Fetches config and weights through PaddleNLP; returns the folder.

    Raises:
        UserError: The hub has no such model, or none with weights that can be read here.
    """
    folder = download_config(name)
    first = _fetch(name, list(WEIGHT_FILES))
    for shard in shard_names(first):
        _fetch(name, [shard])
    return folder


def _fetch(name: str, filenames: list[str]) -> Path:
    from paddlenlp.utils.download import resolve_file_path

    try:
        found = resolve_file_path(name, filenames)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model {name!r} cannot be downloaded from {endpoint()}: {error}") from error
    if found is None:
        raise UserError(
            f"model {name!r} is no local folder, and {endpoint()} has no {' or '.join(filenames)} for it: "
            "check the name, or give a folder"
        )
    return Path(found)
