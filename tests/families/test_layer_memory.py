"""What layers keep for their backward pass, counted anew on built models by Paddle's allocator."""

from __future__ import annotations

import paddle
import pytest

from finetune.adapters.trained_shapes import TrainedShapes
from finetune.families.family import families, get_family
from finetune.families.tiny_recipe import TinyShape
from finetune.models.loading import build_config, find_model_class
from finetune.models.resolve import ResolvedModel
from finetune.models.weight_shapes import weight_shapes
from finetune.run.plan.activations import Activations, MicroBatch, widths_of
from finetune.run.plan.facts import MemoryFacts

ROWS, LENGTH = 2, 96
# On a CPU this family's layers are replaced for the whole process, and their record is another one.
REPLACED = [name for name, family in families().items() if family.cpu_layers]


def held():
    return int(paddle.base.core.host_memory_stat_current_value("Allocated", 0))


def config_of(family, num_layers, *, num_kv_heads=None, **fields):
    num_kv_heads = num_kv_heads or (2 if family.tiny.grouped_heads else 4)
    shape = TinyShape(
        hidden_size=128,
        intermediate_size=128 * (family.tiny.inner_ratio or 3),
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        vocab_size=90,
        max_length=LENGTH,
    )
    return family.tiny.config(shape) | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | fields


def kept(family, num_layers, fields=None, **options):
    """Bytes that a forward pass leaves."""
    config = config_of(family, num_layers, **(fields or {}))
    resolved = ResolvedModel(None, family.name, config, family)
    model_class = find_model_class(resolved)
    overrides = {"use_cache": False} | options
    model = model_class(build_config(resolved, model_class, dtype="float32", overrides=overrides))
    if options:
        model.recompute_enable()
    model.train()
    inputs = {"input_ids": paddle.randint(5, 80, [ROWS, LENGTH])}
    if family.positions == "position_ids":
        inputs["position_ids"] = paddle.arange(LENGTH).unsqueeze(0).expand([ROWS, LENGTH])
    for _ in range(2):  # tables are made in the first pass
        before = held()
        outputs = model(**inputs)
        after = held()
        (outputs[0] if isinstance(outputs, list | tuple) else outputs).mean().backward()
        del outputs
    return after - before


def planned(family, fields=None, **facts):
    config = family.adapt_config(config_of(family, 3, **(fields or {})))
    widths = widths_of(family, config, TrainedShapes(weight_shapes(family, config)))
    activations = Activations(widths, MemoryFacts(device="gpu", **facts))
    return activations.kept(1, MicroBatch(ROWS, LENGTH, 0))


@pytest.mark.parametrize("name", [name for name in sorted(families()) if name not in REPLACED])
def test_a_layer_keeps_what_its_record_says(name):
    family = get_family(name)
    assert planned(family) == pytest.approx(kept(family, 3) - kept(family, 2), rel=0.03)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_kv_heads": 1},
        {"num_ln_in_parallel_attn": 1},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1, "parallel_attn": False},
    ],
)
def test_a_layer_of_each_form_of_falcon(fields):
    family = get_family("falcon")
    found = kept(family, 3, fields) - kept(family, 2, fields)
    assert planned(family, fields) == pytest.approx(found, rel=0.005)


def test_with_recomputation_a_layer_keeps_its_input():
    family = get_family("mistral")
    options = {"recompute": True, "recompute_granularity": "full", "recompute_use_reentrant": False}
    found = kept(family, 3, **options) - kept(family, 2, **options)
    assert found == planned(family, recompute="full") == ROWS * LENGTH * 128 * 4


def test_in_half_precision_a_layer_keeps_less_and_norms_keep_float32():
    family = get_family("mistral")
    half, whole = planned(family, computes_half=True), planned(family)
    tokens = ROWS * LENGTH
    scores = tokens * 4 * LENGTH
    assert half == pytest.approx((whole - 4 * scores) / 2 + 6 * scores + tokens * 128 * 4 * 2)
    assert planned(family, computes_half=True, fused_attention=True) == half - 6 * scores + tokens * 4 * 4
