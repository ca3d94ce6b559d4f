"""Operators that compute half-precision inputs in float32 and round what comes out.

The casts are Paddle's own and part of the autograd graph, so gradients are rounded where values are: the gradient of
a half-precision input is rounded to its type, and one that arrives for a half-precision result has been.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import paddle
from paddle.base import core

from finetune.half_precision import mixed_precision
from finetune.half_precision.operators import DATA_MOVING, DTYPE_PLACE, MIXED, NEVER_CAST, PROMOTING

Tensor = core.eager.Tensor
HALF_TYPES = (paddle.float16, paddle.bfloat16)
FLOAT_TYPES = (*HALF_TYPES, paddle.float32)

ORIGINALS: dict[str, Callable[..., Any]] = {
    name: value
    for name, value in vars(paddle._C_ops).items()
    if not name.startswith("_") and isinstance(value, types.BuiltinFunctionType)
}
"""Paddle's operators as they were when this module was imported, by name."""


def is_half(value: Any) -> bool:
    """Whether a value is a half-precision tensor with content."""
    return isinstance(value, Tensor) and value._is_initialized() and value.dtype in HALF_TYPES


def cast(value: Any, dtype: Any) -> Any:
    """A float32 or half-precision tensor in another of these types; anything else as it is."""
    if isinstance(value, Tensor) and value.dtype in FLOAT_TYPES and value.dtype != dtype:
        return ORIGINALS["cast"](value, dtype)
    return value


def cast_all(values: Any, dtype: Any) -> Any:
    """The same for the tensors in the arguments of an operator, also inside lists."""
    if isinstance(values, dict):
        return {name: cast_all(value, dtype) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)([cast_all(value, dtype) for value in values])
    return cast(values, dtype)


def float_tensors(values: Any) -> Iterator[Any]:
    """All float32, float16 and bfloat16 tensors among arguments, in order."""
    for value in values:
        if isinstance(value, Tensor):
            if value._is_initialized() and value.dtype in FLOAT_TYPES:
                yield value
        elif isinstance(value, (list, tuple)):
            yield from float_tensors(value)


def wrap(name: str, original: Callable[..., Any], *, promotes: bool = False) -> Callable[..., Any]:
    """An operator with half-precision inputs made possible.

    Args:
        name: Of the operator in `paddle._C_ops`, or of the one that a method stands for.
        original: What computes in float32.
        promotes: Whether float32 beside half precision gives float32; else it is refused, unless the operator is
            known to take both.
    """
    promotes = promotes or name in PROMOTING

    def operator(*args: Any, **options: Any) -> Any:
        tensors = [*float_tensors(args), *float_tensors(options.values())]
        if not tensors:
            return original(*args, **options)
        if not mixed_precision.is_active():
            return compute(tensors, args, options)
        chosen = None if name in NEVER_CAST else mixed_precision.choose_dtype(name, tensors)
        with mixed_precision.switched_off():
            if chosen is not None:
                args, options = _cast_to(chosen, name, args, options)
                tensors = [*float_tensors(args), *float_tensors(options.values())]
            return compute(tensors, args, options)

    def compute(tensors: list[Any], args: Any, options: Any) -> Any:
        kinds = {each.dtype for each in tensors}
        if kinds == {paddle.float32} or name in DATA_MOVING:
            return original(*args, **options)
        dtype = _result_dtype(name, tensors, kinds, promotes=promotes)
        if _is_in_place(name) and isinstance(args[0], Tensor):
            return _compute_in_place(name, args, options)
        if name in DTYPE_PLACE:
            args, options, asked = _take_dtype(DTYPE_PLACE[name], args, options)
            if asked is not None:
                return original(*cast_all(args, paddle.float32), **options).astype(asked)
        results = original(*cast_all(args, paddle.float32), **cast_all(options, paddle.float32))
        return _round(results, dtype, MIXED.get(name))

    operator.__name__ = operator.__qualname__ = name
    operator.__doc__ = original.__doc__
    return operator


