"""Relatives of LoRA and frozen parts in every family and layout: `pytest -m slow_distributed` on this file, 15 minutes.

With FINETUNE_RELATIVES_RESULTS=<file> every case adds a line to that file, from which `tools/relatives_table.py` makes the
table in the documentation; with FINETUNE_RELATIVES_CONTINUE=1 cases that stand there are skipped.
"""

from __future__ import annotations

import pytest

from tests.distributed.method_matrix import FAMILIES, PRECISIONS, STEPS, Matrix, list_cases

pytestmark = [pytest.mark.distributed, pytest.mark.slow_distributed]

# Method of the settings, and what is added to them.
KINDS = {
    "DoRA": ("lora", {"use_dora": True}),
    "VeRA": ("lora", {"vera": True, "vera_rank": 16, "lora": False}),
    "LoKr": ("lora", {"lokr": True, "lokr_dim": 2, "lokr_alpha": 4.0, "lora_dropout": 0.0}),
    "MosLoRA": ("lora", {"lora_use_mixer": True}),
    "PiSSA": ("lora", {"pissa": True}),
    "frozen half": ("sft", {"freeze_parameters_ratio": 0.5}),
}
CASES = list_cases(tuple(KINDS))


@pytest.fixture(scope="module")
def matrix():
    return Matrix("RELATIVES")


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_ten_steps_are_those_of_one_process(bench, matrix, case):
    kind, family, precision, _ = case
    method, own = KINDS[kind]
    packing = ("padded", "packed")[(list(KINDS).index(kind) + FAMILIES.index(family)) % 2]
    matrix.check(bench, case, bench.settings(family, method, packing) | STEPS | PRECISIONS[precision] | own)
