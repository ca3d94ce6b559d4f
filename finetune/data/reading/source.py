"""Where the examples of a data set lie: a path, or several, become the files of a split."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import UserError
from finetune.models.hubs.repository import fetch_dataset

SPLITS = ("train", "dev")
SUFFIXES = (".json", ".jsonl", ".csv")


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
                "or set validation_split to hold back a part of the training data."
            )
        return files
    return [file for path in paths for file in find_split(path, split, required=required)]


def find_split(given: str | Path, split: str, *, required: bool = True) -> list[Path]:
    """The files that hold one split of a data set.

    In a folder the first of these that exists is taken: ``<split>.json``, ``<split>.jsonl``,
    ``<split>.csv``, the files of these kinds of the folder ``<split>/`` in the order of their names. A path that
    is itself a file is training data and has no other split.

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
            f"dataset_name_or_path: {path} does not exist. Give a folder with train.json and dev.json "
            "(or train/*.json and dev/*.json), or one file (.json, .jsonl or .csv)."
        )
    if not files and required:
        raise UserError(_describe_absence(path, split))
    return files


def _find_in_folder(folder: Path, split: str) -> list[Path]:
    for suffix in SUFFIXES:
        file = folder / f"{split}{suffix}"
        if file.is_dir():
            raise UserError(
                f"{file} is a folder, expected a file. "
                f"Rename the folder to {folder / split} to have all .json files in it read."
            )
        if file.is_file():
            return [file]
    parts = folder / split
    if not parts.exists():
        return []
    if not parts.is_dir():
        raise UserError(f"{parts} is a file, expected a folder. Rename it to {folder / (split + '.json')}.")
    files = [f for f in sorted(parts.iterdir()) if f.suffix in SUFFIXES and not f.name.startswith(".")]
    folders = [f for f in files if f.is_dir()]
    if folders:
        raise UserError([f"{f} is a folder, expected a file." for f in folders])
    if not files:
        raise UserError(
            f"{parts} holds no .json, .jsonl or .csv file. Put the {split} files there or remove the folder."
        )
    return files


def _describe_absence(path: Path, split: str) -> str:
    if path.is_file():
        return (
            f"{path} is a single file and gives training data only: there is no {split} split. "
            f"Give a folder with train.json and {split}.json instead, or set validation_split."
        )
    names = sorted(f.name + ("/" if f.is_dir() else "") for f in path.iterdir())
    found = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "nothing"
    return (
        f"{path} has no {split} data: looked for {split}.json, {split}.jsonl, {split}.csv and {split}/*.json, "
        f"found {found}. "
        "Rename the file, or give its own path."
    )
