"""Every way of sharing out the data axis trains as one process does, and spares the memory that it promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import launch_script

WORKER = Path(__file__).with_name("replicas_worker.py")
pytestmark = pytest.mark.distributed
NUM_LAYERS, NUM_UNITS, STEPS = 2, 3, 5
ADAPTER = ", adapter"
Results = list[dict[str, Any]]


def run(folder: Path, *, data: int, sharding: int) -> Results:
    """What each rank of a layout measured."""
    num_processes = data * sharding
    launch_script(WORKER, num_processes, [str(data), str(sharding), str(folder)], timeout=120).check()
    return [json.loads((folder / f"results.{rank}.json").read_text()) for rank in range(num_processes)]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    """One launch for all tests of two processes."""
    return run(tmp_path_factory.mktemp("replicas"), data=1, sharding=2)


def cases(results: Results, *, stages: tuple[int, ...] = (0, 1, 2, 3)) -> list[tuple[str, dict[str, Any]]]:
    chosen = [
        (name, facts)
        for result in results
        for name, facts in result.items()
        if name.startswith(tuple(f"stage {stage}" for stage in stages))
    ]
    assert chosen
    return chosen


def assert_like_one_process(results: Results) -> None:
    for name, facts in cases(results):
        assert max(facts["errors"].values()) < 1e-6, (name, facts["errors"])
        assert facts["norm_error"] < 1e-6, name
        assert facts["moved"] > 0.05, name  # or the comparison would say nothing
        assert len(facts["norms"]) == STEPS and max(facts["norms"]) > 0.4 > min(facts["norms"]), name
    assert all(result["replicas only"] < 1e-6 for result in results)


def test_weights_and_norms_equal_one_process(results):
    assert_like_one_process(results)


def test_a_parameter_without_gradient_is_left_alone(results):
    for name, facts in cases(results):
        assert facts["errors"]["unused"] == 0, name


def test_gradients_are_freed(results):
    for name, facts in cases(results):
        assert facts["left"] == [], name


def test_moments_are_shared_out(results):
    for name, facts in cases(results, stages=(1, 2)):
        if "one parameter" in name:
            continue
        whole = results[0]["stage 0, adapter" if "adapter" in name else "stage 0"]["num_moments"]
        assert whole / 2 <= facts["num_moments"] < whole * 0.55, name


def test_a_rank_that_owns_nothing_takes_part(results):
    facts = [result["stage 1, one parameter"] for result in results]
    assert [len(each["tensor_names"]) for each in facts] == [1, 0]
    assert [each["num_moments"] for each in facts] == [55, 0]


def test_stage_3_holds_half_of_the_weights(results):
    for name, facts in cases(results, stages=(3,)):
        assert facts["num_held"] == facts["num_held_after_evaluation"] == 0, name
        assert facts["num_parameters"] / 2 <= facts["num_stored"] < facts["num_parameters"] * 0.55, name


def test_stage_3_has_one_layer_at_a_time_and_gathers_it_twice(results):
    for name, facts in cases(results, stages=(3,)):
        assert facts["most_layers_whole"] == 1, name
        num_micro_batches = 2 * (STEPS - 1) + 1 + 2  # of an idle step one, and those of a skipped step
        assert facts["num_gathers"] == num_micro_batches * (2 * NUM_LAYERS + 1), name
    for name, facts in cases(results, stages=(0, 1, 2)):
        assert facts["most_layers_whole"] == NUM_LAYERS, name


def test_evaluation_and_whole_parameters(results):
    for name, facts in cases(results):
        assert facts["evaluated"] == facts["evaluated_whole"], name
        assert facts["change_kept"] < 1e-6, name
        assert facts.get("slice_changed", 0) < 1e-6, name
    assert all(facts["slice_changed"] < 1e-6 for _, facts in cases(results, stages=(2, 3)))


def test_optimizer_state_can_be_keyed_by_structured_names(results):
    for name, facts in cases(results, stages=(2, 3)):
        generated, structured = zip(*facts["tensor_names"], strict=True)
        assert len(set(generated)) == len(generated) == len(set(structured)), name
        assert all(a.startswith(f"{b}@slice") for a, b in facts["tensor_names"]), name
        assert "layers.1.lora.weight" in structured, name


def test_each_parameter_has_one_owner(results):
    for name, facts in cases(results[:1], stages=(1,)):
        if "slices" in name or "one parameter" in name:
            continue
        first, second = ({structured for _, structured in result[name]["tensor_names"]} for result in results)
        assert first and second and not first & second, name
        assert first | second == {
            name for _, name in results[0]["stage 0" + ADAPTER * ("adapter" in name)]["tensor_names"]
        }
        assert facts["tensor_names"][0][0] != facts["tensor_names"][0][1]


OVERLAPPED = ["stage 1", "stage 1, slices", "stage 2", "stage 3"]


@pytest.mark.parametrize("name", OVERLAPPED)
def test_exchanges_beside_computing_change_no_bit(results, name):
    assert_same_bits(results, name)


def assert_same_bits(results: Results, name: str) -> None:
    beside, waiting = (results[0][each] for each in (name, f"{name}, waiting"))
    assert beside["most_arriving"] > 0 == waiting["most_arriving"]
    assert beside["digest"] == waiting["digest"]
    assert beside["norms"] == waiting["norms"]
    assert {result[name]["digest"] for result in results} == {beside["digest"]}


def test_replicas_of_shards(tmp_path):
    results = run(tmp_path, data=2, sharding=2)
    assert_like_one_process(results)
    for name in OVERLAPPED:
        assert_same_bits(results, name)
