"""Tables between marks in the pages of docs/, and the files of results that they are made from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


def read_json_lines(paths: Iterable[Path]) -> Iterator[Any]:
    """The values of files that hold one on each line."""
    for path in paths:
        with path.open(encoding="utf-8") as file:  # strings may hold other line separators
            yield from map(json.loads, file)


def table_marks(name: str = "") -> tuple[str, str]:
    """What stands above and below a table: the only one of a page, or the one of that name."""
    title = f"table {name}" if name else "table"
    return f"<!-- {title}: begin -->", f"<!-- {title}: end -->"


def replace_table(page: Path, table: str, name: str = "") -> None:
    """Puts a table between the marks of a page: of its only table, or of the one of that name.

    Raises:
        ValueError: The page lacks the marks.
    """
    begin, end = table_marks(name)
    before, first, rest = page.read_text(encoding="utf-8").partition(begin)
    _, second, after = rest.partition(end)
    if not (first and second):
        raise ValueError(f"{page} lacks the marks {begin} and {end}")
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


def write_page(page: Path, render: Callable[[Iterator[Any]], str]) -> None:
    """The command of a tool that makes the only table of a page from the results of a matrix.

    Args:
        page: What is written where the command line names no other.
        render: Makes the table of the values in the files.
    """
    parser = argparse.ArgumentParser(description=f"Write the table of docs/{page.name}.")
    parser.add_argument("results", type=Path, nargs="+", help="files written by the matrix")
    parser.add_argument("--page", type=Path, default=page, help=f"the page (docs/{page.name})")
    arguments = parser.parse_args()
    replace_table(arguments.page, render(read_json_lines(arguments.results)))
