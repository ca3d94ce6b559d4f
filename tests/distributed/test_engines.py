"""Which engine drives a layout, as the run tells it, and what the words of `pipeline_parallel_config` change."""

from __future__ import annotations

import json

import pytest
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer import DygraphShardingOptimizer
from paddle.distributed.fleet.meta_parallel import PipelineParallel, PipelineParallelWithInterleave

from finetune.parallel.pipe.fleet_pipeline import FleetInterleavedPipeline, FleetPipeline
from finetune.parallel.sharding.fleet_stage1 import OwnedParametersOptimizer
from tests.distributed.layouts import ONE, TOLERANCE, LayoutCase, build_model, largest_difference

pytestmark = pytest.mark.distributed

FLEET, VIRTUAL = "fleet PipelineParallel", "fleet PipelineParallelWithInterleave"
STAGE1 = {"sharding": "stage1", "sharding_parallel_degree": 2}
STAGES_2_AND_3 = [STAGE1 | {"sharding": stage} for stage in ("stage2", "stage3")]
SHARDING = "fleet DygraphShardingOptimizer"
TENSOR = "paddlenlp layers over fleet.meta_parallel"
OWN_TENSOR = TENSOR.replace("paddlenlp", "finetune")
"""Of families whose decoder is not PaddleNLP's."""
PP4 = LayoutCase(4, 2, {"pipeline_parallel_degree": 4})
TP_PP = {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2}
TP = {"tensor_parallel_degree": 2}
ASYNC, SCATTERS = "enable_mp_async_allreduce", "enable_sp_async_reduce_scatter"
WORDS = "disable_batch_p2p_comm disable_partial_send_recv, disable_p2p_cache_shape enable_delay_scale_loss"
CASES = [
    ("gemma", "lora", PP4, {"pipeline": FLEET}),
    ("llama", "lora", LayoutCase(4, 2, TP_PP | {"sequence_parallel": True}), {"tensor": TENSOR, "pipeline": FLEET}),
    (
        "llama",
        "pt",
        LayoutCase(4, 2, TP_PP | {"pipeline_parallel_config": WORDS}),
        {"tensor": TENSOR, "pipeline": FLEET},
    ),
    (
        "llama",
        "sft",
        LayoutCase(4, 1, {"pipeline_parallel_degree": 2}, 2),
        {"pipeline": FLEET, "data": "finetune BucketedReplicas"},
    ),
    (
        "llama",
        "sft",
        LayoutCase(2, 2, {"pipeline_parallel_degree": 2, "virtual_pp_degree": 2}),
        {"pipeline": VIRTUAL},
    ),
    (
        "qwen3",
        "lora",
        LayoutCase(4, 2, TP_PP | {"virtual_pp_degree": 2, "sequence_parallel": True}),
        {"tensor": OWN_TENSOR, "pipeline": VIRTUAL},
    ),
    (
        "llama",
        "lora",
        LayoutCase(2, 2, {"data_parallel_config": "gradient_sync_after_accumulate"}, 2),
        {"data": "finetune BucketedReplicas after all passes"},
    ),
    ("qwen2", "sft", LayoutCase(2, 2, TP | {"tensor_parallel_config": ASYNC}), {"tensor": TENSOR}),
    (
        "llama",
        "sft",
        LayoutCase(2, 2, TP | {"sequence_parallel": True, "tensor_parallel_config": SCATTERS}),
        {"tensor": TENSOR},
    ),
    (
        "llama",
        "sft",
        LayoutCase(2, 2, {"sharding": "stage1", "sharding_parallel_degree": 2}, 2),
        {"sharding": SHARDING},
    ),
    (
        "llama",
        "pt",
        LayoutCase(4, 2, STAGE1 | {"pipeline_parallel_degree": 2}, 2),
        {"pipeline": FLEET, "sharding": SHARDING},
    ),
    (
        "llama",
        "sft",
        LayoutCase(4, 2, TP | {"sequence_parallel": True, "sharding": "stage3"}, 2),
        {"tensor": TENSOR, "sharding": "finetune GatheredReplicas"},
    ),
    ("llama", "lora", LayoutCase(4, 1, STAGE1, 4), {"sharding": SHARDING, "data": "fleet fused_allreduce_gradients"}),
    (
        "gemma",
        "sft",
        LayoutCase(
            4,
            2,
            STAGE1
            | {
                "sharding_parallel_config": "split_param",
                "pipeline_parallel_degree": 2,
                "pipeline_parallel_config": "enable_sharding_comm_overlap",
            },
            2,
        ),
        {"pipeline": FLEET, "sharding": "finetune SlicedReplicas"},
    ),
    (
        "llama",
        "sft",
        LayoutCase(
            4,
            1,
            STAGE1 | {"sharding": "stage2", "pipeline_parallel_degree": 2, "virtual_pp_degree": 2},
            2,
        ),
        {"pipeline": VIRTUAL, "sharding": "finetune SlicedGradientReplicas"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "fleets", "name"),
    [
        (FleetPipeline, PipelineParallel, FLEET),
        (FleetInterleavedPipeline, PipelineParallelWithInterleave, VIRTUAL),
    ],
)
def test_pipelines_are_fleets(engine, fleets, name):
    assert issubclass(engine, fleets)
    assert engine.forward_backward_pipeline is fleets.forward_backward_pipeline
    assert engine.engine_name == name


def test_stage_1_is_fleets():
    optimizer = OwnedParametersOptimizer
    assert issubclass(optimizer, DygraphShardingOptimizer)
    for name in ("reduce_gradients", "step", "_sharding_sync_parameters", "_get_param_grad"):
        assert getattr(optimizer, name) is getattr(DygraphShardingOptimizer, name)


@pytest.mark.parametrize(("family", "method", "layout", "engines"), CASES)
def test_a_run_tells_what_drives_each_axis_and_has_the_curve_of_one_process(
    bench, family, method, layout, engines
):
    settings = bench.settings(family, method, "padded") | layout.arguments()
    run = bench.server.run(settings, layout.world).check()
    assert json.loads((run.folder / "arguments.json").read_text())["layout_engines"] == engines
    assert "\n".join(f"  {axis}: {engine}" for axis, engine in engines.items()) in run.logs[0]
    assert ("parameters  updated\n" in run.logs[0]) == ("sharding" in engines)
    differences = largest_difference(run.curve(), bench.expected(family, method, "padded"))
    assert max(differences.values()) <= TOLERANCE, differences


def test_virtual_stages_on_three_ranks_with_micro_batches_that_they_do_not_divide_or_too_few(bench, tmp_path):
    """8 and 2 micro-batches, of rows of several lengths, of which the last batch of an epoch fills some."""
    settings = bench.settings("llama", "sft", "padded") | {"max_steps": 6, "eval_steps": 6}
    settings["model_name_or_path"] = str(build_model("llama", tmp_path / "llama", num_layers=6))
    expected = bench.server.run(settings | ONE.arguments()).check().curve()
    for micro_batch_size in (1, 4):
        layout = LayoutCase(3, micro_batch_size, {"pipeline_parallel_degree": 3, "virtual_pp_degree": 2})
        run = bench.server.run(settings | layout.arguments(), layout.world).check()
        differences = largest_difference(run.curve(), expected)
        assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.slow_distributed
@pytest.mark.parametrize(
    "settings", [STAGE1, STAGE1 | {"sharding_parallel_config": "split_param"}, *STAGES_2_AND_3]
)
def test_waiting_for_every_exchange_changes_no_bit_of_the_curve(bench, settings):
    layout = LayoutCase(2, 2, settings, 2)
    curves = [
        bench.server.run(bench.settings("llama", "sft", "padded") | layout.arguments() | waits, layout.world)
        .check()
        .curve()
        for waits in ({}, {"data_parallel_config": "gradient_sync_after_accumulate"})
    ]
    assert curves[0] == curves[1]


def test_what_a_run_noted_of_its_engines_is_no_setting(bench):
    settings = bench.settings("llama", "sft", "padded") | {
        "layout_engines": {"pipeline": FLEET},
        "max_steps": 1,
    }
    run = bench.server.run(settings).check()
    assert "layout_engines" not in run.logs[0]
    assert "layout_engines" not in json.loads((run.folder / "arguments.json").read_text())


def test_rows_of_many_lengths_are_recomputed_in_a_pipeline_that_splits_them(bench):
    long = {"src_length": 150, "max_length": 250, "recompute": True, "max_steps": 4, "eval_steps": 4}
    model = build_model("llama", bench.folder / "models" / "llama of many positions", max_length=256)
    settings = bench.settings("llama", "sft", "padded") | long | {"model_name_or_path": str(model)}
    layout = LayoutCase(4, 1, TP_PP | {"sequence_parallel": True})
    run = bench.server.run(settings | layout.arguments(), layout.world).check()
    expected = bench.server.run(settings | ONE.arguments()).check()
    differences = largest_difference(run.curve(), expected.curve())
    assert max(differences.values()) <= TOLERANCE, differences
