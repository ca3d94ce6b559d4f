"""Writes the table of docs/alignment_matrix.md from the results of the matrix of preference methods.

FINETUNE_ALIGNMENT_RESULTS=results.jsonl python -m pytest -m slow_distributed tests/distributed/test_preference_matrix.py
python tools/alignment_table.py results.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.marked_tables import write_page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "alignment_matrix.md"
_LOSSES = ("DPO", "KTO", "ORPO", "SimPO")
_LAYOUTS = ("one", "dp2", "tp2", "pp2", "sharding2 stage1", "sharding2 stage2")
_PRECISIONS = ("float32", "bf16")
_NUM_CASES = 240


def main() -> None:
    """Puts the table between the marks of the page."""
    write_page(PAGE, render)


def render(records: Iterable[Mapping[str, Any]]) -> str:
    """The table in Markdown, and above it what was run; of several runs of a case the last one counts."""
    cases = {tuple(record["case"]): record for record in records}
    faults = [
        f"- {' / '.join(case)}: {', '.join(found['faults'])}"
        for case, found in cases.items()
        if found["faults"]
    ]
    versions = f"paddlepaddle {version('paddlepaddle')}, paddlenlp {version('paddlenlp')}"
    lines = [
        f"{len(cases)} of {_NUM_CASES} cases were run, {len(faults)} with a fault. Made with {versions} on CPU processes.",
        *faults,
        "",
        f"| loss | family | precision | method | rows | {' | '.join(_LAYOUTS)} |",
        f"|---|---|---|---|---|{'---|' * len(_LAYOUTS)}",
    ]
    rows = sorted({case[:3] for case in cases}, key=_order)
    for row in rows:
        found = {layout: cases[(*row, layout)] for layout in _LAYOUTS if (*row, layout) in cases}
        first = next(iter(found.values()))
        start = [*row, first["method"], "packed" if first["packed"] else "padded"]
        cells = [_cell(found.get(layout)) for layout in _LAYOUTS]
        lines.append(f"| {' | '.join([*start, *cells])} |")
    return "\n".join(lines)


def _order(row: tuple[str, ...]) -> tuple[int, str, int]:
    return _LOSSES.index(row[0]), row[1], _PRECISIONS.index(row[2])


def _cell(record: Mapping[str, Any] | None) -> str:
    """The largest difference of losses, and that of all other figures."""
    if record is None:
        return "not run"
    differences = record["differences"]
    others = (value for name, value in differences.items() if name not in ("loss", "eval_rewards_accuracy"))
    return f"{differences['loss']:.0e} {max(others):.0e}"


if __name__ == "__main__":
    main()
