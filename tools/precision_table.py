"""Writes the tables of docs/half_precision_matrix.md from the results of the last full run of the matrix.

FINETUNE_PRECISION_RESULTS=results.jsonl python -m pytest -m slow_distributed tests/distributed/test_precision_matrix.py
python tools/precision_table.py results.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.distributed.precision_finals import faults_of_final
from tests.distributed.precisions import faults_of
from tools.marked_tables import read_json_lines, replace_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "half_precision_matrix.md"
FINAL = "final folder"
_LAYOUTS = (
    "one", "dp2", "tp2", "pp2", "sharding2 stage1", "sharding2 stage2", "sharding2 stage3", "tp2 x pp2",
)  # fmt: skip
_FIGURES = ("loss", "grad_norm", "eval_loss")

Record = Mapping[str, Any]


def main() -> None:
    """Puts the tables between the marks of the page."""
    parser = argparse.ArgumentParser(description="Write the tables of docs/half_precision_matrix.md.")
    parser.add_argument("results", type=Path, nargs="+", help="files written by the matrix")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page (docs/half_precision_matrix.md)")
    arguments = parser.parse_args()
    replace_table(arguments.page, render(read_json_lines(arguments.results)))


def render(records: Iterable[Record]) -> str:
    """The tables in Markdown, and above them what they were made with; of several runs of a case the last counts."""
    latest = {_key(record): _judge(record) for record in records}
    cases = [record for record in latest.values() if record["layout"] != FINAL]
    finals = [record for record in latest.values() if record["layout"] == FINAL]
    parts = [
        _summary(list(latest.values())),
        _faults(list(latest.values())),
        "### By precision and layout",
        "Loss / norm of the gradient / loss of an evaluation, each the largest difference over families and methods.",
        _by_layout(cases),
        "### By family, method and precision",
        "The largest difference of a step's loss from one process in the same precision; in the last columns from "
        "float32 over all layouts, and after resuming in another layout.",
        _by_training(cases),
        "### Final folders",
        "The largest difference of an evaluation's loss over families and methods: a LoRA adapter merged into its "
        "base, from the adapter; files of two tensor-parallel ranks merged, from their own run.",
        _of_finals(finals),
    ]
    return "\n\n".join(part for part in parts if part)


def _key(record: Record) -> tuple[str, ...]:
    return record["family"], record["method"], record["precision"], record["layout"]


def _judge(record: Record) -> Record:
    """The record with its faults by the bounds of today; one without figures keeps why it has none."""
    figures, precision = dict(record), record["precision"]
    if "final" in record:
        return figures | {"faults": faults_of_final(figures, precision)}
    if "one" in record:
        return figures | {"faults": faults_of(figures, precision, record["family"], record["method"])}
    return record


def _summary(records: Sequence[Record]) -> str:
    measured = [record for record in records if not record["faults"]]
    commits = sorted({record["commit"] for record in records if record["commit"]})
    exact = [form for record in records for form in ("resumed", "killed") if form in record]
    versions = f"paddlepaddle {version('paddlepaddle')}, paddlenlp {version('paddlenlp')}"
    hours = sum(record["seconds"] for record in records) / 3600
    return (
        f"{len(measured)} of {len(records)} recorded cases are within the bounds; {exact.count('resumed')} runs were resumed "
        f"and {exact.count('killed')} killed and started again. Made with {versions} on CPU processes"
        f"{', commit ' + ', '.join(commits) if commits else ''}, in {hours:.1f} hours of runs."
    )


def _faults(records: Sequence[Record]) -> str:
    return "\n".join(
        f"- {' '.join(_key(record))}: {'; '.join(record['faults']).splitlines()[0]}"
        for record in sorted(records, key=_key)
        if record["faults"]
    )


def _by_layout(cases: Sequence[Record]) -> str:
    rows = [
        ["precision", "layout", "cases", "from one process", "from float32", "resumed", "in another layout"]
    ]
    places = {(record["precision"], record["layout"]) for record in cases}
    for precision, layout in sorted(places, key=lambda place: (place[0], _LAYOUTS.index(place[1]))):
        chosen = [case for case in cases if (case["precision"], case["layout"]) == (precision, layout)]
        forms = [_figures(chosen, form) for form in ("one", "float32", "resumed", "other")]
        rows.append([precision, layout, str(len(chosen)), *forms])
    return _table(rows)


def _figures(cases: Sequence[Record], form: str) -> str:
    return " / ".join(_largest(cases, form, name) for name in _FIGURES)


def _by_training(cases: Sequence[Record]) -> str:
    rows = [["family", "method", "precision", *_LAYOUTS[1:], "float32", "another layout"]]
    for training in sorted({_key(case)[:3] for case in cases}):
        chosen = [case for case in cases if _key(case)[:3] == training]
        cells = [
            _largest([case for case in chosen if case["layout"] == layout], "one", "loss")
            for layout in _LAYOUTS[1:]
        ]
        cells += [_largest(chosen, form, "loss") for form in ("float32", "other")]
        rows.append([*training, *cells])
    return _table(rows)


def _of_finals(finals: Sequence[Record]) -> str:
    rows = [["precision", "cases", "adapter merged", "ranks merged"]]
    for precision in sorted({record["precision"] for record in finals}):
        chosen = [record for record in finals if record["precision"] == precision]
        forms = [_largest(chosen, form) for form in ("merged", "ranks")]
        rows.append([precision, str(len(chosen)), *forms])
    return _table(rows)


def _largest(records: Sequence[Record], *names: str) -> str:
    """The largest figure under these names; "" where no record has it, as when each failed before it came to that."""
    found = [figure for figure in (_figure(record, *names) for record in records) if figure is not None]
    return (f"{max(found):.0e}" if max(found) else "0") if found else ""


def _figure(record: Record, *names: str) -> float | None:
    value: Any = record
    for name in names:
        value = value.get(name, {})
    return value if isinstance(value, float) else None


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main()
