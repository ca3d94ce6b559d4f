"""Writes the table of layouts in docs/layouts.md from the results of the last full run of the matrix.

FINETUNE_LAYOUT_RESULTS=results.jsonl python -m pytest -m slow_distributed tests/distributed/test_matrix.py
python tools/layout_table.py results.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.marked_tables import write_page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "layouts.md"
_METRICS = ("eval_loss", "eval_perplexity", "eval_accuracy")


def main() -> None:
    """Puts the table between the marks of the page."""
    write_page(PAGE, render)


def render(records: Iterable[Mapping[str, Any]]) -> str:
    """The table in Markdown, and above it what it was made with; of several runs of a case the last one counts."""
    cases = {(record["family"], record["method"], record["layout"]): record for record in records}
    compared = [record for record in cases.values() if "differences" in record]
    largest = max((max(record["differences"].values()) for record in compared), default=0.0)
    versions = f"paddlepaddle {version('paddlepaddle')}, paddlenlp {version('paddlenlp')}"
    rows = [
        f"{len(compared)} cases compared, {len(cases) - len(compared)} refused; "
        f"the largest difference is {largest:.1e}. Made with {versions} on CPU processes.",
        "",
        "| family | method | layout | engines | data | loss | gradient norm | evaluation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(rows + [_row(record) for record in sorted(cases.values(), key=_order)])


def _order(record: Mapping[str, Any]) -> tuple[str, ...]:
    return record["family"], record["method"], record["layout"]


def _row(record: Mapping[str, Any]) -> str:
    start = [record["family"], record["method"], record["layout"]]
    if "refused" in record:
        return _cells([*start, "", "", f"refused: {record['refused']}", "", ""])
    differences = record["differences"]
    evaluation = max(differences[name] for name in _METRICS)
    figures = [f"{value:.0e}" for value in (differences["loss"], differences["grad_norm"], evaluation)]
    return _cells([*start, _engines(record["engines"]), record["variation"], *figures])


def _engines(engines: Mapping[str, str]) -> str:
    """The class that drives each axis; tensor parallelism is in the layers of the model and has none."""
    return ", ".join(name.split()[-1] for axis, name in engines.items() if axis != "tensor")


def _cells(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
