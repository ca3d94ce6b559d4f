"""What is finished of a batch run, line by line, so that a killed run goes on where it was.

`<output>.partial` holds the settings first and then one answer a line, in the order of generation. A line
without its end is what a kill cut off; it is computed again. When all are there, the output is written in the
order of the input and takes its name at once.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from finetune.errors import UserError, find_remedy
from finetune.storage.files import sync_folder, write_atomically
from finetune.storage.lock import hold_output, remove_dead_lock


class Journal:
    """The partial file of one output, held by one process.

    Args:
        output: The file to be made in the end.
        settings: Whatever decides about the answers; a run goes on with the same ones only.

    Attributes:
        answers: Finished texts by the number of their line.

    Raises:
        UserError: The output exists, another process writes it, or it was begun with other settings.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]):
        self.output = output
        self.path = partial_path(output)
        self.answers: dict[int, str] = {}
        self._settings = json.loads(json.dumps(settings, ensure_ascii=False))
        check_output(output)
        self._held = contextlib.ExitStack()
        try:
            self._held.enter_context(hold_output(output, f"output_file {output}"))
            self._file = self._held.enter_context(open(self.path, "a+b"))  # noqa: SIM115
        except OSError as error:
            self._held.close()
            raise _unwritable(output, error) from error
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process go on with the output."""
        with contextlib.suppress(OSError):  # what a full disk did not take has been told of
            self._held.close()

    def add(self, texts: Mapping[int, str]) -> None:
        """Keeps the answers of a batch, on the disk when this returns.

        Raises:
            UserError: The disk is full.
        """
        lines = [
            json.dumps({"line": line, "output": text}, ensure_ascii=False) for line, text in texts.items()
        ]
        self._append(lines)
        self.answers |= texts

    def finish(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Writes the output and removes the partial file.

        Raises:
            UserError: The disk is full.
        """
        text = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
        try:
            write_atomically(self.output, text.encode())
            sync_folder(self.output.parent)
        except OSError as error:
            raise _unwritable(self.output, error) from error
        self.path.unlink()

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        if not whole:
            self._begin()
            return
        try:
            head, *lines = [json.loads(line) for line in whole.splitlines()]
            self.answers = {line["line"]: line["output"] for line in lines}
            found = head["settings"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(
                f"{self.path} cannot be read: remove it to begin anew, or give another --output_file"
            ) from None
        changed = _differences(found, self._settings)
        if changed and not self.answers:
            self._file.truncate(0)
            self._begin()
        elif changed:
            raise UserError(
                f"{self.path} holds {len(self.answers)} answers of a run with other settings: {changed}. "
                "Give the same settings to go on, another --output_file, or remove that file to begin anew"
            )

    def _begin(self) -> None:
        self._append([json.dumps({"settings": self._settings}, ensure_ascii=False)])

    def _append(self, lines: Sequence[str]) -> None:
        try:
            self._file.write("".join(line + "\n" for line in lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(self.output, error) from error


def partial_path(output: Path) -> Path:
    """Where finished answers stand until all are there."""
    return output.with_name(f"{output.name}.partial")


def check_output(output: Path) -> None:
    """Says what is wrong with the name of an output, before anything expensive.

    Raises:
        UserError: It is a folder, lies in none, or is finished already.
    """
    remove_dead_lock(output)
    if output.is_dir():
        raise UserError(f"output_file {output} is a folder: give the name of a file")
    if not output.absolute().parent.is_dir():
        raise UserError(f"output_file {output}: there is no folder {output.parent}; make it first")
    if output.exists() and not partial_path(output).exists():
        raise UserError(f"output_file {output} exists already: give another name, or remove it to begin anew")


def _unwritable(output: Path, error: OSError) -> UserError:
    return UserError(
        f"output_file {output} cannot be written ({error.strerror or error}): {find_remedy(error.errno)}, and start the "
        "same command again; finished answers are kept"
    )


def _differences(old: Any, new: Mapping[str, Any]) -> str:
    names = sorted(old.keys() | new.keys()) if isinstance(old, dict) else []
    return "; ".join(
        f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}"
        for name in names
        if old.get(name) != new.get(name)
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
