"""A rank's part of a packed matrix has the values of the whole."""

from __future__ import annotations

import numpy as np
import pytest

from finetune.errors import UserError
from finetune.storage.quantisation.cutting import cut_matrix
from finetune.storage.quantisation.packed_weights import FourBitMatrix, pack_matrix
from finetune.storage.quantisation.scheme import QuantisationScheme
from finetune.storage.splits import Split

SCHEMES = [
    QuantisationScheme(algorithm="nf4"),
    QuantisationScheme(algorithm="fp4", block_size=128, double_quant=True),
    QuantisationScheme(algorithm="weight_only_int8"),
]
SPLITS = {
    "columns of Paddle's weight": (Split(-1), 0),
    "rows of Paddle's weight": (Split(0), 1),
    "blocks of columns": (Split(-1, blocks=(2, 1, 1)), 0),
    "blocks of rows": (Split(0, blocks=(1, 1)), 1),
}


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("shape", [(64, 128), (96, 160), (48, 32)])
def test_parts_have_the_values_of_the_whole(scheme, kind, shape):
    split, axis = SPLITS[kind]
    matrix = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    whole = pack_matrix(matrix, scheme, name="w")
    values = whole.values().T  # [in, out], as Paddle has it
    parts = []
    for rank in range(2):
        places = [(columns, rows) for rows, columns in split.places(values.shape, 2, rank)]
        part = cut_matrix(whole, places, axis=axis, name="w")
        assert part.shape == part.values().shape
        np.testing.assert_array_equal(part.values().T, split.part(values, 2, rank))
        parts.append(part.values().T)
    np.testing.assert_array_equal(split.whole(parts), values)


def test_whole_blocks_stay_as_long_as_they_were():
    packed = pack_matrix(np.ones((64, 96), np.float32), SCHEMES[0], name="w")
    upper = cut_matrix(packed, [(slice(0, 32), slice(None))], axis=0, name="w")
    right = cut_matrix(packed, [(slice(None), slice(48, 96))], axis=1, name="w")
    assert isinstance(upper, FourBitMatrix)
    assert isinstance(right, FourBitMatrix)
    assert (upper.block_size, right.block_size) == (64, 16)


def test_blocks_too_short_to_be_worth_a_scale_are_refused_with_the_numbers():
    packed = pack_matrix(np.ones((4, 68), np.float32), SCHEMES[0], name="layer.weight")
    with pytest.raises(
        UserError, match=r"layer.weight has 68 columns, of which this rank holds 34 to 68.* 2, fewer"
    ):
        cut_matrix(packed, [(slice(None), slice(34, 68))], axis=1, name="layer.weight")
