"""Packed weights and the curves over them equal those of bitsandbytes and peft.

Without bitsandbytes the comparison is with golden values that `bitsandbytes_training.py` wrote;
`make parity` installs it and compares with a live run.
"""

from __future__ import annotations

import importlib.util
import json
import os

import numpy as np
import pytest

from finetune.storage.quantisation.packed_weights import FourBitMatrix, nest_scales, pack_matrix
from finetune.storage.quantisation.scheme import QuantisationScheme
from tests.conftest import losses, run_entry, write_arguments
from tests.reference.curves import HERE, NUM_STEPS, build_adapter
from tests.reference.quantised_cases import (
    ARGUMENTS,
    CURVES,
    FOUR_BIT,
    GOLDEN_QUANTISED,
    MATRICES,
    build_base,
    digest,
    random_matrix,
)

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
HAS_ALL = all(importlib.util.find_spec(name) for name in PACKAGES)
REQUIRED = os.environ.get("FINETUNE_REQUIRE_PARITY") == "1"
GOLDEN = json.loads(GOLDEN_QUANTISED.read_text())
live = pytest.mark.skipif(not HAS_ALL and not REQUIRED, reason="make parity installs bitsandbytes")


def check_four_bit(name: str, kind: str, size: int, double: bool, expected: dict) -> None:
    scheme = QuantisationScheme(algorithm=kind, block_size=size, double_quant=double)
    packed = pack_matrix(random_matrix(name), scheme, name=name)
    assert digest(packed.codes) == expected["codes"]
    scales = packed.scales
    if double:
        # torch adds float32 numbers in an order of its own: the mean may differ in the last bit.
        assert scales.offset == pytest.approx(expected["offset"], rel=2e-7)
        plain = pack_matrix(
            random_matrix(name), QuantisationScheme(algorithm=kind, block_size=size), name=name
        )
        scales = nest_scales(plain.scales, 256, offset=np.float32(expected["offset"]))
        assert digest(scales.codes) == expected["scales"]
        assert digest(scales.scales) == expected["outer"]
    else:
        assert digest(scales) == expected["scales"]
    values = FourBitMatrix(kind, packed.shape, size, packed.codes, scales).values()
    assert digest(values) == expected["values"]


def check_int8(name: str, expected: dict) -> None:
    packed = pack_matrix(random_matrix(name), QuantisationScheme(algorithm="llm.int8"), name=name)
    assert digest(packed.codes) == expected["codes"]
    assert digest(packed.scales) == expected["scales"]


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize(("kind", "size", "double"), FOUR_BIT)
def test_four_bits_equal_the_golden_ones(name, kind, size, double):
    check_four_bit(name, kind, size, double, GOLDEN["matrices"][f"{name} {kind} {size} {double}"])


@pytest.mark.parametrize("name", MATRICES)
def test_int8_equals_the_golden_one(name):
    check_int8(name, GOLDEN["matrices"][f"{name} int8"])


@pytest.fixture(scope="module")
def our_losses(tmp_path_factory):
    """Our losses of each kind, through the entry script, computed once."""
    folder = tmp_path_factory.mktemp("quantised")
    base = build_base(folder / "llama")
    adapter = build_adapter(folder / "adapter", base)
    paths = {
        "model_name_or_path": str(base),
        "dataset_name_or_path": str(HERE / "data"),
        "lora_path": str(adapter),
    }
    found: dict[str, list[float]] = {}

    def curve(kind: str) -> list[float]:
        if kind not in found:
            settings = ARGUMENTS | CURVES[kind] | paths | {"output_dir": str(folder / kind)}
            assert run_entry(write_arguments(folder / f"{kind}.json", **settings)) == 0
            found[kind] = losses(folder / kind)
        return found[kind]

    return curve


def check_curve(ours: list[float], reference: list[dict]) -> None:
    assert len(ours) == len(reference) == NUM_STEPS
    assert ours[-1] < ours[0] - 0.1, "the curve must move, or equality says nothing"
    assert ours == pytest.approx([step["loss"] for step in reference], abs=1e-4)


@pytest.mark.parametrize("kind", CURVES)
def test_curve_equals_the_golden_one(our_losses, kind):
    check_curve(our_losses(kind), GOLDEN["curves"][kind])
    others = [GOLDEN["curves"][other][0]["loss"] for other in CURVES if other[:3] != kind[:3]]
    assert all(abs(our_losses(kind)[0] - other) > 1e-4 for other in others), "kinds must differ"


@pytest.mark.parity
@live
def test_matrices_and_curves_equal_a_live_run(our_losses):
    from tests.reference.bitsandbytes_training import quantise_matrices, train_curves

    for key, expected in quantise_matrices().items():
        name, *rest = (part for part in key.rsplit(" ", 1 if key.endswith("int8") else 3))
        if rest == ["int8"]:
            check_int8(name, expected)
        else:
            check_four_bit(name, rest[0], int(rest[1]), rest[2] == "True", expected)
    for kind, reference in train_curves().items():
        check_curve(our_losses(kind), reference)
