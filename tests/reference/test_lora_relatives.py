"""The loss curves of LoRA's relatives equal peft's: golden ones, and live under `make parity`."""

from __future__ import annotations

import json

import pytest

from tests.conftest import read_log, run_entry, write_arguments
from tests.reference.curves import HERE, build_model
from tests.reference.lora_relatives import (
    GOLDEN_RELATIVES,
    RELATIVES,
    STARTS_FROM_BASE,
    settings_of,
    write_start,
)
from tests.reference.test_curves import HAS_TORCH, REQUIRED, assert_same


@pytest.fixture(scope="module")
def our_curves(tmp_path_factory):
    """Our curve of each relative, through the entry script, computed once."""
    folder = tmp_path_factory.mktemp("relatives")
    found = {}

    def curve(name: str) -> list[dict[str, float]]:
        if name not in found:
            family = RELATIVES[name][0]
            model = folder / family
            if not model.exists():
                build_model(model, family)
            settings = settings_of(name) | {
                "model_name_or_path": str(model), "dataset_name_or_path": str(HERE / "data"),
                "output_dir": str(folder / name),
            }  # fmt: skip
            if name not in STARTS_FROM_BASE:
                settings["lora_path"] = str(write_start(folder / f"{name}_adapter", model, name))
            assert run_entry(write_arguments(folder / f"{name}.json", **settings)) == 0
            found[name] = read_log(folder / name)
        return found[name]

    return curve


@pytest.mark.parametrize("name", RELATIVES)
def test_curve_equals_the_golden_one(our_curves, name):
    assert_same(our_curves(name), json.loads(GOLDEN_RELATIVES.read_text())["curves"][name])


@pytest.mark.parity
@pytest.mark.skipif(
    not HAS_TORCH and not REQUIRED, reason="PyTorch is not installed; make parity installs it"
)
def test_curves_equal_a_live_run_of_peft(our_curves):
    from tests.reference.lora_relatives import reference_curves

    for name, curve in reference_curves().items():
        assert_same(our_curves(name), curve)
