"""The bench on which runs of many layouts are compared, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.layouts import Bench, open_bench
from tests.distributed.precisions import PrecisionBench


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Iterator[Bench]:
    with open_bench(tmp_path_factory.mktemp("bench")) as bench:
        yield bench


@pytest.fixture(scope="session")
def precision_bench(bench, tmp_path_factory) -> PrecisionBench:
    return PrecisionBench(tmp_path_factory.mktemp("precisions"), bench.server)
