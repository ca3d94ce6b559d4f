"""Packing, apart from its equality with bitsandbytes (tests/reference/test_quantised.py)."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.errors import UserError
from finetune.storage.quantisation import packed_weights
from finetune.storage.quantisation.code_tables import dynamic_values, four_bit_values
from finetune.storage.quantisation.packed_weights import FourBitMatrix, nest_scales, pack_matrix
from finetune.storage.quantisation.scheme import ALGORITHMS, QuantisationScheme, scheme_from_json
from tools.marked_tables import table_marks
from tools.weight_bytes_table import DOCS, NAME, render

SCHEMES = [
    QuantisationScheme(algorithm="nf4"),
    QuantisationScheme(algorithm="nf4", double_quant=True, double_quant_block_size=32),
    QuantisationScheme(algorithm="fp4", block_size=32),
    QuantisationScheme(algorithm="llm.int8"),
]


def random_matrix(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
@pytest.mark.parametrize("shape", [(40, 96), (9, 33), (1, 5), (200, 1)])
def test_stretches_and_views_change_nothing(monkeypatch, scheme, shape):
    matrix = random_matrix(*shape)
    whole = pack_matrix(matrix, scheme, name="w")
    monkeypatch.setattr(packed_weights, "STRETCH", 150)
    view = np.ascontiguousarray(matrix.T).T
    again = pack_matrix(view, scheme, name="w")
    np.testing.assert_array_equal(whole.codes, again.codes)
    np.testing.assert_array_equal(whole.values(), again.values())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
def test_values_are_near_and_stay_when_packed_again(scheme):
    matrix = random_matrix(64, 128)
    values = pack_matrix(matrix, scheme, name="w").values()
    scale = np.abs(matrix).max()
    assert np.abs(values - matrix).max() < scale * (0.02 if "int8" in scheme.algorithm else 0.2)
    if not scheme.double_quant and scheme.is_four_bit:
        np.testing.assert_array_equal(pack_matrix(values, scheme, name="w").values(), values)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_value_of_the_table_is_its_own_code(kind):
    table = four_bit_values(kind)
    matrix = np.tile(table, 4).reshape(1, 64)
    packed = pack_matrix(matrix * np.float32(3), QuantisationScheme(algorithm=kind), name="w")
    np.testing.assert_allclose(packed.values(), matrix * np.float32(3), rtol=1e-6)
    assert packed.codes[0] >> 4 == 0  # the first value stands in the upper half
    assert packed.codes[0] & 15 == 1


def test_bfloat16_and_float16_are_widened_first():
    matrix = random_matrix(8, 64)
    halves = (matrix.view(np.uint32) >> 16).astype(np.uint16)  # how bfloat16 is read
    widened = (halves.astype(np.uint32) << 16).view(np.float32)
    scheme = SCHEMES[0]
    np.testing.assert_array_equal(
        pack_matrix(halves, scheme, name="w").codes, pack_matrix(widened, scheme, name="w").codes
    )


def test_zeros_stay_zeros():
    for scheme in SCHEMES:
        assert not pack_matrix(np.zeros((3, 70), np.float32), scheme, name="w").values().any()


@pytest.mark.parametrize(("value", "scheme"), [(np.nan, SCHEMES[0]), (np.inf, SCHEMES[1]), (1e5, SCHEMES[3])])
def test_what_cannot_be_scaled_is_named(value, scheme):
    matrix = random_matrix(4, 64)
    matrix[2, 3] = value
    with pytest.raises(UserError, match=r"layer.weight holds numbers that are not finite"):
        pack_matrix(matrix, scheme, name="layer.weight")


def test_nested_scales_are_near():
    scales = np.abs(random_matrix(1000).ravel()) + 0.1
    nested = nest_scales(scales, 256)
    assert nested.codes.dtype == np.uint8
    assert nested.scales.shape == (4,)
    assert np.abs(nested.values() - scales).max() < 0.02 * scales.max()


def test_the_dynamic_table_rises_from_minus_to_plus_one():
    values = dynamic_values()
    assert len(values) == 256
    assert (np.diff(values) > 0).all()
    assert values[-1] == 1.0
    assert 0.0 in values


def test_sizes_are_those_that_the_scheme_names():
    for algorithm in ALGORITHMS:
        for double in (False, True):
            scheme = QuantisationScheme(algorithm=algorithm, double_quant=double)
            packed = pack_matrix(random_matrix(512, 256), scheme, name="w")
            held = packed.codes.nbytes
            if isinstance(packed, FourBitMatrix):
                scales = packed.scales
                held += scales.codes.nbytes + scales.scales.nbytes if double else scales.nbytes
            assert held == pytest.approx(scheme.bytes_per_weight * 512 * 256)


def test_a_record_is_read_back_or_refused():
    for scheme in SCHEMES:
        assert scheme_from_json(scheme.to_json(), "file") == scheme
    good = SCHEMES[0].to_json()
    for fields in ({}, good | {"algorithm": "int2"}, good | {"block_size": 7}, good | {"more": 1}):
        with pytest.raises(UserError, match=r"facts.json: the record of how the base was quantised"):
            scheme_from_json(fields, "facts.json")


@pytest.mark.parametrize("page", ["quantised_bases.md", "quantised_bases_zh.md"])
def test_the_table_of_bytes_is_what_matrices_take(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    assert f"{table_marks(NAME)[0]}\n{render(page)}\n{table_marks(NAME)[1]}" in text, (
        "run python tools/weight_bytes_table.py"
    )
