"""A model or a data set of a hub, by name: parsed, found in the caches, downloaded in parts.

    org/name                     looked for on PaddleNLP's hub, Hugging Face and ModelScope, in their caches first
    hf://org/name                Hugging Face
    modelscope://org/name        ModelScope
    aistudio://user/name         AI Studio
    hf://org/name@v1.0           a branch, a tag or a commit

A name that is a folder here never gets this far.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from finetune.errors import UserError, list_some
from finetune.models.hubs.aistudio import AIStudio
from finetune.models.hubs.hugging_face import HuggingFace, is_offline
from finetune.models.hubs.modelscope import ModelScope
from finetune.models.hubs.reach import is_reachable
from finetune.storage.checkpoints import WEIGHT_FILES, has_weights, shard_names
from finetune.storage.files import is_present, read_json, write_json
from finetune.storage.quantisation.side_files import SIDE_FILES, find_old_start, read_side_facts

_NAME = re.compile(r"(?:(?P<hub>\w+)://)?(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
SMALL_FILES = re.compile(r"[^/]+\.(json|txt|model|tiktoken|jinja)|additional_chat_templates/[^/]+\.jinja")
"""Names of the files that come with a model's configuration: settings, tokenizer, templates."""
_DATA = re.compile(r".+\.(json|jsonl|csv|tsv|txt|parquet|arrow)")
_MAX_DATA_FILES = 1000
_DATA_LIST = ".finetune_data_files"
"""Written when all files of a data set have arrived."""


class Hub(Protocol):
    """What is asked of a hub; every call may raise UserError with what the hub answered."""

    title: str

    def endpoint(self) -> str:
        """Its address."""

    def cached(self, name: str, revision: str | None, kind: str) -> Path | None:
        """The folder of what was downloaded earlier, complete or not."""

    def files(self, name: str, revision: str | None, kind: str) -> list[str] | None:
        """Paths of all files of a repository; None where there is no such repository."""

    def fetch(self, name: str, revision: str | None, kind: str, files: Sequence[str]) -> Path:
        """Downloads files that are not in the cache; gives the folder that holds them."""


HUBS: dict[str, Hub] = {"hf": HuggingFace(), "modelscope": ModelScope(), "aistudio": AIStudio()}
"""By the first part of names."""
_OF_BARE_NAMES = ("hf", "modelscope")
"""Where names without a first part are looked for, in that order."""


@dataclass(frozen=True)
class Repository:
    """What a name stands for.

    Attributes:
        hub: Key of `HUBS`.
        name: "organisation/name".
        revision: Branch, tag or commit; None for the newest.
        kind: "model" or "dataset".
    """

    hub: str
    name: str
    revision: str | None = None
    kind: str = "model"

    def cached(self) -> Path | None:
        """See `Hub.cached`."""
        return HUBS[self.hub].cached(self.name, self.revision, self.kind)

    def files(self) -> list[str] | None:
        """See `Hub.files`."""
        return HUBS[self.hub].files(self.name, self.revision, self.kind)

    def fetch(self, files: Sequence[str]) -> Path:
        """See `Hub.fetch`."""
        return HUBS[self.hub].fetch(self.name, self.revision, self.kind, files)

    def __str__(self) -> str:
        """As the user may write it."""
        return f"{self.hub}://{self.name}" + (f"@{self.revision}" if self.revision else "")


def candidates(text: str, *, kind: str = "model") -> list[Repository]:
    """The repositories that a name may stand for; none where it cannot be a name on these hubs.

    Raises:
        UserError: It begins with a hub that is not known.
    """
    match = _NAME.fullmatch(text)
    if match is None:
        return []
    if match["hub"] and match["hub"] not in HUBS:
        raise UserError(
            f"{text}: there is no hub {match['hub']!r}; there are {', '.join(f'{key}://' for key in HUBS)}"
        )
    keys = [match["hub"]] if match["hub"] else _OF_BARE_NAMES
    return [Repository(key, match["name"], match["revision"], kind) for key in keys]


