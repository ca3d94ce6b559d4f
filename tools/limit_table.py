"""Writes the table of limits in docs/robustness.md and docs/robustness_zh.md from what real processes said.

FINETUNE_LIMIT_RESULTS=limits.jsonl python -m pytest -m limits tests/limits
python tools/limit_table.py limits.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.marked_tables import read_json_lines, replace_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
_HEADS = {
    "robustness.md": ("what is in the way", "command and place", "the line", "code", "seconds"),
    "robustness_zh.md": ("遇到的问题", "命令与位置", "显示的一行", "退出码", "秒"),
}
_GROUPS_ZH = {
    "full disk": "磁盘已满",
    "permission": "没有权限",
    "address space": "地址空间限制",
    "file size": "文件大小限制",
}
_MAX_CHARS = 220


def main() -> None:
    """Puts the table between its marks in both pages."""
    parser = argparse.ArgumentParser(description="Write the table of limits into docs/robustness.md and _zh.")
    parser.add_argument("results", type=Path, nargs="+", help="files written by tests/limits")
    arguments = parser.parse_args()
    records = list(read_json_lines(arguments.results))
    for name in _HEADS:
        replace_table(DOCS / name, render(records, name), "limits")


def render(records: Iterable[Mapping[str, Any]], page: str) -> str:
    """The table in Markdown; of several runs of a case the last one counts.

    Args:
        records: One for each case and run.
        page: Name of the page, which decides the language.
    """
    last = {(record["group"], record["name"]): record for record in records}
    heads = _HEADS[page]
    lines = [heads, ("---", "---", "---", "---:", "---:")]
    for record in sorted(last.values(), key=lambda each: list(_GROUPS_ZH).index(each["group"])):
        is_chinese = page.endswith("_zh.md")
        group = _GROUPS_ZH[record["group"]] if is_chinese else record["group"]
        place = record["name_zh"] if is_chinese else record["name"]
        line = (
            record["line"] if len(record["line"]) <= _MAX_CHARS else record["line"][: _MAX_CHARS - 3] + "..."
        )
        code = "-" if record["code"] is None else str(record["code"])
        text = line.replace("|", "\\|").replace("`", "'")
        lines.append((group, place, f"`{text}`" if text else "", code, f"{record['seconds']:.1f}"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
