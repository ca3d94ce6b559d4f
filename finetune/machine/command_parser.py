"""Argument parsers whose help and errors are in the person's language."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from finetune.machine.language.columns import count_columns, wrap
from finetune.machine.language.translation import translate, translate_piece


class CommandParser(argparse.ArgumentParser):
    """argparse's parser; texts are given in English."""

    def __init__(self, *args: Any, **options: Any):
        for name in ("description", "epilog"):
            if options.get(name):
                options[name] = translate(options[name])
        options.setdefault("formatter_class", _HelpFormatter)
        super().__init__(*args, **options)
        # argparse's own words, which it looks up in gettext's catalogue of a program that has none.
        for group in self._action_groups:
            group.title = translate_piece(group.title) if group.title else None
        for action in self._actions:
            action.help = translate_piece(action.help) if action.help else None

    def add_argument(self, *args: Any, **options: Any) -> argparse.Action:
        """Adds an option with its help in the person's language."""
        return super().add_argument(*args, **_translated(options))

    def add_argument_group(self, *args: Any, **options: Any) -> Any:
        """Adds a group; its options are translated, too."""
        group = super().add_argument_group(*map(translate, args), **options)
        add = group.add_argument
        group.add_argument = lambda *words, **more: add(*words, **_translated(more))  # type: ignore[method-assign]
        return group

    def error(self, message: str) -> NoReturn:
        """Ends the command with code 2, the usage and what is wrong."""
        self.print_usage(sys.stderr)
        label = translate("error:")
        self.exit(2, f"{self.prog}: {label}{' ' * label.isascii()}{translate_piece(message)}\n")


class _HelpFormatter(argparse.HelpFormatter):
    """argparse's layout, by columns where characters are wide, and with names such as paddle-finetune in one piece."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrap(" ".join(text.split()), width).split("\n")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in wrap(" ".join(text.split()), width).split("\n"))

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None) -> str:
        wide = count_columns(prefix or "") - len(prefix or "")
        self._width -= wide  # argparse counts characters
        try:
            return super()._format_usage(usage, actions, groups, prefix)
        finally:
            self._width += wide

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        """The line of usage, under its name in the person's language."""
        super().add_usage(
            usage, actions, groups, translate_piece("usage:") + " " if prefix is None else prefix
        )


def _translated(options: dict[str, Any]) -> dict[str, Any]:
    text = options.get("help")
    return options | {"help": translate(text)} if text and text != argparse.SUPPRESS else options
