"""Names of weights that two layers share."""

from __future__ import annotations

import pytest

from finetune.models.layers import unique_tensors


@pytest.mark.parametrize("order", [1, -1])
def test_a_shared_tensor_goes_by_the_name_that_lies_deeper(order):
    shared, other = object(), object()
    state = {"lm_head.weight": shared, "model.embed.weight": shared, "model.norm.weight": other}
    found = unique_tensors(dict(list(state.items())[::order]))
    assert found == {"model.embed.weight": shared, "model.norm.weight": other}


def test_of_names_that_lie_equally_deep_the_first_counts():
    shared = object()
    assert list(unique_tensors({"b.weight": shared, "a.weight": shared})) == ["b.weight"]
