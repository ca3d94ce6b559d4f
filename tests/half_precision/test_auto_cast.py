"""Paddle's mixed precision chooses the types that it chooses on a GPU."""

from __future__ import annotations

import paddle
import paddle.nn.functional as F
import pytest
from paddle.amp import amp_lists

from finetune.half_precision import auto_cast, installation, uninstall
from tests.half_precision.conftest import DTYPES, draw, tensor

pytestmark = pytest.mark.usefixtures("half")


def name_of(made: paddle.Tensor) -> str:
    return str(made.dtype).rpartition(".")[2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_level_o1_computes_products_in_half_precision_and_sums_in_float32(dtype):
    x, weight = paddle.to_tensor(draw(4, 8)), paddle.to_tensor(draw(8, 8, seed=1))
    weight.stop_gradient = False
    with paddle.amp.auto_cast(level="O1", dtype=dtype):
        product = x @ weight
        assert name_of(product) == name_of(F.linear(x, weight)) == dtype
        assert name_of(F.softmax(product)) == name_of(product.mean()) == name_of(product.exp()) == "float32"
        assert name_of(product * 2.0) == name_of(F.silu(product)) == name_of(product + product) == dtype
        assert name_of(product + x) == "float32"
        assert name_of(F.layer_norm(product, [8])) == "float32"
        for moved in (product.reshape([-1]), product.transpose([1, 0]), product[1:], product.clone()):
            assert name_of(moved) == dtype
        assert (
            name_of(paddle.stack([product, x @ weight]))
            == name_of(paddle.concat([product, product]))
            == dtype
        )
        loss = product.sum()
    loss.backward()
    assert name_of(weight.grad) == "float32"
    assert name_of(x @ weight) == "float32"


@pytest.mark.parametrize("dtype", DTYPES)
def test_level_o2_keeps_half_precision_but_for_its_black_list(dtype):
    model = paddle.nn.Sequential(paddle.nn.Linear(8, 8), paddle.nn.LayerNorm(8))
    paddle.amp.decorate(models=model, level="O2", dtype=dtype)
    assert {name_of(each) for each in model[0].parameters()} == {dtype}
    with paddle.amp.auto_cast(level="O2", dtype=dtype):
        result = model(paddle.to_tensor(draw(4, 8)))
        assert name_of(result) == name_of(F.softmax(result)) == name_of(result.mean()) == dtype
        assert name_of(result + paddle.to_tensor(draw(4, 8))) == "float32"


@pytest.mark.parametrize("dtype", DTYPES)
def test_custom_lists_come_first(dtype):
    x = paddle.to_tensor(draw(4, 4))
    black, white = {"matmul_v2", "matmul"}, {"softmax"}
    with paddle.amp.auto_cast(level="O1", dtype=dtype, custom_black_list=black, custom_white_list=white):
        assert name_of(x @ x) == "float32"
        assert name_of(F.softmax(x)) == dtype
    with paddle.amp.auto_cast(level="O2", dtype=dtype, custom_white_list={"lookup_table_v2"}):
        table = tensor(draw(4, 4), dtype)
        assert name_of(F.embedding(paddle.to_tensor([1]), table)) == dtype


def test_o2_without_promotion_computes_mixed_types_in_half_precision():
    half, wide = tensor(draw(4), "bfloat16"), paddle.to_tensor(draw(4))
    for promote, expected in ((True, "float32"), (False, "bfloat16")):
        with paddle.amp.auto_cast(level="O2", dtype="bfloat16", use_promote=promote):
            assert name_of(half + wide) == expected


def test_mixed_precision_can_be_switched_off_inside():
    x = paddle.to_tensor(draw(4, 4))
    with paddle.amp.auto_cast(level="O1", dtype="bfloat16"), paddle.amp.auto_cast(enable=False):
        assert name_of(x @ x) == "float32"


WITHOUT_OPERATOR = {
    "cross_entropy",
    "cross_entropy2",
    "pnorm",
    "lookup_table",
    "mul",
    "softmin",
    "triplet_margin_loss",
}
"""Names in Paddle's lists that none of its operators has any more."""


def test_every_name_in_paddles_lists_is_that_of_an_operator():
    uninstall()
    listed = set()
    for lists in (amp_lists.white_list(), amp_lists.black_list()):
        for dtype in DTYPES:
            for level in ("O1", "O2"):
                listed |= set(lists[dtype][level])
    names, operators = auto_cast.list_names(), installation.operator_functions()
    known = {names.get(name, name) for name in operators} | operators.keys()
    assert listed - known - WITHOUT_OPERATOR == set()
