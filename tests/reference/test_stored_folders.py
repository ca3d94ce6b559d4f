"""Folders that bitsandbytes wrote are bases: their tensors, and the curves of LoRA over them.

Without bitsandbytes a folder of equal tensors is trained on, and compared with golden values that
`bitsandbytes_folders.py` wrote; `make parity` trains on bitsandbytes' own folders.
"""

from __future__ import annotations

import json

import pytest

from tests.conftest import losses, run_entry, write_arguments
from tests.reference.curves import HERE, build_adapter
from tests.reference.quantised_cases import ARGUMENTS, build_base
from tests.reference.stored_cases import GOLDEN_STORED, STATE, STORED, describe, write_stored
from tests.reference.test_quantised import check_curve, live

GOLDEN = json.loads(GOLDEN_STORED.read_text())["folders"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Folder, base and adapter of all cases."""
    folder = tmp_path_factory.mktemp("stored")
    base = build_base(folder / "llama")
    return folder, base, build_adapter(folder / "adapter", base)


def curve_over(model, folder, adapter) -> list[float]:
    paths = {
        "model_name_or_path": str(model),
        "dataset_name_or_path": str(HERE / "data"),
        "lora_path": str(adapter),
        "output_dir": str(folder),
    }
    assert run_entry(write_arguments(folder.with_suffix(".json"), **ARGUMENTS | paths)) == 0
    return losses(folder)


@pytest.mark.parametrize("name", STORED)
def test_tensors_and_curve_equal_the_golden_ones(bench, name):
    folder, base, adapter = bench
    golden = GOLDEN[name]["tensors"]
    offsets = {
        key.partition(".weight")[0]: state["nested_offset"]
        for key, state in golden.items()
        if STATE in key and "nested_offset" in state
    }
    model = write_stored(base, folder / f"{name}-base", name, offsets)
    assert describe(model) == golden
    check_curve(curve_over(model, folder / name, adapter), GOLDEN[name]["curve"])
    others = [GOLDEN[other]["curve"][0]["loss"] for other in STORED if other != name]
    assert all(abs(GOLDEN[name]["curve"][0]["loss"] - other) > 1e-4 for other in others), "kinds must differ"


@pytest.mark.parity
@live
def test_folders_of_a_live_run_train_as_there(bench, tmp_path):
    from tests.reference.bitsandbytes_folders import reference_folders

    for name, reference in reference_folders(tmp_path).items():
        check_curve(curve_over(tmp_path / name, tmp_path / f"{name}-run", bench[2]), reference["curve"])