def cached_model(text: str, *, needs_weights: bool = True) -> Path | None:
    """Folder of a model in a hub's cache, without asking the hub; None where it is not complete."""
    for repository in candidates(text):
        folder = repository.cached()
        if folder and (folder / "config.json").is_file() and (not needs_weights or has_weights(folder)):
            return folder
    return None


def find_remote(text: str, *, kind: str = "model") -> tuple[Repository | None, list[str]]:
    """Asks the hubs for a name.

    Returns:
        The repository, of a fixed revision where the hub tells one, or None; and why each hub without it has none.
    """
    reasons = []
    for repository in candidates(text, kind=kind):
        hub = HUBS[repository.hub]
        where = f"{hub.title} ({hub.endpoint()})"
        if is_offline():
            reasons.append(f"{hub.title} is not asked (HF_HUB_OFFLINE)")
        elif not is_reachable(hub.endpoint()):
            reasons.append(f"{where} cannot be reached")
        elif repository.files() is None:
            reasons.append(f"{where} has no {kind} {repository}")
        else:
            return repository, reasons
    return None, reasons


def fetch_description(repository: Repository) -> tuple[Repository, Path]:
    """Downloads the configuration of a model alone, to tell what it is.

    Returns:
        The repository with its revision fixed, so that later parts are of the same state, and the folder.
    """
    if "config.json" not in (names := repository.files() or []):
        raise UserError(
            f"{repository} has no config.json, so it is no model that can be read here; it holds {list_some(names, 6)}"
        )
    folder = repository.fetch(["config.json", *(name for name in SIDE_FILES if name in names)])
    if repository.hub == "hf" and re.fullmatch("[0-9a-f]{40}", folder.name):
        repository = replace(repository, revision=folder.name)
    return repository, folder


def fetch_small_files(repository: Repository) -> Path:
    """Downloads configuration, tokenizer and templates; gives the folder."""
    names = [name for name in repository.files() or [] if SMALL_FILES.fullmatch(name)]
    return repository.fetch([name for name in names if not name.endswith(".index.json")])


def fetch_weights(repository: Repository) -> Path:
    """Downloads the weights, in the first form of `WEIGHT_FILES` that is there; gives the folder.

    Raises:
        UserError: There are none that can be read here.
    """
    names = repository.files() or []
    start = next((name for name in WEIGHT_FILES if name in names), None)
    if start is None and any(name in names for name in SIDE_FILES):
        facts = read_side_facts(repository.fetch([name for name in SIDE_FILES if name in names]))
        start = find_old_start(names, facts)
    if start is None:
        raise UserError(
            f"{repository} has no weights that can be read here (one of {', '.join(WEIGHT_FILES)}); it holds "
            f"{list_some(names, 6)}"
        )
    folder = repository.fetch([start])
    return repository.fetch(shard_names(folder / start)) if start.endswith(".index.json") else folder


def fetch_dataset(text: str) -> Path | None:
    """Folder of a data set by name, from the cache or downloaded; None where the text is no such name.

    Raises:
        UserError: No hub has it, or it has no files that can be read here.
    """
    for repository in candidates(text, kind="dataset"):
        folder = repository.cached()
        if folder and _has_all_data(folder):
            return folder
    if not candidates(text):
        return None
    found, reasons = find_remote(text, kind="dataset")
    if found is None:
        raise UserError(
            f"dataset_name_or_path: {text} is neither a file nor a folder here, and {'; '.join(reasons)}. Check the "
            "path or the name"
        )
    names = [name for name in found.files() or [] if _DATA.fullmatch(name)]
    if not names or len(names) > _MAX_DATA_FILES:
        raise UserError(
            f"dataset_name_or_path: {found} has {len(names)} data files; between 1 and {_MAX_DATA_FILES} are read. "
            "Download what is needed by hand, and give its folder"
        )
    folder = found.fetch(names)
    write_json(folder / _DATA_LIST, names)
    return folder


def _has_all_data(folder: Path) -> bool:
    """Whether an earlier download of a data set came to its end and all of it is still there."""
    if not is_present(folder / _DATA_LIST):
        return False
    names = read_json(folder / _DATA_LIST)
    return isinstance(names, list) and all((folder / str(name)).is_file() for name in names)
