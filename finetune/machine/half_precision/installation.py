"""Puts the stand-ins for half precision on CPU in place, and takes them away again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, ModuleType
from typing import Any

import paddle
from paddle.base.dygraph.tracer import Tracer

from finetune.machine.half_precision import auto_cast, loss_scaling
from finetune.machine.half_precision.calls import OperatorCall
from finetune.machine.half_precision.fused import LinearCall
from finetune.machine.half_precision.in_place import InPlaceCall
from finetune.machine.half_precision.methods import make_getitem, make_method, make_setitem
from finetune.machine.half_precision.operators import METHODS, MOVES_DATA
from finetune.machine.half_precision.optimizers import SIGNATURES, OptimizerCall
from finetune.machine.half_precision.tensor_types import Tensor
from finetune.machine.stand_ins import replace, replace_import

_ABSENT = object()
# What was replaced: owner, name, and what stood there; in order.
_replaced: list[tuple[Any, str, Any]] = []
_installed = False


def is_installed() -> bool:
    """Whether the stand-ins are in place."""
    return _installed


def install() -> None:
    """Puts the stand-ins in place; a second call changes nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    auto_cast.state.reset()
    _replace_operators()
    _replace_methods()
    _replace_auto_cast()


def uninstall() -> None:
    """Puts back what stood there before; modules that were imported meanwhile keep what they took."""
    global _installed
    for owner, name, original in reversed(_replaced):
        if original is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    _replaced.clear()
    _installed = False


def operator_functions() -> dict[str, Callable[..., Any]]:
    """Paddle's operators by name."""
    return {
        name: value
        for name, value in vars(paddle._C_ops).items()
        if isinstance(value, BuiltinFunctionType) and not name.startswith("_")
    }


def _put(owner: Any, name: str, value: Any) -> None:
    _replaced.append((owner, name, vars(owner).get(name, _ABSENT)))
    replace(owner, name, value)


def _replace_operators() -> None:
    originals = operator_functions()
    names = auto_cast.list_names()
    stand_ins = {
        id(original): _stand_in(name, originals, names)
        for name, original in originals.items()
        if not (name in MOVES_DATA and name.endswith("_")) and name != "cast"
    }
    legacy = paddle._legacy_C_ops
    check = legacy.check_finite_and_unscale
    for module in _modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, BuiltinFunctionType) and id(value) in stand_ins:
                _replaced.append((module, name, value))
                stand_in = stand_ins[id(value)]
                replace_import(module, name, stand_in, source=f"paddle._C_ops.{stand_in.__name__}")
    # Paddle gives the modules of its operators the names of others.
    _replaced.append((legacy, "check_finite_and_unscale", check))
    replace_import(
        legacy,
        "check_finite_and_unscale",
        loss_scaling.make_check(check),
        source="paddle._legacy_C_ops.check_finite_and_unscale",
    )


def _stand_in(name: str, originals: dict[str, Any], list_names: dict[str, str]) -> Callable[..., Any]:
    original, base = originals[name], name.removesuffix("_")
    call: Any
    if name == "linear":
        call = LinearCall(original)
    elif name == "check_finite_and_unscale_":
        return loss_scaling.make_operator(original)
    elif name in SIGNATURES:
        call = OptimizerCall(name, original)
    elif name.endswith("_"):
        computed = OperatorCall(base, originals[base], "") if base in originals else None
        call = InPlaceCall(name, original, computed)
    else:
        call = OperatorCall(name, original, list_names.get(name, name))
    return _as_function(call, name)


def _as_function(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A plain function, which Paddle may set as a method."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    stand_in.__name__ = stand_in.__qualname__ = name
    return stand_in


def _modules() -> Iterator[Any]:
    """Modules that may hold one of Paddle's operators under a name of their own."""
    for name, module in list(sys.modules.items()):
        is_theirs = name.split(".")[0] in ("paddle", "paddlenlp")
        # The modules in C++ keep Paddle's own functions.
        if is_theirs and isinstance(module, ModuleType) and not name.startswith("paddle.base.libpaddle"):
            yield module


def _replace_methods() -> None:
    names = auto_cast.list_names()
    for name in METHODS:
        if name in vars(Tensor):
            _put(Tensor, name, make_method(name, vars(Tensor)[name], names))
    _put(Tensor, "_getitem_dygraph", make_getitem(Tensor._getitem_dygraph))
    _put(Tensor, "_setitem_dygraph", make_setitem(Tensor._setitem_dygraph))


def _replace_auto_cast() -> None:
    for name, value in auto_cast.tracer_attributes().items():
        _put(Tracer, name, value)
    modules = [sys.modules["paddle.amp.auto_cast"], sys.modules["paddle.amp.grad_scaler"]]
    for module in modules:
        _put(module, "_dygraph_tracer", _gpu_tracer_of(module._dygraph_tracer))
    for name in ("_is_gpu_float16_supported", "_is_gpu_bfloat16_supported"):
        _put(modules[0], name, lambda: True)


def _gpu_tracer_of(find_tracer: Callable[[], Any]) -> Callable[[], Any]:
    def gpu_tracer() -> Any:
        tracer = find_tracer()
        return None if tracer is None else auto_cast.GpuTracer(tracer)

    return gpu_tracer
