"""`paddle.amp` on a CPU: its own code with a GPU in its sight, and the choice of types that it leaves to C++.

Inside `auto_cast` Paddle's C++ code picks a type for every operator, casts the inputs and looks for a kernel, which a
CPU lacks. So the same choice is made here, before the operator is called with `auto_cast` switched off.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import paddle
from paddle.amp import grad_scaler
from paddle.base import core, framework

from finetune.half_precision.operators import names_in_lists

_OFF, _O2 = core.AmpLevel.O0, core.AmpLevel.O2
_HALF = {"float16": paddle.float16, "bfloat16": paddle.bfloat16}
_CASTS_INPUT_ONLY = frozenset({"layer_norm", "batch_norm", "sync_batch_norm"})
_FOLLOWS_FIRST_INPUT = _CASTS_INPUT_ONLY | {"group_norm", "instance_norm"}


def is_active() -> bool:
    """Whether the caller is inside `auto_cast`."""
    return bool(framework._dygraph_tracer()._amp_level != _OFF)


@contextmanager
def switched_off() -> Iterator[None]:
    """No automatic casts within the block; cheaper than `auto_cast(enable=False)`."""
    tracer = framework._dygraph_tracer()
    level = tracer._amp_level
    tracer._amp_level = _OFF
    try:
        yield
    finally:
        tracer._amp_level = level


def choose_dtype(name: str, tensors: Sequence[Any]) -> Any:
    """The type in which `auto_cast` computes an operator, as Paddle's C++ code has it.

    White-listed operators compute in half precision, black-listed ones in float32. The others compute in float32 as
    soon as one input is float32; at level O2 without `use_promote` they compute in half precision, too.

    Args:
        name: The operator, as in `paddle._C_ops`.
        tensors: Its inputs of type float32, float16 or bfloat16.
    """
    tracer = framework._dygraph_tracer()
    half = _HALF[str(tracer._amp_dtype).rpartition(".")[2].lower()]
    white, black = tracer._get_amp_op_list()
    names = names_in_lists(name)
    if tracer._amp_level == _O2 and not tracer._use_promote:
        return paddle.float32 if names & set(black) else half
    if names & set(white):
        return half
    if names & set(black):
        return paddle.float32
    if name in _FOLLOWS_FIRST_INPUT:
        return paddle.float32 if tensors[0].dtype == paddle.float32 else half
    return paddle.float32 if any(each.dtype == paddle.float32 for each in tensors) else half


def casts_input_only(name: str) -> bool:
    """Whether only the first input of an operator is cast: weights of norms keep their type."""
    return name in _CASTS_INPUT_ONLY


class _GpuPlace:
    """The place that `paddle.amp` asks for; it looks like a GPU."""

    def __init__(self, place: Any):
        self._place = place

    def is_gpu_place(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._place, name)


class _GpuTracer:
    """Paddle's tracer, but for its place."""

    def __init__(self, tracer: Any):
        object.__setattr__(self, "_tracer", tracer)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._tracer, name)
        return _GpuPlace(value) if name == "_expected_place" else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tracer, name, value)


def _gpu_tracer() -> _GpuTracer:
    return _GpuTracer(framework._dygraph_tracer())


def _always() -> bool:
    return True


def replacements() -> Iterator[tuple[Any, str, Any]]:
    """Checks of `paddle.amp` that the device is a GPU: (module, attribute, stand-in)."""
    # `paddle.amp.auto_cast` is a function of the module's name.
    auto_cast_module = importlib.import_module("paddle.amp.auto_cast")
    yield auto_cast_module, "_dygraph_tracer", _gpu_tracer
    yield auto_cast_module, "_is_gpu_float16_supported", _always
    yield auto_cast_module, "_is_gpu_bfloat16_supported", _always
    yield grad_scaler, "_dygraph_tracer", _gpu_tracer