def _cast_to(dtype: Any, name: str, args: Any, options: Any) -> tuple[Any, Any]:
    if mixed_precision.casts_input_only(name):
        return (cast(args[0], dtype), *args[1:]), options
    return cast_all(args, dtype), cast_all(options, dtype)


def _result_dtype(name: str, tensors: list[Any], kinds: set[Any], *, promotes: bool) -> Any:
    if len(kinds) == 1:
        return tensors[0].dtype
    if promotes:
        return paddle.float32
    if name in MIXED or _is_in_place(name):
        return tensors[0].dtype
    shown = ", ".join(str(each.dtype).rpartition(".")[2] for each in tensors)
    raise TypeError(
        f"operator {name} got tensors of types {shown}; a GPU has no kernel for that: cast them to one type"
    )


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and name[:-1] in ORIGINALS


def _compute_in_place(name: str, args: Any, options: Any) -> Any:
    """Computes out of place and writes the rounded result into the first argument."""
    target = args[0]
    wide = ORIGINALS[name[:-1]](*cast_all(args, paddle.float32), **cast_all(options, paddle.float32))
    return write_into(target, wide[0] if isinstance(wide, (list, tuple)) else wide)


def write_into(target: Any, value: Any) -> Any:
    """Sets a tensor in place to a value, rounded to its type; part of the autograd graph where it can be."""
    value = cast(value, target.dtype)
    if target.stop_gradient or target.is_leaf:
        with paddle.no_grad():
            ORIGINALS["assign_out_"](value, target)
    else:
        ORIGINALS["assign_out_"](value, target)
    return target


def _take_dtype(place: int | None, args: Any, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Arguments without the type that was asked for, and that type, None where none was."""
    asked = options.get("dtype")
    if asked is None and place is not None and len(args) > place:
        asked = args[place]
        args = [*args[:place], None, *args[place + 1 :]]
    options = {name: value for name, value in options.items() if name != "dtype"}
    return args, options, None if asked == core.DataType.UNDEFINED else asked


def _round(results: Any, dtype: Any, num_rounded: int | None) -> Any:
    """Float32 results in half precision; `num_rounded` counts those of a tuple that are rounded, None for all."""
    if isinstance(results, (list, tuple)):
        last = len(results) if num_rounded is None else num_rounded
        rounded = [
            _round(each, dtype, None) if number < last else each for number, each in enumerate(results)
        ]
        return type(results)(rounded)
    if isinstance(results, Tensor) and results._is_initialized() and results.dtype == paddle.float32:
        return cast(results, dtype)
    return results


def wrapped_operators(*, special: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """A stand-in for every operator.

    Args:
        special: Stand-ins that are more than a cast around the operator.
    """
    return {name: special.get(name) or wrap(name, original) for name, original in ORIGINALS.items()}


def find_uses(operators: Mapping[str, Callable[..., Any]]) -> Iterator[tuple[Any, str, Any]]:
    """Where Paddle and PaddleNLP hold the operators: in `paddle._C_ops`, and by name in many modules.

    Yields:
        (module or class, attribute, stand-in).
    """
    by_identity = {id(ORIGINALS[name]): operator for name, operator in operators.items()}
    for name, operator in operators.items():
        yield paddle._C_ops, name, operator
    for module in list(sys.modules.values()):
        name = getattr(module, "__name__", "")
        if name.split(".")[0] not in ("paddle", "paddlenlp") or name.startswith("paddle.base.libpaddle"):
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, types.BuiltinFunctionType) and id(value) in by_identity:
                yield module, attribute, by_identity[id(value)]
    for attribute, value in list(vars(Tensor).items()):
        if isinstance(value, types.BuiltinFunctionType) and id(value) in by_identity:
            yield Tensor, attribute, by_identity[id(value)]
