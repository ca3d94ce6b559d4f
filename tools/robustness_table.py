"""Writes the table of docs/robustness.md and docs/robustness_zh.md from the results of a run of damaged files.

FINETUNE_FUZZ_RESULTS=results.json python -m pytest -m fuzz tests/fuzz
python tools/robustness_table.py results.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.marked_tables import replace_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
_ENDS = ("0", "2", "1")
_HEADS = {
    "robustness.md": ("kind", "cases", "0: accepted", "2: refused", "1: failed", "faults", "slowest, s"),
    "robustness_zh.md": ("种类", "用例数", "0：接受", "2：拒绝", "1：失败", "缺陷", "最慢（秒）"),
}
_NAMES_ZH = {
    "argument files": "参数文件",
    "data files": "数据文件",
    "model folders": "模型目录",
    "adapter folders": "适配器目录",
    "checkpoints": "检查点",
    "pickles": "pickle 文件",
    "templates": "对话模板",
}

Record = Mapping[str, Any]


def main() -> None:
    """Puts the table between the marks of both pages."""
    parser = argparse.ArgumentParser(
        description="Write the table of docs/robustness.md and docs/robustness_zh.md."
    )
    parser.add_argument("results", type=Path, nargs="+", help="files written by tests/fuzz")
    parser.add_argument("--folder", type=Path, default=DOCS, help="where the pages lie (docs)")
    arguments = parser.parse_args()
    records = [each for path in arguments.results for each in json.loads(path.read_text(encoding="utf-8"))]
    for name in _HEADS:
        replace_table(arguments.folder / name, render(records, name))


def render(records: Iterable[Record], page: str) -> str:
    """The table in Markdown, one row for each kind; runs of several seeds are added up.

    Args:
        records: One for each kind and seed.
        page: Name of the page, which decides the language.
    """
    kinds: dict[str, list[Record]] = {}
    for record in records:
        kinds.setdefault(record["name"], []).append(record)
    heads = _HEADS[page]
    rows = [_row(name, group, page) for name, group in kinds.items()]
    lines = [heads, ("---", *["---:"] * (len(heads) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(name: str, group: Sequence[Record], page: str) -> tuple[str, ...]:
    ends: Counter[str] = Counter()
    for record in group:
        ends.update(record["ends"])
    faults = ends.total() - sum(ends[end] for end in _ENDS)
    counts = [ends.total(), *(ends[end] for end in _ENDS), faults]
    shown = _NAMES_ZH[name] if page.endswith("_zh.md") else name
    return shown, *(f"{count:,}" for count in counts), f"{max(record['slowest'] for record in group):.1f}"


if __name__ == "__main__":
    main()
