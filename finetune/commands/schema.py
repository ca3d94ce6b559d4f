"""Shows or writes the JSON Schema of argument files, by which editors complete and check them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.errors import UserError
from finetune.machine.command_names import called_as
from finetune.machine.command_parser import CommandParser
from finetune.machine.screen import print_text
from finetune.settings.schema import SCHEMA_FILE


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the schema, or writes it into a file.

    Raises:
        UserError: The file is there already, or cannot be written.
    """
    parser = CommandParser(
        prog=f"{called_as() or 'paddle-finetune'} schema",
        description='Show the JSON Schema of argument files; name it in a file with "$schema" and editors complete its keys.',
    )
    parser.add_argument("--output", type=Path, help="file to write; without it the schema is printed")
    output = parser.parse_args(argv).output
    text = SCHEMA_FILE.read_text(encoding="utf-8")
    if output is None:
        print(text, end="")
        return
    try:
        with output.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UserError(f"{output} is there already: choose another name, or remove it") from None
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}; choose another place") from None
    print_text(f'{output}: add "$schema": "{output.name}" to an argument file beside it')
