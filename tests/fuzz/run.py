"""Feeds damaged files to the commands of this project, and says how each ended.

python -m tests.fuzz.run --results results.json                            # everything: about two hours
python -m tests.fuzz.run --target "data files" --cases 500 --folder CASES   # one kind; faults stay in the folder
python tools/robustness_table.py results.json                                # the table of docs/robustness.md

A run with the same seed draws the same cases.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "PPNLP_ENDPOINT": "http://127.0.0.1:9",
    "OMP_NUM_THREADS": "1",
}

from finetune.machine.processor import configure_processor

configure_processor()  # before anything imports Paddle

from tests.fuzz.runner import Target, run_target  # noqa: E402
from tests.fuzz.targets import TARGETS  # noqa: E402

MAX_SHOWN = 20
_NUMBERS = re.compile(r"\d+")


def main() -> int:
    """Runs what the command line names; 1 where a case ended in a fault."""
    parser = argparse.ArgumentParser(description="Feed damaged files to the commands of this project.")
    parser.add_argument(
        "--target", choices=[target.name for target in TARGETS], action="append", help="one kind (all)"
    )
    parser.add_argument("--cases", type=int, help="of each kind (as many as a whole run has)")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch (0)")
    parser.add_argument("--results", type=Path, help="JSON file that results are added to")
    parser.add_argument("--folder", type=Path, help="where cases lie, which must not exist (a temporary one)")
    parser.add_argument("--messages", action="store_true", help="show what was said most often, too")
    options = parser.parse_args()
    code = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "cases"
        os.environ["XDG_CACHE_HOME"] = os.environ["HOME"] = temporary
        for target in TARGETS:
            if options.target and target.name not in options.target:
                continue
            place = folder / target.name.replace(" ", "_")
            record = run(
                target, options.cases or target.num_cases, options.seed, place, messages=options.messages
            )
            code = code or int(record["faults"] > 0)
            if options.results:
                _add(options.results, record)
    return code


def run(target: Target, num_cases: int, seed: int, folder: Path, *, messages: bool = False) -> dict[str, Any]:
    """Runs one kind and tells its faults."""
    said: Counter[str] = Counter()
    began, slowest, shown = time.monotonic(), 0.0, 0
    ends: Counter[str] = Counter()
    for outcome in run_target(target, num_cases, seed, folder):
        ends[outcome.end] += 1
        said.update(_NUMBERS.sub("#", line)[:150] for line in outcome.said.splitlines())
        slowest = max(slowest, outcome.seconds)
        if outcome.is_fault and (shown := shown + 1) <= MAX_SHOWN:
            print(
                f"{target.name} {outcome.number}: {outcome.end} after {outcome.seconds} s\n{outcome.said}",
                flush=True,
            )
    if messages:
        print("\n".join(f"{count:6} {line}" for line, count in said.most_common(60)))
    seconds = time.monotonic() - began
    record = {"name": target.name, "cases": ends.total(), "seed": seed, "ends": dict(ends), "slowest": slowest,
              "seconds": round(seconds), "faults": sum(count for end, count in ends.items() if end not in "012")}  # fmt: skip
    print(json.dumps(record), flush=True)
    return record


def _add(path: Path, record: dict[str, Any]) -> None:
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    records = [each for each in records if (each["name"], each["seed"]) != (record["name"], record["seed"])]
    path.write_text(json.dumps([*records, record], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
