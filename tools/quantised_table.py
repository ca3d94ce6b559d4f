"""Writes the table of docs/quantised_matrix.md from the results of the matrix of quantised bases.

FINETUNE_QUANTISED_RESULTS=results.jsonl python -m pytest -m slow_distributed tests/distributed/test_quantised_matrix.py
python tools/quantised_table.py results.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.marked_tables import write_page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "quantised_matrix.md"
_LAYOUTS = ("one", "dp2", "tp2", "pp2", "sharding2 stage1", "sharding2 stage2")
_NUM_CASES = 360


def main() -> None:
    """Puts the table between the marks of the page."""
    write_page(PAGE, render)


def render(records: Iterable[Mapping[str, Any]], *, first: str = "base", num_cases: int = _NUM_CASES) -> str:
    """The table in Markdown; of several runs of a case the last one counts.

    Args:
        records: Of the runs.
        first: What the first of a case's names is.
        num_cases: Of the whole matrix.
    """
    found = {tuple(record["case"]): record for record in records}
    faults = [
        f"{' / '.join(case)}: {', '.join(record['faults'])}"
        for case, record in found.items()
        if record["faults"]
    ]
    cases = {
        (base, family, layout): (record, precision)
        for (base, family, precision, layout), record in found.items()
    }
    versions = f"paddlepaddle {version('paddlepaddle')}, paddlenlp {version('paddlenlp')}"
    lines = [
        f"{len(cases)} of {num_cases} cases were run, {len(faults)} with a fault. Made with {versions} on CPU processes.",
        *(f"- {fault}" for fault in faults),
        "",
        f"| {first} | family | {' | '.join(_LAYOUTS)} |",
        f"|---|---|{'---|' * len(_LAYOUTS)}",
    ]
    for row in sorted({case[:2] for case in cases}):
        cells = [_cell(cases.get((*row, layout))) for layout in _LAYOUTS]
        lines.append(f"| {' | '.join(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: tuple[Mapping[str, Any], str] | None) -> str:
    """The largest difference of a step's loss, marked where it is one of bfloat16."""
    if found is None:
        return "not run"
    record, precision = found
    mark = "bf16 " if precision == "bfloat16" else ""
    return f"{mark}{record['differences']['loss']:.0e}"


if __name__ == "__main__":
    main()
