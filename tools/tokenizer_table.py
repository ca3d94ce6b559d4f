"""Writes the table of docs/tokenizers.md and docs/tokenizers_zh.md from the results of the last comparison of ids.

python -m tests.reference.tokenizer_parity DATA... --results results.jsonl
python tools/tokenizer_table.py results.jsonl
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
PAGES = {DOCS / "tokenizers.md": ("family", "vocabulary", "read by", "lines", "tokens", "template", "data", "data, special tokens as text"),
         DOCS / "tokenizers_zh.md": ("家族", "词表", "读取方式", "行数", "词元数", "模板文本", "数据", "数据（特殊词元按文本）")}  # fmt: skip
_FORMS = ("template", "data", "split")


def main() -> None:
    """Puts the table between the marks of both pages."""
    parser = argparse.ArgumentParser(description="Write the table of docs/tokenizers.md.")
    parser.add_argument(
        "results", type=Path, nargs="+", help="files written by tests.reference.tokenizer_parity"
    )
    records = list(read_json_lines(parser.parse_args().results))
    for page, heads in PAGES.items():
        replace_table(page, render(records, heads))


def render(records: Iterable[Mapping[str, Any]], heads: Iterable[str]) -> str:
    """A row for each family and reader, with the lines whose ids differ; of several runs of a case the last counts."""
    latest = {(each["family"], each["vocabulary"], each["reader"]): each for each in records}
    rows = [list(heads)]
    rows.append(["---"] * 3 + ["---:"] * 5)
    for (family, vocabulary, reader), record in sorted(latest.items()):
        counts = [f"{record['different'][form]}" for form in _FORMS]
        rows.append([family, vocabulary, reader, f"{record['lines']:,}", f"{record['tokens']:,}", *counts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
