"""Arithmetic and indexing of tensors, whose methods are written in C++."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
import paddle

from finetune.machine.half_precision.calls import OperatorCall
from finetune.machine.half_precision.operators import METHODS, SCALAR_METHODS
from finetune.machine.half_precision.tensor_types import (
    FLOAT32,
    Tensor,
    convert,
    is_half,
    overwrite,
    round_to,
    widen,
)


def make_method(name: str, original: Callable[..., Any], list_names: dict[str, str]) -> Callable[..., Any]:
    """Stands for a method of two operands.

    Args:
        name: Of the method.
        original: Paddle's.
        list_names: Names of operators in the lists of `paddle.amp`, where they differ.

    Returns:
        What takes its place.
    """
    operator = METHODS[name]
    with_tensor = OperatorCall(operator, original, list_names.get(operator, operator))
    scalar_operator = SCALAR_METHODS.get(name, operator)
    with_number = OperatorCall(scalar_operator, original, list_names.get(scalar_operator, scalar_operator))
    fills_tensor = name not in SCALAR_METHODS

    def method(self: Any, other: Any) -> Any:
        if isinstance(other, np.ndarray) and other.ndim:
            other = paddle.to_tensor(other)
        if isinstance(other, Tensor):
            return with_tensor(self, other)
        if fills_tensor and isinstance(other, Real) and is_half(self.dtype):
            # The number becomes a tensor of the other operand's dtype first.
            other = float(convert(paddle.full([], float(other), FLOAT32), self.dtype))
        return with_number(self, other)

    method.__name__ = method.__qualname__ = name
    return method


def make_getitem(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for `Tensor._getitem_dygraph`: gradients of elements that are taken twice are added in float32."""

    def getitem(self: Any, index: Any) -> Any:
        if is_half(self.dtype) and _takes_elements(index):
            return round_to(original(widen(self), index), self.dtype)
        return original(self, index)

    return getitem


def make_setitem(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for `Tensor._setitem_dygraph`, whose gradients have no half-precision kernels on CPU."""

    def setitem(self: Any, index: Any, value: Any) -> Any:
        if not is_half(self.dtype):
            return original(self, index, widen(value) if isinstance(value, Tensor) else value)
        if isinstance(value, Tensor):
            value = widen(convert(value, self.dtype))
        changed = convert(self, FLOAT32)
        original(changed, index, value)
        overwrite(self, changed)
        return self

    return setitem


def _takes_elements(index: Any) -> bool:
    """Whether an index picks elements by number or by mask, and so is no view."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list | np.ndarray | Tensor) for part in parts)
