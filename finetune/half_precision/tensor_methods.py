"""Operators that Paddle's Tensor class has in C++ (`a + b`, `a[i]`), for half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import paddle

from finetune.half_precision import mixed_precision
from finetune.half_precision.wrapping import ORIGINALS, Tensor, cast, is_half, wrap, write_into

_METHODS = {
    "__add__": "add",
    "__radd__": "add",
    "__sub__": "subtract",
    "__rsub__": "subtract",
    "__mul__": "multiply",
    "__rmul__": "multiply",
    "__div__": "divide",
    "__rdiv__": "divide",
    "__truediv__": "divide",
    "__rtruediv__": "divide",
    "__floordiv__": "floor_divide",
    "__rfloordiv__": "floor_divide",
    "__mod__": "remainder",
    "__rmod__": "remainder",
    "__pow__": "elementwise_pow",
    "__rpow__": "elementwise_pow",
    "__matmul__": "matmul",
    "__rmatmul__": "matmul",
    "__gt__": "greater_than",
    "__ge__": "greater_equal",
    "__lt__": "less_than",
    "__le__": "less_equal",
    "__eq__": "equal",
    "__ne__": "not_equal",
    "__neg__": "scale",
    "__abs__": "abs",
}


def replacements() -> Iterator[tuple[Any, str, Any]]:
    """(class, attribute, stand-in)."""
    for method, name in _METHODS.items():
        if original := getattr(Tensor, method, None):
            yield Tensor, method, _as_method(wrap(name, original))
    yield Tensor, "clone", _without_casts(Tensor.clone)
    yield Tensor, "__getitem__", _get_item(Tensor.__getitem__)
    yield Tensor, "__setitem__", _set_item(Tensor.__setitem__)


def _as_method(operator: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *others: Any) -> Any:
        return operator(self, *others)

    method.__name__ = operator.__name__
    return method


def _without_casts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps `auto_cast` from a method: on a CPU Paddle knows no half-precision kernels, and would cast to float32."""

    def method(self: Any, *args: Any, **options: Any) -> Any:
        with mixed_precision.switched_off():
            return original(self, *args, **options)

    return method


def _has_tensor_index(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.ndim for part in parts)


def _get_item(original: Callable[..., Any]) -> Callable[..., Any]:
    """Indexing by tensors has no half-precision kernel; slices have, and stay views."""

    def method(self: Any, index: Any) -> Any:
        with mixed_precision.switched_off():
            if not (is_half(self) and _has_tensor_index(index)):
                return original(self, index)
            return cast(original(cast(self, paddle.float32), index), self.dtype)

    return method


def _set_item(original: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, index: Any, value: Any) -> None:
        with mixed_precision.switched_off():
            if not (is_half(self) and _has_tensor_index(index)):
                original(self, index, cast(value, self.dtype) if is_half(self) else value)
                return
            wide = ORIGINALS["assign"](cast(self, paddle.float32))
            original(wide, index, cast(value, paddle.float32))
            write_into(self, wide)

    return method
