"""The folder of a merge's result: whether it may be put there, and the record of what was merged."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import UserError, find_remedy
from finetune.storage.files import NO_ROOM, fill_folder, read_json_or_empty, restore_replaced, write_json
from finetune.storage.lock import hold_output

RECORD_NAME = "merge.json"
"""What was merged; its presence marks a folder as the result of a merge."""


def check_output(
    folder: Path, sources: Iterable[Path], *, overwrite: bool, option: str = "--output_dir"
) -> None:
    """Says before any work whether the result may be put there.

    An earlier result that a merge was replacing when it was killed gets its name back first.

    Args:
        folder: Where the result is to be.
        sources: What is merged.
        overwrite: Whether the result of an earlier merge is replaced.
        option: Its name on the command line.

    Raises:
        UserError: It is a source or lies inside it, is no folder, holds something else already, or is being
            written.
    """
    if folder.resolve() in (places := [source.resolve() for source in sources]):
        what = "an input of this merge" if len(places) > 1 else "the checkpoint itself"
        raise UserError(f"{option} {folder} is {what}: give another folder")
    if folder.absolute().parent.is_dir():
        try:
            with hold_output(folder, f"{option} {folder}"):
                restore_replaced(folder)
        except OSError as error:
            raise UserError(
                f"{option} {folder} cannot be made ({error.strerror}): give another folder"
            ) from error
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{option} {folder} is a file: give a folder that does not exist yet")
    if not any(folder.iterdir()):
        return
    if RECORD_NAME not in os.listdir(folder):
        raise UserError(
            f"{option} {folder} is not empty and not the result of a merge: give a folder that does not exist yet"
        )
    if not overwrite:
        merged = read_json_or_empty(folder / RECORD_NAME).get("source", "another checkpoint")
        raise UserError(
            f"{option} {folder} holds what was merged from {merged}: add --overwrite true to replace it, or "
            "give another folder"
        )


@contextmanager
def output_folder(folder: Path, record: dict[str, object], *, option: str = "--output_dir") -> Iterator[Path]:
    """Gives a folder to fill; on success it becomes `folder`, on failure it is removed.

    Args:
        folder: Where the result is to be.
        record: What to note in the result beside its files and their sizes.
        option: Its name on the command line.
    """
    is_made = False
    try:
        with hold_output(folder, f"{option} {folder}"), fill_folder(folder) as hidden:
            is_made = True
            yield hidden
            sizes = {path.name: path.stat().st_size for path in sorted(hidden.iterdir())}
            write_json(hidden / RECORD_NAME, record | {"files": sizes})
    except OSError as error:
        if not is_made:
            raise UserError(
                f"{option} {folder} cannot be made ({error.strerror}): give another folder"
            ) from error
        if error.errno not in NO_ROOM:
            raise
        raise UserError(
            f"{folder.absolute().parent} has no room for the result ({error.strerror}): {find_remedy(error.errno)}"
        ) from error
