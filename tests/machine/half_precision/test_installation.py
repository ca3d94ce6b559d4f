"""What is replaced, when, and that nothing is where it was not asked for."""

from __future__ import annotations

import sys

import paddle
import pytest

from finetune.machine import half_precision
from tests.conftest import launch

# A process of its own, with the half-precision mode or without.
COMPARE = """
import sys
import paddle, paddlenlp
from types import BuiltinFunctionType

def state():
    operators = {name: value for name, value in vars(paddle._C_ops).items()}
    return {**operators, **{"." + name: value for name, value in vars(paddle.Tensor).items()}}

def differing(one, other):
    return [name for name in one if one[name] is not other.get(name)]

before = state()
from finetune.machine import half_precision
assert not half_precision.is_installed() and not differing(before, state())
half_precision.uninstall()
assert "finetune.machine.half_precision.installation" not in sys.modules
abs_before = paddle.tensor.math.abs  # imported by name
half_precision.install()
installed = state()
assert {"add", "matmul", "softmax", ".__add__", "._getitem_dygraph"} <= set(differing(before, installed))
assert half_precision.is_installed()
half_precision.install()
assert not differing(installed, state())
assert paddle.tensor.math.abs is not abs_before and paddle.tensor.math.abs is paddle._C_ops.abs
from paddle._C_ops import abs as imported_later
assert imported_later(paddle.to_tensor([-1.0]).astype("bfloat16")).dtype == paddle.bfloat16
half_precision.uninstall()
assert not differing(before, state()) and paddle.tensor.math.abs is abs_before and not half_precision.is_installed()
assert "_amp_level" not in vars(paddle.base.dygraph.tracer.Tracer)
"""


def test_install_and_uninstall():
    result = launch("-c", COMPARE)
    assert result.returncode == 0, result.stderr[-2000:]


def test_importing_the_package_imports_no_paddle():
    source = (
        "import sys\nimport finetune.machine.half_precision as h\nassert not h.is_installed()\n"
        "import finetune.machine.half_precision.operators\nassert 'paddle' not in sys.modules"
    )
    result = launch("-c", source)
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_module_that_is_imported_later_has_the_stand_ins(tmp_path, monkeypatch):
    (tmp_path / "half_precision_later.py").write_text("from paddle import abs, tanh\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import half_precision_later

    x = paddle.to_tensor([-1.5]).astype("bfloat16")
    assert half_precision_later.abs(x).dtype == half_precision_later.tanh(x).dtype == paddle.bfloat16
    sys.modules.pop("half_precision_later")


def test_the_mode_of_a_block_ends_with_it_and_a_mode_around_it_stays():
    assert half_precision.is_installed()
    with half_precision.half_precision_on_cpu():
        pass
    assert half_precision.is_installed()
    half_precision.uninstall()
    try:
        with pytest.raises(KeyError), half_precision.half_precision_on_cpu():
            assert half_precision.is_installed()
            raise KeyError
        assert not half_precision.is_installed()
    finally:
        half_precision.install()


def test_float32_results_are_those_without_the_mode():
    def results() -> list[float]:
        paddle.seed(5)
        x = paddle.randn([6, 6])
        x.stop_gradient = False
        y = paddle.nn.functional.softmax(x @ x.T + 1.0, -1)[paddle.to_tensor([0, 1])]
        y.sum().backward()
        return [*y.flatten().tolist(), *x.grad.flatten().tolist()]

    with_mode = results()
    half_precision.uninstall()
    try:
        assert results() == with_mode
    finally:
        half_precision.install()


def test_static_graphs_are_left_alone():
    paddle.enable_static()
    try:
        with paddle.static.program_guard(paddle.static.Program()):
            x = paddle.static.data("x", [2, 3], "float32")
            assert paddle.cast(x @ x.T, "bfloat16").dtype == paddle.base.core.DataType.BFLOAT16
            assert paddle.full([2], 1.0, "bfloat16").dtype == paddle.base.core.DataType.BFLOAT16
    finally:
        paddle.disable_static()
