"""The tests of this folder run with half precision on CPU, and leave the process without it."""

from __future__ import annotations

import pytest

from finetune.machine import half_precision


@pytest.fixture(autouse=True, scope="module")
def _half_precision():
    with half_precision.half_precision_on_cpu():
        yield
    assert not half_precision.is_installed()
