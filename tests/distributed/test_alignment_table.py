"""The table of the matrix of preference methods says what was run, what was not, and what was wrong."""

from tests.distributed.method_matrix import FAMILIES, PLACES
from tests.distributed.test_preference_matrix import CASES, LOSSES, method_of
from tools.alignment_table import _LAYOUTS, _LOSSES, _NUM_CASES, _PRECISIONS, render


def record(method, family, precision, layout, faults=(), **differences):
    apart = {"loss": 2e-7, "grad_norm": 3e-6, "eval_rewards_accuracy": 1.0} | differences
    case = {"case": [method, family, precision, layout], "method": "lora", "packed": True}
    return case | {"differences": apart, "faults": list(faults)}


def test_the_table_tells_what_was_run_and_what_failed():
    table = render(
        [
            record("KTO", "opt", "bf16", "dp2", faults=["loss is 9.0e-01"], loss=0.9),
            record("DPO", "llama", "float32", "tp2", faults=["loss is 1.0e-02"], loss=0.01),
            record("DPO", "llama", "float32", "tp2"),
        ]
    )
    lines = table.splitlines()
    assert lines[0].startswith(f"2 of {_NUM_CASES} cases were run, 1 with a fault.")
    assert lines[1] == "- KTO / opt / bf16 / dp2: loss is 9.0e-01"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[5:]]
    assert rows == [
        ["DPO", "llama", "float32", "lora", "packed", "not run", "not run", "2e-07 3e-06", *["not run"] * 3],
        ["KTO", "opt", "bf16", "lora", "packed", "not run", "9e-01 3e-06", *["not run"] * 4],
    ]


def test_the_table_has_a_place_for_every_case():
    assert len(LOSSES) * len(FAMILIES) * len(_PRECISIONS) * len(PLACES) == _NUM_CASES
    assert (tuple(LOSSES), tuple(PLACES)) == (_LOSSES, _LAYOUTS)
    assert {case[2] for case in CASES} <= set(_PRECISIONS)
    spread = {
        method_of(loss, family, precision)
        for loss in LOSSES
        for family in FAMILIES
        for precision in _PRECISIONS
    }
    assert len(spread) == 6, "every method with packed and with padded rows"
