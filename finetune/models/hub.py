"""Model names that are no local folder: is the hub there at all, and what to do when it is not.

PaddleNLP retries an unreachable hub for minutes and then says little. One connection attempt with a
time-out answers first.
"""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from finetune.errors import UserError
from finetune.families.family import families
from finetune.storage.checkpoints import WEIGHT_FILES, has_weights, shard_names

CONNECT_TIMEOUT_SECONDS = 3.0
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
    """Whether a connection to the hub, or to the proxy on the way to it, opens in time."""
    address = urlsplit(endpoint())
    proxy = None if proxy_bypass(address.hostname or "") else getproxies().get(address.scheme)
    target = urlsplit(proxy if "://" in proxy else f"//{proxy}") if proxy else address
    port = target.port or (443 if target.scheme == "https" else 80)
    return _connects(target.hostname or "", port, timeout_seconds)


def require_reachable(name: str) -> None:
    """Raises UserError, with what to do, unless the hub can be reached."""
    if is_reachable():
        return
    known = sorted(families(), key=len, reverse=True)  # "qwen2" before "qwen"
    family = next((each for each in known if each in name.lower()), None)
    choice = "" if family else f" (FAMILY is one of {', '.join(sorted(known))})"
    family = family or "FAMILY"
    raise UserError(
        f"model {name!r} is no local folder, and the hub ({endpoint()}) cannot be reached. Either: "
        f"(1) on a machine with a network, download the model and copy its folder here: config.json, the "
        f"weights (one of {', '.join(WEIGHT_FILES)}, with the shards an index names) "
        "and the tokenizer files (tokenizer_config.json and the "
        "vocabulary); then pass that folder as --model_name_or_path. Or (2) rehearse with a tiny checkpoint: "
        f"python -m finetune.models.tiny {family} ./tiny-{family}, then --model_name_or_path ./tiny-{family}{choice}"
    )


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


def _connects(host: str, port: int, timeout_seconds: float) -> bool:
    """One attempt in a thread of its own, because a name look-up obeys no time-out."""
    outcome: list[bool] = []

    def attempt() -> None:
        try:
            with socket.create_connection((host, port), timeout=timeout_seconds):
                outcome.append(True)
        except OSError:
            outcome.append(False)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return outcome == [True]
