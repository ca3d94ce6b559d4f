"""In bfloat16 tokens change experts by rounding; with the choices of float32 a run is as close to it as any other."""

from __future__ import annotations

import json
from types import MethodType

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest

from finetune.training.trainer import FinetuneTrainer
from tests.conftest import ROOT, run_entry, write_arguments
from tests.distributed.layouts import COMMON, GLOBAL_BATCH_SIZE, METHODS, ONE, build_data, build_model
from tests.distributed.precisions import (
    LEARNING_RATES,
    NUM_DEV,
    NUM_STEPS,
    NUM_TRAIN,
    PRECISIONS,
    SAVED,
    TOLERANCES,
    differences,
    tolerances_of,
)
from tests.distributed.server_runs import Curve, read_curve
from tests.reference.expert_rounding import (
    FAMILIES,
    FIGURES,
    FORMS,
    GOLDEN,
    SEEDS,
    expert_tolerances,
    largest_distances,
)

CASES = [*(("mixtral", method) for method in METHODS), ("qwen2_moe", "pt")]
CEILINGS = {"float32": 1e-2, "loss": 2e-2, "eval_loss": 1e-2, "grad_norm": 0.5}
"""What no bound may come to."""
NAMES = {"mixtral": "Mixtral", "qwen3_moe": "Qwen3-MoE", "qwen2_moe": "Qwen2-MoE"}
ROW_PARALLEL = ("o_proj", "down_proj")


class HeldChoices:
    """Stands in for `paddle.topk`: keeps what the router chose in one run, and gives it to the next ones.

    Attributes:
        num_changed: Tokens whose experts would have been others in the last run.
    """

    def __init__(self, choose):
        self._choose, self._kept, self._replays = choose, [], None
        self.num_changed = 0

    def keep(self) -> None:
        """From now on choices are kept again, and those of before forgotten."""
        self._kept, self._replays = [], None

    def hold(self) -> None:
        """From now on the same choices are given again, in their order."""
        self._replays, self.num_changed = iter(self._kept), 0

    def __call__(self, values, count, axis=-1):
        found = self._choose(values, count, axis=axis)
        chosen = found[1].numpy()
        if self._replays is None:
            self._kept.append(chosen)
            return found
        kept = next(self._replays)
        assert kept.shape == chosen.shape
        self.num_changed += int((np.sort(kept) != np.sort(chosen)).any(-1).sum())
        return paddle.take_along_axis(values, paddle.to_tensor(kept), axis), paddle.to_tensor(kept)

    def assert_all_given(self) -> None:
        assert next(self._replays, None) is None


def forward_in_parts(layer, x):
    """What a linear layer with or without LoRA gives where two tensor-parallel ranks divide its inputs."""

    def product(weight):
        half = weight.shape[0] // 2
        return F.linear(x[..., :half], weight[:half]) + F.linear(x[..., half:], weight[half:])

    output = product(layer.weight)
    if hasattr(layer, "lora_A"):
        output = output + product(layer.lora_A) @ layer.lora_B * layer.scaling
    return output


def divide(model) -> int:
    """Computes row-parallel layers as two ranks do; their number."""
    layers = [layer for name, layer in model.named_sublayers() if name.rpartition(".")[2] in ROW_PARALLEL]
    for layer in layers:
        assert layer.bias is None
        layer.forward = MethodType(forward_in_parts, layer)
    return len(layers)


