"""Where the examples of a data set lie: a path, or several, become the files of a split."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from finetune.data.reading.readers import SUFFIXES
from finetune.errors import UserError
from finetune.models.hubs.repository import fetch_dataset
from finetune.settings.dataset_registry import REGISTRY_FILE, read_registry

SPLITS = ("train", "dev")
# First words of the names of files and folders that say which split they hold.
_NAMES_OF_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("dev", "val", "valid", "validation", "eval", "evaluation"), "dev"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# What libraries keep beside data, and what describes it.
_OTHER_FILES = re.compile(
    r"(dataset_infos?|dataset_dict|state|config|package|.*_config)\.json|(readme|license|requirements).*\.txt",
    re.IGNORECASE,
)
_KINDS = ", ".join(SUFFIXES[:-1]) + f" or {SUFFIXES[-1]}"


def find_splits(paths: list[str], split: str, *, required: bool = True) -> list[Path]:
    """The files that several data sets have for one split, see `find_split`.

    Raises:
        UserError: A path is unusable, or no data set has the split and it is required.
    """
    if split == "dev" and len(paths) > 1:
        files = [file for path in paths for file in find_split(path, split, required=False)]
        if required and not files:
            raise UserError(
                f"{', '.join(paths)}: none of these is a folder with a dev split. Add one, "
                "set eval_dataset, or set validation_split to hold back a part of the training data."
            )
        return files
    return [file for path in paths for file in find_split(path, split, required=required)]


def find_split(given: str | Path, split: str, *, required: bool = True) -> list[Path]:
    """The files that hold one split of a data set.

    In a folder the first of these that exists is taken: a file ``<split>`` with one of `SUFFIXES`, in their
    order; the files of these kinds of the folder ``<split>/`` in the order of their names. Without them, all
    files of these kinds in the folder and below are looked at: names that begin with train, or with dev, val,
    valid, validation or eval, as a word of their own, say which split they hold, and so do folders of such
    names; what is left is training data where nothing is named so. Names that begin with test are of neither
    split. Text files count only where there is nothing else. A path that is itself a file is training data
    and has no other split.

    Args:
        given: The data set: a folder, a single file, or its name on a hub.
        split: "train" or "dev".
        required: Whether an absent split is an error; otherwise it gives an empty list. What is there
            but unusable (a missing path, a folder where a file should be, an empty ``<split>/``) is
            an error either way.

    Raises:
        UserError: Nothing usable was found; the message says what was looked for.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {SPLITS}")
    path = Path(given)
    if not path.exists() and (downloaded := fetch_dataset(str(given))):
        path = downloaded
    if path.is_file():
        if split == "train":
            return [path]
        files = []
    elif path.is_dir():
        files = _find_in_folder(path, split)
    else:
        raise UserError(
            f"dataset_name_or_path: {path} does not exist. Give a folder with train.json and dev.json, or with other "
            f"data files, or one file ({_KINDS})."
        )
    if not files and required:
        raise UserError(_describe_absence(path, split))
    return files


def find_evaluation_files(path: str | Path) -> list[Path]:
    """The files of a data set that is for evaluation alone: its dev split, or else all of it.

    Raises:
        UserError: Nothing usable was found.
    """
    return (find_split(path, "dev", required=False) if Path(path).is_dir() else []) or find_split(
        path, "train"
    )


def _find_in_folder(folder: Path, split: str) -> list[Path]:
    for suffix in SUFFIXES:
        file = folder / f"{split}{suffix}"
        if file.is_dir():
            raise UserError(
                f"{file} is a folder, expected a file. "
                f"Rename the folder to {folder / split} to have all files in it read."
            )
        if file.is_file():
            return [file]
    parts = folder / split
    if not parts.exists():
        return _find_by_names(folder, split)
    if not parts.is_dir():
        raise UserError(f"{parts} is a file, expected a folder. Rename it to {folder / (split + '.json')}.")
    files = [f for f in sorted(parts.iterdir()) if f.suffix in SUFFIXES and not f.name.startswith(".")]
    folders = [f for f in files if f.is_dir()]
    if folders:
        raise UserError([f"{f} is a folder, expected a file." for f in folders])
    files = _choose_kind(files or sorted(_walk(parts)))
    if not files:
        raise UserError(f"{parts} holds no {_KINDS} file. Put the {split} files there or remove the folder.")
    return files


def _find_by_names(folder: Path, split: str) -> list[Path]:
    """The files of a folder of several levels for a split, by the names of files and folders."""
    if registered := read_registry(folder / REGISTRY_FILE):
        raise UserError(
            f"{folder} has a {REGISTRY_FILE}: name one of its data sets, such as "
            f"{folder / next(iter(registered))} (there are {', '.join(list(registered)[:10])}), or a file."
        )
    by_split: dict[str | None, list[Path]] = {}
    for file in _choose_kind(sorted(_walk(folder))):
        by_split.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    if split == "train" and "train" not in by_split:
        return by_split.get(None, [])
    return by_split.get(split, [])


def _choose_kind(files: list[Path]) -> list[Path]:
    """Text files describe the others, where there are others."""
    return [file for file in files if file.suffix.lower() != ".txt"] or files


def _walk(folder: Path) -> Iterator[Path]:
    """All data files of a folder; a link to a folder is followed, once."""
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else [name for name in folders if not name.startswith(".")]
        if real in seen:
            continue
        seen.add(real)
        for name in names:
            is_data = Path(name).suffix.lower() in SUFFIXES and not name.startswith((".", "cache-"))
            if is_data and not _OTHER_FILES.fullmatch(name):
                yield Path(parent, name)


def _split_of(path: Path) -> str | None:
    """The split that the name of a file says, or that of a folder above it, the nearest first."""
    for part in reversed(path.parts):
        word = re.split(r"[^a-z]", part.lower(), maxsplit=1)[0]
        if word in _NAMES_OF_SPLITS:
            return _NAMES_OF_SPLITS[word]
    return None


def _describe_absence(path: Path, split: str) -> str:
    if path.is_file():
        return (
            f"{path} is a single file and gives training data only: there is no {split} split. "
            f"Set validation_split to hold back a part of it, set eval_dataset to another file, or give a folder "
            f"with train.json and {split}.json."
        )
    names = sorted(f.name + ("/" if f.is_dir() else "") for f in path.iterdir())
    found = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "nothing"
    remedy = "Rename the file, or give its own path."
    if split == "dev":
        remedy = "Rename the file, set eval_dataset to a path, or set validation_split."
    return (
        f"{path} has no {split} data: looked for {split}.json, {split}.jsonl, {split}.csv and {split}/*.json, and for "
        f"other data files ({_KINDS}) at any depth, found {found}. {remedy}"
    )
