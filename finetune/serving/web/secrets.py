"""Passwords and keys, which never stand on a command line: other users of a machine can read that."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError

MIN_LENGTH = 8
_MAX_LENGTH = 1024


@dataclass(frozen=True)
class SecretKind:
    """What a secret is called.

    Attributes:
        name: In messages, with its article: "the password".
        option: The option that names its file, without dashes.
        variable: The environment variable that may hold it instead.
        opens: What everybody could use without it: "the page".
    """

    name: str
    option: str
    variable: str
    opens: str

    def add_option(self, group: argparse._ArgumentGroup, asker: str) -> None:
        """Adds the option for the file, and refuses the one that would take the secret itself.

        Args:
            group: Of options; argparse would take a shortened name of the file's option for it.
            asker: Who asks for the secret, in the help.
        """
        group.add_argument(
            f"--{self.option}",
            help=f"file with {self.name} that {asker} (or {self.variable} in the environment)",
        )
        bare = self.option.removesuffix("_file")
        group.add_argument(
            *dict.fromkeys((f"--{bare}", f"--{bare.replace('_', '-')}")),
            nargs="?",
            action=_RefusedSecret,
            message=f"{self.name} on the command line can be read by others: {self._how}",
            help=argparse.SUPPRESS,
        )

    def read(self, path: str | None) -> str | None:
        """The secret of the file, or of the environment; None where neither is given.

        Raises:
            UserError: The file cannot be read, or holds no line of text.
        """
        if path is None:
            return os.environ.get(self.variable) or None
        try:
            if not Path(path).is_file():
                raise UserError(f"{self.option} {path} is not a file: give one that holds {self.name}")
            data = Path(path).read_bytes()
            secret = data.decode("utf-8").rstrip("\r\n")
        except OSError as error:
            raise UserError(
                f"{self.option} {path} cannot be read ({error.strerror}): give one that can"
            ) from None
        except ValueError:
            raise UserError(
                f"{self.option} {path!r} is no text file: give one that holds {self.name}"
            ) from None
        if not secret or len(secret) > _MAX_LENGTH or "\n" in secret:
            raise UserError(
                f"{self.option} {path} must hold one line of 1 to {_MAX_LENGTH} characters, {self.name}"
            )
        return secret

    def faults(self, is_alone: bool, secret: str | None) -> list[str]:
        """What is wrong with a secret for a server that this machine alone can reach, or others, too."""
        how = self._how
        if secret is None:
            fault = (
                f"{self.name} is missing, so {self.opens} would be open to everyone who reaches its address: {how}, "
                "or leave out --host"
            )
            return [] if is_alone else [fault]
        if len(secret) < MIN_LENGTH:
            return [f"{self.name} has {len(secret)} characters but must have at least {MIN_LENGTH}: {how}"]
        return []

    @property
    def _how(self) -> str:
        return f"write one into a file and give --{self.option}, or put it into the environment variable {self.variable}"


class _RefusedSecret(argparse.Action):
    """Ends with a message that does not repeat what was given."""

    def __init__(self, *, message: str, **options: Any):
        super().__init__(**options)
        self._message = message

    def __call__(self, parser: argparse.ArgumentParser, *_given: Any) -> None:
        parser.error(self._message)
