"""The tables that are made of the results of the precision matrix."""

from __future__ import annotations

import json

from tests.conftest import ROOT, launch

FIGURES = {"loss": 1e-4, "grad_norm": 2e-3, "eval_loss": 3e-5}
CASE = {
    "family": "llama",
    "method": "sft",
    "precision": "bf16 O2",
    "layout": "dp2",
    "commit": "abc",
    "seconds": 9.0,
}
FORMS = {name: FIGURES for name in ("one", "float32", "other")} | {"resumed": dict.fromkeys(FIGURES, 0.0)}


def make_page(tmp_path, records: list[dict]) -> str:
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    results.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    page.write_text("head\n<!-- table: begin -->\nstale words\n<!-- table: end -->\ntail\n", encoding="utf-8")
    done = launch(ROOT / "tools" / "precision_table.py", results, "--page", page)
    assert done.returncode == 0, done.stderr
    return page.read_text(encoding="utf-8")


def test_figures_stand_in_their_cells(tmp_path):
    larger = FORMS | {"one": FIGURES | {"loss": 5e-4}, "killed": dict.fromkeys(FIGURES, 0.0)}
    text = make_page(
        tmp_path,
        [
            CASE | FORMS | {"faults": ["of an earlier run"]},
            CASE | FORMS | {"faults": []},
            CASE | larger | {"family": "opt", "faults": []},
            CASE | {"layout": "tp2", "faults": ["the run failed\nwith many lines"]},
            CASE | {"layout": "final folder", "final": 0.0, "ranks": 7e-6, "num_generated": 4, "faults": []},
        ],
    )
    assert text.startswith(
        "head\n<!-- table: begin -->\n3 of 4 recorded cases are within the bounds; 2 runs were resumed and 1 killed"
    )
    assert text.endswith("<!-- table: end -->\ntail\n")
    assert "stale words" not in text and "of an earlier run" not in text
    assert "- llama sft bf16 O2 tp2: the run failed\n" in text
    forms = "1e-04 / 2e-03 / 3e-05"
    assert f"| bf16 O2 | dp2 | 2 | 5e-04 / 2e-03 / 3e-05 | {forms} | 0 / 0 / 0 | {forms} |" in text
    assert "| llama | sft | bf16 O2 | 1e-04 |  |  |  |  |  |  | 1e-04 | 1e-04 |" in text
    assert "| opt | sft | bf16 O2 | 5e-04 |" in text
    assert "| bf16 O2 | 1 |  | 7e-06 |" in text
    assert "commit abc" in text


def test_figures_are_judged_by_the_bounds_of_today(tmp_path):
    beyond = FORMS | {"one": FIGURES | {"grad_norm": 5e-2}}
    text = make_page(
        tmp_path,
        [
            CASE | beyond | {"faults": []},
            CASE | beyond | {"family": "mixtral", "method": "pt", "faults": ["a bound of that time"]},
            CASE | {"layout": "final folder", "final": 1e-3, "num_generated": 4, "faults": []},
        ],
    )
    assert "1 of 3 recorded cases are within the bounds" in text
    assert "- llama sft bf16 O2 dp2: one: grad_norm is 5.0e-02 from one process\n" in text
    assert "- llama sft bf16 O2 final folder: the final folder evaluates 1.0e-03 from the run" in text
    assert "a bound of that time" not in text
