"""Rotary frequencies stay float32 where training converts the weights (O2): Gemma's are an attribute of a layer."""

from __future__ import annotations

from finetune.models.tiny.checkpoint import build_tiny
from tests.conftest import FAST, losses, run_entry, write_arguments


def test_gemma_trains_in_bfloat16(small_data, tmp_path):
    build_tiny("gemma", tmp_path / "model", num_layers=2)
    settings = FAST | {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset_name_or_path": str(small_data),
        "bf16": True,
        "fp16_opt_level": "O2",
        "rehearse_half_precision": True,
        "max_steps": 2,
    }
    curves = {}
    for name, more in (("half", {}), ("single", {"bf16": False})):
        out = tmp_path / name
        arguments = write_arguments(tmp_path / f"{name}.json", **(settings | more | {"output_dir": str(out)}))
        assert run_entry(arguments) == 0
        curves[name] = losses(out)
    assert all(abs(a - b) < 2e-3 * b for a, b in zip(curves["half"], curves["single"], strict=True))