class Runs:
    """Runs of one family and method, each of which gets the choices of the first.

    Args:
        folder: Where everything is written.
        family: Of the model.
        method: sft, lora or pt.
        monkeypatch: pytest's.
    """

    def __init__(self, folder, family, method, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.held = HeldChoices(paddle.topk)
        monkeypatch.setattr(paddle, "topk", self.held)
        model = build_model(family, folder / "model", num_layers=2)
        data = build_data(folder / "data", NUM_TRAIN, NUM_DEV)
        self.settings = COMMON | ONE.arguments() | METHODS[method] | {
            "max_steps": NUM_STEPS, "eval_steps": SAVED, "warmup_steps": 2, "max_grad_norm": 0.5,
            "weight_decay": 0.1, "learning_rate": LEARNING_RATES[method],
            "model_name_or_path": str(model), "dataset_name_or_path": str(data),
        }  # fmt: skip

    def run(self, name: str, **more) -> Curve:
        """The curve of a run."""
        output = self.folder / name
        path = write_arguments(output.with_suffix(".json"), **self.settings | more, output_dir=str(output))
        assert run_entry(path) == 0
        return read_curve(output)

    def run_held(self, name: str, **more) -> Curve:
        """The curve of a run with the choices of the first; without them it would have made others."""
        self.held.hold()
        curve = self.run(name, **PRECISIONS["bf16 O2"], rehearse_half_precision=True, **more)
        self.held.assert_all_given()
        assert self.held.num_changed > 0, "rounding moved no token to another expert: nothing was held"
        return curve

    def divide(self) -> None:
        """From now on row-parallel products are computed in two parts."""
        start = FinetuneTrainer.__init__

        def begin(trainer, **given):
            assert divide(given["model"])
            start(trainer, **given)

        self.monkeypatch.setattr(FinetuneTrainer, "__init__", begin)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_with_held_choices_only_rounding_is_left(family, method, tmp_path, monkeypatch):
    runs = Runs(tmp_path, family, method, monkeypatch)
    exact, rounded = runs.run("float32"), runs.run_held("bfloat16")
    runs.divide()
    divided = runs.run_held("divided")
    for curve in (rounded, divided):
        assert_near_float32(curve, exact)
    assert_near(divided, rounded)


def test_micro_batches_of_another_size_round_as_little(tmp_path, monkeypatch):
    # The gradient of the prefix is summed in more parts, each with its share of what the balancing loss adds.
    runs, small = Runs(tmp_path, "mixtral", "pt", monkeypatch), {"per_device_train_batch_size": 2}
    small["gradient_accumulation_steps"] = GLOBAL_BATCH_SIZE // 2
    runs.run("float32")
    rounded = runs.run_held("bfloat16")
    runs.held.keep()
    exact = runs.run("small float32", **small)
    in_more_parts = runs.run_held("small bfloat16", **small)
    assert_near_float32(in_more_parts, exact)
    assert_near(in_more_parts, rounded)


def assert_near_float32(curve: Curve, exact: Curve) -> None:
    """A curve in bfloat16 is within the bounds of families without experts."""
    distance, bounds = differences(curve, exact), TOLERANCES["bf16"]
    for name, limit in (("loss", bounds["float32"]), *((each, bounds[each]) for each in FIGURES[1:])):
        assert 0 < distance[name] <= limit, (name, distance)


def assert_near(curve: Curve, other: Curve) -> None:
    """Two curves in bfloat16 are as close as those of families without experts."""
    apart = differences(curve, other)
    for name in FIGURES:
        assert 0 < apart[name] <= TOLERANCES["bf16"][name], (name, apart)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bounds_of_experts_come_from_transformers(family, method):
    largest, general = largest_distances(family, method), TOLERANCES["bf16"]
    bounds = expert_tolerances(family, method, general)
    assert bounds.keys() == general.keys() == CEILINGS.keys()
    for name in FIGURES:
        assert largest[name] > 0 and bounds[name] == max(2 * largest[name], general[name])
    assert bounds["float32"] == max(largest["loss"], general["float32"])
    for name, ceiling in CEILINGS.items():
        assert bounds[name] < ceiling, "a bound that no fault would pass"
    assert tolerances_of("bf16 O2", family, method) == bounds
    for precision in ("bf16 O1", "fp16 O2"):
        assert tolerances_of(precision, family, method) == TOLERANCES[precision[:4]]
    assert expert_tolerances("llama", method, general) == general


@pytest.mark.parametrize("family", FAMILIES)
def test_every_order_and_form_was_measured(family):
    distances = json.loads(GOLDEN.read_text(encoding="utf-8"))["distances"]
    assert set(distances) == set(FAMILIES) and set(distances[family]) == set(METHODS)
    for of_method in distances[family].values():
        assert set(of_method) == set(map(str, SEEDS))
        for of_seed in of_method.values():
            assert set(of_seed) == set(FORMS)
            assert all(set(form) == set(FIGURES) for form in of_seed.values())


@pytest.mark.parametrize("page", ["half_precision.md", "half_precision_zh.md"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pages_give_the_bounds(family, page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for method in METHODS:
        bounds = tolerances_of("bf16 O2", family, method)
        figures = [f"{bounds[name]:.1e}".replace("e-0", "e-") for name in ("float32", *FIGURES)]
        cells = [NAMES[family], method, *figures]
        assert f"| {' | '.join(cells)} |" in text
