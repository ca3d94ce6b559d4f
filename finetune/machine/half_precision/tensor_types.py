"""What the stand-ins ask of tensors and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paddle
from paddle.base import core

Tensor: Any = core.eager.Tensor
DataType: Any = core.DataType
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = paddle.float64, paddle.float32, paddle.float16, paddle.bfloat16
NAMED = {"float64": FLOAT64, "float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}

# Paddle's own, whatever is replaced later. Paddle has one object for each dtype, so `is` compares them (five times
# as fast as `==`).
convert = paddle._C_ops.cast
assign_into = paddle._C_ops.assign_out_


def is_half(dtype: Any) -> bool:
    """Whether a dtype is float16 or bfloat16."""
    return dtype is BFLOAT16 or dtype is FLOAT16


def is_float(dtype: Any) -> bool:
    """Whether a dtype is one of the four floating-point dtypes that operators compute in."""
    return dtype is FLOAT32 or dtype is BFLOAT16 or dtype is FLOAT16 or dtype is FLOAT64


def find_tensors(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[list[Any], Any]:
    """What an operator was given.

    Args:
        args: Its arguments.
        kwargs: Those by name.

    Returns:
        The floating-point tensors in order, those in lists among them; and the floating-point dtype that it is
        asked to return, None where there is none.
    """
    tensors: list[Any] = []
    asked = None
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            if is_float(value.dtype):
                tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors += [each for each in value if isinstance(each, Tensor) and is_float(each.dtype)]
        elif (dtype := as_dtype(value)) is not None:
            asked = dtype
    return tensors, asked


def as_dtype(value: Any) -> Any:
    """The floating-point dtype that an argument is or names, None if it is something else."""
    if isinstance(value, str):
        return NAMED.get(value)
    return value if isinstance(value, DataType) and is_float(value) else None


def map_tensors(value: Any, function: Callable[[Any], Any]) -> Any:
    """Applies a function to a tensor, or to the tensors in a list or tuple of any depth; other values stay."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, list | tuple) and value and isinstance(value[0], Tensor | list | tuple):
        return type(value)(map_tensors(each, function) for each in value)
    return value


def map_arguments(
    args: Sequence[Any], kwargs: dict[str, Any], function: Callable[[Any], Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Applies a function to every tensor among the arguments of a call."""
    return [map_tensors(value, function) for value in args], {
        name: map_tensors(value, function) for name, value in kwargs.items()
    }


def to_dtype(tensor: Any, dtype: Any) -> Any:
    """A floating-point tensor in another dtype; all other tensors as they are."""
    return convert(tensor, dtype) if tensor.dtype is not dtype and is_float(tensor.dtype) else tensor


def widen(tensor: Any) -> Any:
    """A half-precision tensor in float32, where nothing is lost; all other tensors as they are."""
    return convert(tensor, FLOAT32) if is_half(tensor.dtype) else tensor


def round_to(tensor: Any, dtype: Any) -> Any:
    """A float32 tensor in half precision, rounded to nearest, ties to even; all other tensors as they are."""
    return convert(tensor, dtype) if tensor.dtype is FLOAT32 and tensor._is_initialized() else tensor


def overwrite(tensor: Any, value: Any) -> None:
    """Sets a tensor to a value, rounded to its dtype, in place; the gradient goes to the value."""
    assign_into(to_dtype(value, tensor.dtype), tensor)
