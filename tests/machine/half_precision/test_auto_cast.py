"""`paddle.amp.auto_cast` and `decorate`: which dtype an operator computes in."""

from __future__ import annotations

import warnings

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from paddle.amp import amp_lists

from finetune.machine.half_precision import auto_cast
from tests.machine.half_precision import cases
from tests.machine.half_precision.rounding import DTYPES, as_float32, rounded
from tests.machine.half_precision.tensors import dtype_of, tensor

IS_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


def dtypes_under(level: str, dtype: str, operators: dict, **options) -> dict[str, str]:
    """The dtype of each operator's result."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no "makes no effect"
        with paddle.amp.auto_cast(level=level, dtype=dtype, **options):
            return {name: dtype_of(operator()) for name, operator in operators.items()}


def operators_on(kind: str) -> dict:
    """Operators on tensors of one dtype."""
    x, y, row = tensor(cases.X, kind), tensor(cases.SQUARE, kind), tensor(cases.ROW, kind)
    weight = tensor(cases.ROW, "float32")  # of half precision it would not go with an input made float32
    return {
        "matmul": lambda: paddle.matmul(x, y),
        "@": lambda: x @ y,
        "linear": lambda: F.linear(x, y, row),
        "linear without bias": lambda: F.linear(x, y),
        "einsum": lambda: paddle.einsum("ij,jk->ik", x, y),
        "softmax": lambda: F.softmax(x),
        "layer_norm": lambda: F.layer_norm(x, [6], weight, weight),
        "sum": lambda: x.sum(),
        "mean": lambda: x.mean(-1),
        "exp": lambda: x.exp(),
        "**": lambda: x**2,
        "rsqrt": lambda: (x * x).rsqrt(),
        "cross_entropy": lambda: F.cross_entropy(x, paddle.to_tensor([0, 1, 2, 3])),
        "embedding": lambda: F.embedding(paddle.to_tensor([0, 1]), x),
        "+": lambda: x + x,
        "multiply": lambda: paddle.multiply(x, x),
        "silu": lambda: F.silu(x),
        "reshape": lambda: x.reshape([24]),
        "max": lambda: x.max(),
        "* 2": lambda: x * 2.0,
        "x[0]": lambda: x[0],
        "bmm": lambda: paddle.bmm(x.unsqueeze(0), y.unsqueeze(0)),
        "cast": lambda: x.astype(kind),
        "abs": lambda: x.abs(),
    }


WHITE = {"matmul", "@", "linear", "linear without bias", "einsum"}
BLACK = {
    "softmax", "layer_norm", "sum", "mean", "exp", "**", "rsqrt", "cross_entropy", "embedding"
}  # fmt: skip


@IS_DTYPE
def test_level_o1(dtype):
    from_single = dtypes_under("O1", dtype, operators_on("float32"))
    assert from_single == {name: dtype if name in WHITE else "float32" for name in from_single}
    from_half = dtypes_under("O1", dtype, operators_on(dtype))
    assert from_half == {name: "float32" if name in BLACK else dtype for name in from_half}


@IS_DTYPE
def test_level_o2(dtype):
    from_single = dtypes_under("O2", dtype, operators_on("float32"))
    assert from_single == {name: dtype if name in WHITE else "float32" for name in from_single}
    from_half = dtypes_under("O2", dtype, operators_on(dtype))
    assert from_half == {name: "float32" if name == "embedding" else dtype for name in from_half}


@IS_DTYPE
def test_level_o2_without_promotion(dtype):
    operators = operators_on("float32")
    for name in ("cast", "x[0]"):  # not by way of Paddle's operators
        operators.pop(name)
    found = dtypes_under("O2", dtype, operators, use_promote=False)
    assert found == {name: "float32" if name == "embedding" else dtype for name in found}


@IS_DTYPE
def test_level_od(dtype):
    found = dtypes_under("OD", dtype, operators_on(dtype))
    native = {"x[0]", "cast"}
    assert found == {name: dtype if name in WHITE | native else "float32" for name in found}


@IS_DTYPE
def test_one_input_of_float32_makes_other_operators_compute_in_float32(dtype):
    half, single = tensor(cases.X, dtype), tensor(cases.Y, "float32")
    found = dtypes_under(
        "O1",
        dtype,
        {
            "+": lambda: half + single,
            "concat": lambda: paddle.concat([half, single]),
            "stack": lambda: paddle.stack([half, single]),
            "where": lambda: paddle.where(half > 0, half, single),
            "matmul": lambda: paddle.matmul(half, single.T),
        },
    )
    assert found == {
        "+": "float32",
        "concat": "float32",
        "stack": "float32",
        "where": "float32",
        "matmul": dtype,
    }


@IS_DTYPE
def test_norms_are_decided_by_their_first_input(dtype):
    half, row = tensor(cases.X, dtype), tensor(cases.ROW, "float32")
    norm = {"layer_norm": lambda: F.layer_norm(half, [6], row, row)}
    assert dtypes_under("O2", dtype, norm) == {"layer_norm": dtype}
    assert dtypes_under("O1", dtype, norm) == {"layer_norm": "float32"}


@IS_DTYPE
def test_lists_of_ones_own(dtype):
    operators = {name: operators_on("float32")[name] for name in ("matmul", "softmax", "+", "silu")}
    found = dtypes_under(
        "O1",
        dtype,
        operators,
        custom_white_list=["softmax", "elementwise_add"],
        custom_black_list=["matmul_v2"],
    )
    assert found == {"matmul": "float32", "softmax": dtype, "+": dtype, "silu": "float32"}


def test_names_that_paddle_does_not_use_for_an_operator_have_no_effect():
    """On a GPU, too, "add" and "matmul" in a list reach nothing: the lists say elementwise_add and matmul_v2."""
    operators = {name: operators_on("float32")[name] for name in ("matmul", "+")}
    found = dtypes_under("O1", "bfloat16", operators, custom_white_list=["add"], custom_black_list=["matmul"])
    assert found == {"matmul": "bfloat16", "+": "float32"}


# Names in Paddle's lists that no operator of this version has.
WITHOUT_OPERATOR = {
    "cross_entropy",
    "cross_entropy2",
    "hsigmoid_loss",  # hierarchical_sigmoid
    "lookup_table",
    "matmul",
    "pnorm",
    "softmin",
    "triplet_margin_loss",
}


@pytest.fixture(scope="module")
def listed_names() -> set[str]:
    """All names in Paddle's lists."""
    return {
        name
        for lists in (amp_lists.white_list(), amp_lists.black_list())
        for by_level in lists.values()
        for names in by_level.values()
        for name in names
    }


