"""Full disks, permissions, address spaces and file sizes: what every command says, as real processes.

`pytest -m limits tests/limits`, about six minutes on two cores. With FINETUNE_LIMIT_RESULTS=<file> every case adds a line to
that file, from which `tools/limit_table.py` makes the tables in docs/robustness.md and its Chinese page.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from tests.limits.cases import CASES
from tests.limits.materials import Materials
from tests.limits.runs import run_case

pytestmark = [pytest.mark.limits]
RESULTS = os.environ.get("FINETUNE_LIMIT_RESULTS")


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return Materials(tmp_path_factory.mktemp("materials"))


def shorten(line: str, materials: Materials, home: Path) -> str:
    """A line without the places of this machine."""
    for folder in (home, materials.folder):
        line = line.replace(f"{folder}/", "").replace(str(folder), ".")
    return re.sub(r"on \S+ \(127\.0\.0\.1\)", "on host", line)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.group}, {case.name}".replace("/", "-"))
def test_it_ends_in_a_message(case, materials, tmp_path):
    end = run_case(case, materials, tmp_path)
    if end.is_impossible:
        pytest.skip(f"such surroundings cannot be made here: {end.text.strip()}")
    line = shorten(end.find_line(case.says), materials, tmp_path)
    if RESULTS:
        with Path(RESULTS).open("a", encoding="utf-8") as stream:
            record = {"group": case.group, "name": case.name, "name_zh": case.name_zh, "line": line}
            record |= {"code": end.code, "seconds": end.seconds, "traceback": end.has_traceback}
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    assert not end.has_traceback, end.text[-3000:]
    assert end.code == case.code, end.text[-3000:]
    assert re.search(case.says, line), end.text[-3000:]
