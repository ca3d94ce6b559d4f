"""What runs in half precision leave: evaluated in both ways, and merged into one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.distributed.layouts import METHODS
from tests.distributed.precisions import NUM_DEV, NUM_STEPS, SAVED, TOLERANCES, Case, PrecisionBench

TRAINED = {"sft": "model_name_or_path", "lora": "lora_path", "pt": "prefix_path"}
"""Setting that takes what a method leaves behind."""
_GENERATION = {"eval_with_do_generation": True, "max_new_tokens": 4, "save_generation_output": True}
_MERGED_BY_RANK = ("sft", "lora")  # a prefix is one file whatever the layout


def measure_final(bench: PrecisionBench, family: str, method: str, precision: str) -> dict[str, Any]:
    """Evaluates and merges what one process and two tensor-parallel ranks left.

    Returns:
        Differences of evaluation losses: `final` (the final folder, from the run's last evaluation), `learned` (the
        last evaluation, from the one in the middle), for LoRA `merged` (the merged model, from the adapter), `ranks` (the
        merged files of ranks, from their run's last evaluation); and `num_generated`, the number of answers that were written.
    """
    one = bench.one(Case(family, method, precision, "one"))
    evaluations = one.curve()["eval_loss"]
    expected = evaluations[NUM_STEPS]
    found: dict[str, Any] = {
        "final": _distance(_loss(bench, family, method, precision, one.folder), expected),
        "learned": _distance(evaluations[SAVED], expected),
    }

    answers = _evaluate(bench, family, method, precision, one.folder, **_GENERATION)
    lines = (answers / "generated_output.json").read_text(encoding="utf-8").splitlines()
    found["num_generated"] = len(lines)

    if method == "lora":
        merged = bench.folder / "merged" / f"{family}-{precision}"
        options = ["--model_name_or_path", bench.model(family), "--lora_path", one.folder]
        bench.server.run_script("merge_lora_params", [*options, "--merge_model_path", merged], merged).check()
        found["merged"] = _distance(_loss(bench, family, "sft", precision, merged), expected)
    if method in _MERGED_BY_RANK:
        run = bench.first_run(Case(family, method, precision, "tp2"))
        whole = bench.folder / "whole" / f"{family}-{method}-{precision}"
        checkpoint = run.folder / f"checkpoint-{NUM_STEPS}"
        assert len(list(checkpoint.glob("*.tp0[01].pdparams"))) == 2, sorted(checkpoint.iterdir())
        options = ["--model_name_or_path", checkpoint, "--output_dir", whole]
        bench.server.run_script("merge_tp_params", options, whole).check()
        expected = run.curve()["eval_loss"][NUM_STEPS]
        found["ranks"] = _distance(_loss(bench, family, method, precision, whole), expected)
    return found


def faults_of_final(found: dict[str, Any], precision: str) -> list[str]:
    """What of these measurements is not as it should be."""
    faults = [] if found["num_generated"] == NUM_DEV else [f"{found['num_generated']} answers"]
    if found["final"]:
        faults.append(f"the final folder evaluates {found['final']:.1e} from the run")
    limit = TOLERANCES[precision[:4]]["eval_loss"]
    # An adapter that did nothing would merge well, too: what it learned must be more than a merge may be away by, or
    # by far more than this one is (a model that divides its logits learns slowly).
    if "merged" in found and found["learned"] <= min(limit, 10 * found["merged"]):
        faults.append(f"the adapter learned {found['learned']:.1e}")
    return faults + [
        f"{name}: eval_loss is {found[name]:.1e} away"
        for name in ("merged", "ranks")
        if found.get(name, 0) > limit
    ]


def _distance(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected)


def _loss(bench: PrecisionBench, family: str, method: str, precision: str, folder: Path) -> float:
    results = _evaluate(bench, family, method, precision, folder) / "all_results.json"
    return float(json.loads(results.read_text(encoding="utf-8"))["eval_loss"])


def _evaluate(
    bench: PrecisionBench, family: str, method: str, precision: str, folder: Path, **more: Any
) -> Path:
    """Evaluates a folder in one process; the output folder of that."""
    assert method in METHODS
    settings = bench.settings(family, method, precision) | {"do_train": False, TRAINED[method]: str(folder)}
    return bench.server.run(settings | more).check().folder
