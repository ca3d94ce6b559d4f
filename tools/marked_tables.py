"""Tables between marks in the pages of docs/, and the files of results that they are made from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def read_json_lines(paths: Iterable[Path]) -> Iterator[Any]:
    """The values of files that hold one on each line."""
    for path in paths:
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def replace_table(page: Path, table: str) -> None:
    """Puts a table between the marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
