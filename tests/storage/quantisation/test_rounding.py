"""Integers for a matrix: to the nearest within half a step, by GPTQ closer on the inputs that it was given."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from finetune.storage.checkpoints import TensorFiles
from finetune.storage.dtypes import as_float32
from finetune.storage.quantisation.packed_weights import pack_matrix
from finetune.storage.quantisation.rounding import round_by_gptq, round_nearest
from finetune.storage.quantisation.scheme import QuantisationScheme
from finetune.storage.quantisation.stored_format import stored_format
from finetune.storage.quantisation.stored_tensors import with_packed
from finetune.storage.quantisation.stored_writing import format_facts, stored_parts

RANDOM = np.random.default_rng(3)
MATRIX = (RANDOM.standard_normal((40, 256)) * 0.05).astype(np.float32)
# Inputs that depend on one another, which is what GPTQ makes use of.
INPUTS = RANDOM.standard_normal((600, 32)) @ RANDOM.standard_normal((32, 256)) + 0.1 * RANDOM.standard_normal(
    (600, 256)
)
SIZES = [(4, 32), (4, 128), (4, -1), (8, -1), (8, 64)]


@pytest.mark.parametrize(("bits", "size"), SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nearest_is_within_half_a_step(bits, size, dtype):
    packed = round_nearest(MATRIX, bits, size, dtype=dtype)
    steps = as_float32(packed.scales)[:, packed.column_groups()]
    rounding = 0 if dtype == "float32" else np.abs(MATRIX) * 2**-8 + steps * 2**-4
    assert (np.abs(packed.values() - MATRIX) <= steps * 0.501 + rounding).all()


@pytest.mark.parametrize(("bits", "size"), SIZES)
def test_gptq_keeps_outputs_better(bits, size):
    nearest = round_nearest(MATRIX, bits, size, dtype="float32").values()
    fitted = round_by_gptq(MATRIX, INPUTS.T @ INPUTS, bits, size, dtype="float32").values()
    lost = [np.linalg.norm(INPUTS @ (values - MATRIX).T) for values in (nearest, fitted)]
    assert lost[1] < 0.7 * lost[0]


def test_gptq_on_independent_inputs_is_the_nearest():
    found = round_by_gptq(MATRIX, np.eye(256), 4, 32, dtype="float32")
    np.testing.assert_array_equal(found.codes, round_nearest(MATRIX, 4, 32, dtype="float32").codes)


def test_inputs_that_are_always_zero_get_zero_weights():
    hessian = INPUTS.T @ INPUTS
    hessian[7], hessian[:, 7] = 0, 0
    values = round_by_gptq(MATRIX, hessian, 4, 32, dtype="float32").values()
    assert (values[:, 7] == 0).all()


@pytest.mark.parametrize("matrix", [np.zeros((4, 64)), np.full((4, 64), 0.3), np.full((4, 64), -0.3)])
@pytest.mark.parametrize("bits", [4, 8])
def test_matrices_of_one_value(matrix, bits):
    values = round_nearest(matrix.astype(np.float32), bits, 32, dtype="float32").values()
    np.testing.assert_allclose(values, matrix, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", *SIZES])
def test_what_is_written_is_read_again(tmp_path, kind):
    if kind == "nf4":
        size, packed = 64, pack_matrix(MATRIX, QuantisationScheme(algorithm="nf4"), name="layer")
    else:
        size, packed = kind[1], round_nearest(MATRIX, kind[0], kind[1], dtype="float32")
    parts = stored_parts(packed, dtype="float32")
    save_file({f"layer.{end}": part for end, part in parts.items()}, tmp_path / "a.safetensors")
    form = stored_format(
        {"quantization_config": format_facts(packed, group_size=size, head="lm_head")}, "folder"
    )
    tensor = with_packed(TensorFiles([tmp_path / "a.safetensors"]).tensors, form, "folder")["layer.weight"]
    np.testing.assert_array_equal(tensor.load(), packed.values())
