"""One curve in every layout: a product layout for each of the five families, every kind of replica, best models."""

from __future__ import annotations

import json
import math

import pytest

from tests.distributed.layouts import LAYOUTS, ONE, TOLERANCE, curve_from, largest_difference

pytestmark = pytest.mark.distributed

# Family, method, layout, variation: each family, method, layout of the matrix and variation occurs here.
CASES = [
    ("llama", "sft", "tp2 x pp2", "padded"),
    ("chatglm2", "lora", "dp2 x tp2", "packed"),
    ("qwen", "pt", "tp2 x sharding2", "lazy"),
    ("bloom", "sft", "pp2 x sharding2", "packed"),
    ("opt", "lora", "tp2 x pp2", "lazy packed"),
    ("llama", "lora", "sharding2 stage1", "packed"),
    ("qwen", "sft", "sharding2 stage2", "padded"),
    ("gemma", "sft", "sharding2 stage3", "packed"),
    ("bloom", "pt", "pp2 virtual2", "padded"),
    ("qwen", "lora", "tp2 sequence", "padded"),
]


@pytest.mark.parametrize(("family", "method", "layout", "variation"), CASES)
def test_the_curve_is_that_of_one_process(bench, family, method, layout, variation):
    differences = bench.differences(family, method, layout, variation)
    assert max(differences.values()) <= TOLERANCE, differences


def test_the_curves_that_are_compared_say_something(bench):
    """Clipping is at work, weights move, the warm-up is in it, and the last batch of an epoch is a small one."""
    curve = bench.expected("llama", "sft", "padded")
    assert len(curve["loss"]) == 20
    assert min(curve["grad_norm"].values()) > 0.5
    assert curve["learning_rate"][1] < curve["learning_rate"][4]
    assert curve["eval_loss"][20] < curve["eval_loss"][10] - 0.05
    assert curve["num_label_tokens"][6] < 0.6 * curve["num_label_tokens"][5]
    assert 0 < bench.expected("llama", "sft", "packed")["eval_accuracy"][20] < 1


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("bloom", {"sequence_parallel": True}, "layers of family bloom cannot split rows"),
        ("llama", {"virtual_pp_degree": 2}, "virtual_pp_degree is 2, but pipeline_parallel_degree is 1"),
    ],
)
def test_layouts_that_cannot_be_are_refused_once(bench, family, settings, words):
    settings = bench.settings(family, "sft", "padded") | settings | {"tensor_parallel_degree": 2}
    run = bench.server.run(settings, 2)
    assert run.codes == (2, 2)
    assert words in run.refusal
    assert "error:" not in run.logs[1]


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("chatglm", "pt"),
        *(
            pytest.param(name, method, marks=pytest.mark.slow_distributed)
            for name, method in (("llama", "lora"), ("chatglm2", "pt"), ("qwen", "sft"), ("gemma", "lora"))
        ),
    ],
)
def test_texts_are_generated_where_rows_are_split(bench, family, method):
    """Batches of three rows over two ranks, a token a pass, and behind a prefix."""
    settings = bench.settings(family, method, "padded") | {
        "eval_with_do_generation": True, "save_generation_output": True, "max_new_tokens": 8, "max_steps": 6, "eval_steps": 6,
    }  # fmt: skip
    runs = [
        bench.server.run(settings | case.arguments(), case.world).check()
        for case in (LAYOUTS["tp2 sequence"], ONE)
    ]
    written = [(run.folder / "generated_output.json").read_text(encoding="utf-8") for run in runs]
    assert written[0] == written[1] and len(set(written[0].splitlines())) > 5
    differences = largest_difference(*(run.curve() for run in runs))
    assert max(differences.values()) <= TOLERANCE, differences


def test_best_model_by_accuracy_over_pipeline_stages(bench):
    """PaddleNLP drops metrics there; the best step, its metrics and its weights are those of one process."""
    settings = bench.settings("qwen", "sft", "padded") | {
        "neftune": False, "max_steps": 16, "warmup_steps": 0, "learning_rate": 0.02,  # the best is in the middle
        "eval_steps": 2, "save_steps": 2, "save_strategy": "steps", "save_total_limit": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "accuracy",
    }  # fmt: skip
    degrees = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "pipeline_parallel_degree": 2,
    }
    one = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    many, alone = (
        bench.server.run(settings | one_or_many, world).check()
        for one_or_many, world in ((degrees, 2), (one, 1))
    )
    states = [json.loads((run.folder / "trainer_state.json").read_text()) for run in (many, alone)]
    results = [json.loads((run.folder / "all_results.json").read_text()) for run in (many, alone)]
    accuracies = alone.curve()["eval_accuracy"]
    assert states[0]["best_model_checkpoint"] == states[1]["best_model_checkpoint"]
    assert states[0]["best_model_checkpoint"] != f"checkpoint-{max(accuracies)}", accuracies
    assert max(accuracies.values()) == pytest.approx(results[0]["eval_accuracy"])
    for name in ("eval_accuracy", "eval_loss", "eval_perplexity"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-4)


def test_a_difference_is_found():
    curve = {name: {1: 2.0, 2: 3.0} for name in ("loss", "grad_norm", "learning_rate")}
    other = curve | {"loss": {1: 2.0, 2: 3.0003}}
    assert largest_difference(curve, curve) == dict.fromkeys(curve, 0.0)
    assert largest_difference(other, curve)["loss"] == pytest.approx(1e-4)
    assert largest_difference(curve | {"loss": {1: 2.0, 2: math.nan}}, curve)["loss"] == math.inf
    with pytest.raises(AssertionError):
        largest_difference(curve | {"loss": {1: 2.0}}, curve)
    with pytest.raises(AssertionError):
        largest_difference(curve_from(curve, 2), curve)
