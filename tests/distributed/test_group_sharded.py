"""Why sharding stages 2 and 3 are not Fleet's: what its classes do on real processes, where they are right and where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import launch_script

WORKER = Path(__file__).with_name("group_sharded_worker.py")
pytestmark = pytest.mark.distributed
Results = dict[str, dict[str, Any]]
RIGHT = {"plain": {}, "LoRA": {"lora": True}}
MORE = {
    "a rank without samples": {"idle_step": 2},
    "tied": {"tied": True},
    "recompute": {"recompute": True},
    "one micro-batch": {"num_micro_batches": 2},
    "unequal shares": {"num_micro_batches": 3},
    "resumed": {"resumes_at": 3},
}
HALF = {
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, master gradients": {"dtype": "bfloat16", "master": True},
    "float16, scaled": {"dtype": "float16", "scaler": True},
}


def of_stages(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        f"stage {stage}, {name}": case | {"stage": stage} for stage in (2, 3) for name, case in cases.items()
    }


def run(folder: Path, cases: dict[str, dict[str, Any]], *, num_processes: int = 2) -> Results:
    """What the first rank of a launch measured; every rank has the same losses, norms and weights."""
    (folder / "cases.json").write_text(json.dumps(cases))
    launch_script(WORKER, num_processes, [str(folder), str(folder / "cases.json")], timeout=240).check()
    return json.loads((folder / "results.0.json").read_text())


def assert_like_one_process(results: Results, names: dict[str, Any]) -> None:
    for name in names:
        facts = results[name]
        assert max(facts["loss"], facts["norm"], facts["weight"]) < 5e-6, (name, facts)


WRONG = {
    "unused": {"stage": 2, "unused": True},
    "overlap": {"stage": 2, "overlaps": True},
    "overlap, waiting": {"stage": 2, "overlaps": True, "waits": True},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    return run(tmp_path_factory.mktemp("group_sharded"), of_stages(RIGHT) | WRONG)


def test_plain_runs_have_the_curve_of_one_process(results):
    assert_like_one_process(results, of_stages(RIGHT))


def test_stage_2_loses_the_gradients_of_a_bucket_that_waits_for_one_more(results):
    """A parameter without gradient keeps all others of its owner from being reduced; no error tells."""
    assert results["unused"]["norm"] > 0.1 and results["unused"]["weight"] > 0.1


def test_stage_2_reduces_into_memory_that_the_next_backward_pass_adds_to(results):
    """With its overlap nobody waits in between: what is right depends on which of them is faster."""
    assert results["overlap"]["norm"] > 0.05
    assert_like_one_process(results, {"overlap, waiting": None})


def test_stage_2_has_memory_for_all_gradients_when_a_backward_pass_begins(results):
    facts = results["stage 2, plain"]
    assert facts["num_gradients_held"] == facts["num_parameters"]


def test_stage_3_keeps_frozen_weights_whole(results):
    """Weights are freed in the hook that reduces their gradient; frozen ones have none."""
    plain, adapter = results["stage 3, plain"], results["stage 3, LoRA"]
    assert plain["num_held"] < 0.02 * plain["num_parameters"]  # norms
    assert adapter["num_held"] > 0.8 * adapter["num_parameters"]


@pytest.mark.slow_distributed
@pytest.mark.parametrize("num_processes", [2, 4])
def test_more_runs_have_the_curve_of_one_process(tmp_path, num_processes):
    cases = of_stages(MORE)
    assert_like_one_process(run(tmp_path, cases, num_processes=num_processes), cases)


@pytest.mark.slow_distributed
def test_half_precision_is_within_its_rounding(tmp_path):
    for name, facts in run(tmp_path, of_stages(HALF)).items():
        assert facts["loss"] < (5e-3 if "bfloat16" in name else 1e-4), (name, facts)
