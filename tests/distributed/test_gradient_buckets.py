"""Plain replicas of real processes: sums that begin early have the bits of sums that do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.processes import launch_script

pytestmark = pytest.mark.distributed


def test_early_sums_change_no_bit(tmp_path):
    launch_script(Path(__file__).with_name("buckets_worker.py"), 2, [str(tmp_path)], timeout=120).check()
    for rank in range(2):
        results = json.loads((tmp_path / f"results.{rank}.json").read_text())
        assert results.pop("beside") is True
        assert results.keys() == {"plain", "reentrant", "adapter"}
        for name, facts in results.items():
            assert facts["differing"] == [], name
            assert facts["num_early"] == [1, 0], name  # one bucket holds all of the toy
