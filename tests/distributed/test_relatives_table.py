"""The table of LoRA's relatives has a place for every case of its matrix."""

from tests.distributed.method_matrix import FAMILIES, PLACES, PRECISIONS
from tests.distributed.test_relatives_matrix import CASES, KINDS
from tools.quantised_table import _LAYOUTS, render
from tools.relatives_table import NUM_CASES


def test_every_case_has_a_place_and_every_pair_meets_both_precisions():
    assert len(set(CASES)) == len(KINDS) * len(FAMILIES) * len(PLACES) == NUM_CASES
    assert tuple(PLACES) == _LAYOUTS
    for first in KINDS:
        for family in FAMILIES:
            assert {case[2] for case in CASES if case[:2] == (first, family)} == set(PRECISIONS)


def test_the_table_counts_what_was_run():
    records = [
        {"case": ["DoRA", "llama", "float32", "one"], "differences": {"loss": 2e-7}, "faults": []},
        {
            "case": ["VeRA", "opt", "bfloat16", "tp2"],
            "differences": {"loss": 0.5},
            "faults": ["loss is 5.0e-01"],
        },
    ]
    lines = render(records, first="method", num_cases=NUM_CASES).splitlines()
    assert lines[0].startswith("2 of 180 cases were run, 1 with a fault.")
    assert lines[1] == "- VeRA / opt / bfloat16 / tp2: loss is 5.0e-01"
    assert lines[3].startswith("| method | family | one | dp2 |")
    assert lines[-2:] == [
        "| DoRA | llama | 2e-07 | not run | not run | not run | not run | not run |",
        "| VeRA | opt | not run | not run | bf16 5e-01 | not run | not run | not run |",
    ]
