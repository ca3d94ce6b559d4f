"""Writes the table of docs/relatives_matrix.md from the results of the matrix of LoRA's relatives and frozen parts.

FINETUNE_RELATIVES_RESULTS=results.jsonl python -m pytest -m slow_distributed tests/distributed/test_relatives_matrix.py
python tools/relatives_table.py results.jsonl
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.marked_tables import write_page
from tools.quantised_table import render

PAGE = Path(__file__).resolve().parents[1] / "docs" / "relatives_matrix.md"
NUM_CASES = 180


def main() -> None:
    """Puts the table between the marks of the page."""
    write_page(PAGE, lambda records: render(records, first="method", num_cases=NUM_CASES))


if __name__ == "__main__":
    main()
