"""Writes the tables of docs/memory.md and docs/memory_zh.md: peaks predicted by `plan`, and measured.

python tools/memory_table.py

Every case builds a model, plans a run and tries it on its longest rows; together they take some minutes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.end_to_end.memory_cases import MemoryCase, MemoryResult, results
from tools.marked_tables import replace_table

DOCS = Path(__file__).resolve().parents[1] / "docs"

_HEADERS = {
    "memory.md": ("model", "run", "parameters", "micro-batch", "predicted", "measured", "difference"),
    "memory_zh.md": ("模型", "运行", "参数", "微批", "预测", "实测", "相差"),
}
_RUNS = {
    "full, packed rows, two micro-batches": "全参，拼满的行，两个微批",
    "LoRA, one micro-batch": "LoRA，一个微批",
    "full, recomputed, padded rows": "全参，重计算，补齐的行",
    "full, padded rows": "全参，补齐的行",
    "full, experts, packed rows": "全参，专家模型，拼满的行",
}
_GIBIBYTE = 1 << 30


def main() -> None:
    """Runs the cases and puts what came out between the marks of both pages."""
    with tempfile.TemporaryDirectory() as folder:
        found = list(results(Path(folder)))
    for page, header in _HEADERS.items():
        replace_table(DOCS / page, render(found, header, is_chinese=page.endswith("_zh.md")))


def render(
    found: Iterable[tuple[MemoryCase, MemoryResult]], header: Sequence[str], *, is_chinese: bool = False
) -> str:
    """The table in Markdown.

    Args:
        found: Cases with what they gave.
        header: Titles of the columns.
        is_chinese: Whether the runs are named in Chinese.
    """
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for case, result in found:
        rows, length = result.micro_batch
        sizes = [f"{size / _GIBIBYTE:.3f} GiB" for size in (result.predicted, result.measured)]
        cells = [
            case.family,
            _RUNS[case.name] if is_chinese else case.name,
            f"{result.parameters / 1e6:.1f} M",
            f"{rows} x {length}",
            *sizes,
            f"{result.difference:+.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    made = f"paddlepaddle {version('paddlepaddle')}, paddlenlp {version('paddlenlp')}, CPU"
    return "\n".join([*lines, "", f"({made})"])


if __name__ == "__main__":
    main()
