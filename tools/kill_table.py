"""Writes the tables in docs/kill_tests.md and docs/kill_tests_zh.md from the results of the kill tests.

FINETUNE_KILL_RESULTS=results.jsonl python -m pytest -m kill tests/kills
python tools/kill_table.py results.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.marked_tables import read_json_lines, replace_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
_SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
_WORDS = {
    "kill_tests.md": (
        "{kills} kills in {chains} chains, made with {versions} on CPU processes.",
        "| subject | kills | " + " | ".join(_SIGNALS) + " | one rank | at a named moment | digits different | "
        "steps lost | left behind | did not end | traceback |",
        "not run",
    ),
    "kill_tests_zh.md": (
        "共 {chains} 条链、{kills} 次终止，使用 {versions}，在 CPU 进程上进行。",
        "| 对象 | 终止次数 | " + " | ".join(_SIGNALS) + " | 仅一个 rank | 在指定时刻 | 数字不同 | 丢失的步 | 残留 | 未结束 | traceback |",
        "未运行",
    ),
}  # fmt: skip


def main() -> None:
    """Puts the table between the marks of both pages."""
    parser = argparse.ArgumentParser(description="Write the table of kills into docs/kill_tests.md and _zh.")
    parser.add_argument("results", type=Path, nargs="+", help="files written by tests/kills")
    arguments = parser.parse_args()
    records = list(read_json_lines(arguments.results))
    for name, words in _WORDS.items():
        replace_table(DOCS / name, render(records, *words))


def render(records: Iterable[Mapping[str, Any]], sentence: str, head: str, not_run: str) -> str:
    """The table in Markdown under a sentence on its size; of several runs of a chain the last one counts.

    A subject of which every chain was skipped has a row that says why.

    Args:
        records: Of kills and of ends, in the order of their making.
        sentence: With places for `kills`, `chains` and `versions`.
        head: The first line of the table.
        not_run: Stands in the row of a subject that was skipped, before the reason.
    """
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: dict[str, str] = {}
    chains = _last_chains(records)
    for (subject, _), chain in chains.items():
        for record in chain:
            if "skipped" in record:
                reasons[subject] = record["skipped"]
            else:
                rows[subject].update(_count(record))
    num_chains = sum(1 for chain in chains.values() if not any("skipped" in record for record in chain))
    versions = f"paddlepaddle {version('paddlepaddle')}, paddlenlp {version('paddlenlp')}"
    num_kills = sum(row["kills"] for row in rows.values())
    lines = [sentence.format(kills=num_kills, chains=num_chains, versions=versions), "", head]
    lines.append("|---" * (head.count("|") - 1) + "|")
    columns = ("kills", *_SIGNALS, "one", "named", "different", "lost", "orphans", "hung", "traceback")
    lines += [
        "| " + " | ".join([subject, *(str(row[column]) for column in columns)]) + " |"
        for subject, row in rows.items()
    ]
    empty = " |" * (len(columns) - 1)
    lines += [
        f"| {subject} | {not_run}: {why} |{empty}" for subject, why in reasons.items() if subject not in rows
    ]
    return "\n".join(lines)


def _last_chains(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    chains: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for record in records:
        key = record["subject"], record["seed"]
        if key not in chains or record.get("kill") == 1 or "skipped" in record or _is_last(chains[key][-1]):
            chains[key] = []
        chains[key].append(record)
    return chains


def _is_last(record: Mapping[str, Any]) -> bool:
    return record.get("end", False) or "skipped" in record


def _count(record: Mapping[str, Any]) -> dict[str, int]:
    faults = {name: int(record.get(name, 0)) for name in ("orphans", "hung", "traceback")}
    if record.get("end"):
        return faults | {"different": len(record["different"])}
    return faults | {
        "kills": 1,
        record["signal"]: 1,
        "one": int(record["rank"] != "all"),
        "named": int(record["moment"] != "at random"),
        "lost": record["lost_steps"],
    }


if __name__ == "__main__":
    main()
