"""Every family in half precision through the entry script, its power cut after the first step: the same digits again.

DPO with all weights in every run of the tests; the other methods with
`pytest -m slow_distributed tests/end_to_end/test_family_runs.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from finetune.families.family import families
from tests.conftest import ROOT, losses, read_log, run_entry, write_arguments
from tests.end_to_end.test_families import cut_power_after_step_1, results, tensors

NUM_TRAIN, NUM_DEV = 5, 2
LORA = {"lora": True, "lora_rank": 4, "lora_dropout": 0.1, "disable_dropout": False}
PREFERENCES: dict[str, dict[str, object]] = {
    "dpo": {"loss_type": "sigmoid"},
    "dpo lora": {"loss_type": "sigmoid", "zero_padding": True} | LORA,
    "reward": {"loss_type": "reward", "zero_padding": True},
    "reward lora": {"loss_type": "reward"} | LORA,
}
SUPERVISED: dict[str, dict[str, object]] = {
    "sft": {"recompute": True},
    "lora": {"zero_padding": True} | LORA,
    "prefix": {"prefix_tuning": True, "num_prefix_tokens": 4},
}
SETTINGS = {
    "device": "cpu", "do_train": True, "do_eval": True, "max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-3,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "src_length": 64, "max_length": 128,
    "evaluation_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2,
    "logging_steps": 1, "data_cache": False, "disable_tqdm": True,
    "bf16": True, "fp16_opt_level": "O2", "rehearse_half_precision": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def data_folders(tmp_path_factory) -> dict[str, Path]:
    """The shortest pairs and the shortest samples of the sample data."""
    found = {}
    for kind, source in (("pairs", ROOT / "data" / "preference"), ("samples", ROOT / "data")):
        found[kind] = tmp_path_factory.mktemp(kind)
        for name, count in (("train.json", NUM_TRAIN), ("dev.json", NUM_DEV)):
            lines = (source / name).read_text(encoding="utf-8").splitlines()
            chosen = sorted(lines, key=len)[:count]
            (found[kind] / name).write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return found


def check(family: str, settings: dict[str, object], tiny_model, data: Path, tmp_path: Path) -> Path:
    """Runs twice, the second time from what a power cut after step 1 leaves; the output folder."""
    out = tmp_path / "out"
    places = {"model_name_or_path": tiny_model(family), "dataset_name_or_path": data, "output_dir": out}
    given = SETTINGS | settings | {name: str(path) for name, path in places.items()}
    arguments = write_arguments(tmp_path / "arguments.json", **given)
    assert run_entry(arguments) == 0
    trained, curve, weights = results(out), losses(out), tensors(out / "checkpoint-2")
    assert [record["step"] for record in read_log(out)] == [1, 2]
    assert all(math.isfinite(loss) for loss in curve) and math.isfinite(trained["eval_loss"])

    cut_power_after_step_1(out)
    assert run_entry(arguments) == 0
    assert (results(out), losses(out), tensors(out / "checkpoint-2")) == (trained, curve, weights)
    return out


@pytest.mark.parametrize("family", sorted(families()))
def test_dpo_of_all_weights(family, tiny_model, data_folders, tmp_path):
    out = check(family, PREFERENCES["dpo"], tiny_model, data_folders["pairs"], tmp_path)
    first, second = read_log(out)
    # The policy is the reference before the first step, so that each pair costs -log sigmoid(0).
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["grad_norm"] > 0
    assert second["loss"] != first["loss"] and abs(second["rewards_margin"]) > 0
    kept = {array.dtype.name for array in load_file(out / "checkpoint-2" / "optimizer.safetensors").values()}
    assert "float32" in kept


@pytest.mark.slow_distributed
@pytest.mark.parametrize("method", [name for name in PREFERENCES if name != "dpo"])
@pytest.mark.parametrize("family", sorted(families()))
def test_other_methods_on_pairs(family, method, tiny_model, data_folders, tmp_path):
    out = check(family, PREFERENCES[method], tiny_model, data_folders["pairs"], tmp_path)
    assert 0 <= json.loads((out / "all_results.json").read_text())["eval_rewards_accuracy"] <= 1


@pytest.mark.slow_distributed
@pytest.mark.parametrize("method", SUPERVISED)
@pytest.mark.parametrize("family", sorted(families()))
def test_supervised_methods(family, method, tiny_model, data_folders, tmp_path):
    check(family, SUPERVISED[method], tiny_model, data_folders["samples"], tmp_path)
