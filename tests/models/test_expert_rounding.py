"""In bfloat16 tokens change experts by rounding; with the choices of float32 a run is as close to it as any other."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from tests.conftest import read_log, run_entry, write_arguments
from tests.distributed.layouts import COMMON, ONE, build_data, build_model
from tests.distributed.precisions import LEARNING_RATES, NUM_DEV, NUM_STEPS, NUM_TRAIN, PRECISIONS, TOLERANCES
from tests.reference.expert_rounding import FAMILIES, expert_tolerances


class HeldChoices:
    """Stands in for `paddle.topk`: keeps what the router chose in one run, and gives it to the next.

    Attributes:
        num_changed: Tokens whose experts would have been others in the second run.
    """

    def __init__(self, choose):
        self._choose, self._kept, self._replays = choose, [], None
        self.num_changed = 0

    def hold(self) -> None:
        """From now on the same choices are given again, in their order."""
        self._replays = iter(self._kept)

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


@pytest.mark.parametrize("family", ["mixtral"])
def test_with_held_choices_only_rounding_is_left(family, tmp_path, monkeypatch):
    model, data = build_model(family, tmp_path / "model", num_layers=2), tmp_path / "data"
    build_data(data, NUM_TRAIN, NUM_DEV)
    settings = COMMON | ONE.arguments() | {
        "do_eval": False, "evaluation_strategy": "no", "max_steps": NUM_STEPS, "warmup_steps": 2,
        "learning_rate": LEARNING_RATES["sft"], "max_grad_norm": 0.5, "weight_decay": 0.1,
        "model_name_or_path": str(model), "dataset_name_or_path": str(data),
    }  # fmt: skip
    half = PRECISIONS["bf16 O2"] | {"rehearse_half_precision": True}
    held = HeldChoices(paddle.topk)
    monkeypatch.setattr(paddle, "topk", held)

    def losses(name: str, **more) -> np.ndarray:
        path = write_arguments(tmp_path / f"{name}.json", **settings | more, output_dir=str(tmp_path / name))
        assert run_entry(path) == 0
        return np.array([line["loss"] for line in read_log(tmp_path / name)])

    exact = losses("float32")
    held.hold()
    rounded = losses("bfloat16", **half)
    held.assert_all_given()
    assert held.num_changed > 0, "rounding moved no token to another expert: nothing was held"
    distance = np.abs(rounded / exact - 1).max()
    assert 0 < distance <= TOLERANCES["bf16"]["float32"], distance


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bounds_of_experts_come_from_transformers(family):
    bounds = expert_tolerances(family)
    assert bounds["loss"] == 2 * bounds["float32"]
    assert 0 < bounds["float32"] < 1e-2, "a bound that no fault would pass"
    assert expert_tolerances("llama") == {}