def test_every_name_in_paddles_lists_is_an_operator(listed_names):
    renamed = auto_cast.list_names()
    known = {renamed.get(name, name) for name in vars(paddle._C_ops)}
    assert listed_names - known == WITHOUT_OPERATOR


def test_names_are_those_that_paddles_own_code_knows(listed_names):
    renamed = auto_cast.list_names()
    for listed in listed_names - WITHOUT_OPERATOR:
        name = paddle.base.core._get_phi_kernel_name(listed)
        assert renamed.get(name, name) == listed


@IS_DTYPE
def test_gradients_come_back_in_the_dtype_of_the_inputs(dtype):
    x, y = tensor(cases.X, "float32", trained=True), tensor(cases.SQUARE, "float32", trained=True)
    gradient = rounded(cases.Y, dtype)
    with paddle.amp.auto_cast(level="O1", dtype=dtype):
        product = paddle.matmul(x, y)
    product.backward(tensor(gradient, dtype))
    assert x.grad.dtype == y.grad.dtype == paddle.float32
    expected = rounded(gradient @ rounded(cases.SQUARE, dtype).T, dtype)
    relative = 2.0**-7 if dtype == "bfloat16" else 2.0**-10
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=relative, atol=1e-6)
    np.testing.assert_array_equal(x.grad.numpy(), rounded(x.grad.numpy(), dtype))


def test_the_state_is_that_of_the_innermost_block():
    x, y = tensor(cases.X, "float32"), tensor(cases.SQUARE, "float32")
    tracer = paddle.base.framework._dygraph_tracer()
    with paddle.amp.auto_cast(level="O1", dtype="bfloat16"):
        assert dtype_of(x @ y) == "bfloat16"
        with paddle.amp.auto_cast(enable=False):
            assert dtype_of(x @ y) == "float32"
        with paddle.amp.auto_cast(level="O2", dtype="float16", custom_black_list=["silu"]):
            assert tracer._amp_level == paddle.base.core.AmpLevel.O2 and tracer._amp_dtype == "float16"
            assert "silu" in tracer._get_amp_op_list()[1]
            assert dtype_of(x @ y) == "float16"
        assert dtype_of(x @ y) == "bfloat16"
    assert dtype_of(x @ y) == "float32"
    assert tracer._amp_level == paddle.base.core.AmpLevel.O0


@IS_DTYPE
def test_decorate_casts_the_weights_and_keeps_what_it_keeps_on_a_gpu(dtype):
    layers = paddle.nn.Sequential(
        paddle.nn.Linear(6, 6), paddle.nn.LayerNorm(6), paddle.nn.BatchNorm1D(6), paddle.nn.Embedding(3, 6)
    )
    optimizer = paddle.optimizer.AdamW(parameters=layers.parameters())
    layers, optimizer = paddle.amp.decorate(layers, optimizer, level="O2", dtype=dtype, master_weight=True)
    kept = "float32" if dtype == "float16" else dtype
    assert [dtype_of(layer.weight) for layer in layers] == [dtype, kept, "float32", dtype]
    assert optimizer._multi_precision
    with paddle.amp.auto_cast(level="O2", dtype=dtype):
        hidden = layers[1](layers[0](paddle.rand([4, 6])))
    assert dtype_of(hidden) == dtype


@IS_DTYPE
def test_decorated_layers_keep_float32_gradients_if_they_are_asked_to(dtype):
    layer = paddle.nn.Linear(6, 6)
    optimizer = paddle.optimizer.AdamW(parameters=layer.parameters())
    layer, optimizer = paddle.amp.decorate(layer, optimizer, level="O2", dtype=dtype, master_grad=True)
    try:
        with paddle.amp.auto_cast(level="O2", dtype=dtype):
            loss = layer(tensor(cases.X, dtype)).astype("float32").mean()
        loss.backward()
        assert dtype_of(layer.weight) == dtype and dtype_of(layer.weight.grad) == "float32"
        optimizer.step()
    finally:
        state = paddle.amp.auto_cast.__globals__["amp_global_state"]()
        state.use_master_grad, state.model_parameters = False, []


def test_numbers_are_converted_once_per_operator():
    """O1 from float32: inputs are rounded, the product is computed in float32, and rounded."""
    with paddle.amp.auto_cast(level="O1", dtype="bfloat16"):
        found = paddle.matmul(tensor(cases.X, "float32"), tensor(cases.SQUARE, "float32"))
    expected = rounded(rounded(cases.X, "bfloat16") @ rounded(cases.SQUARE, "bfloat16"), "bfloat16")
    np.testing.assert_allclose(as_float32(found.numpy()), expected, rtol=2.0**-7, atol=1e-6)
