"""Operators that compute in float32 and round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paddle

from finetune.machine.half_precision import auto_cast
from finetune.machine.half_precision.operators import (
    CHECKS_ITSELF,
    FLOAT32_OUTPUTS,
    MIXES,
    MOVES_DATA,
    NO_AUTO_CAST,
    PROMOTES,
    ROUNDS_FIRST,
    SCALARS_AFTER_FIRST,
    SCALARS_GIVE_WAY,
)
from finetune.machine.half_precision.tensor_types import (
    FLOAT32,
    FLOAT64,
    as_dtype,
    find_tensors,
    is_half,
    map_arguments,
    map_tensors,
    round_to,
    to_dtype,
    widen,
)


class OperatorCall:
    """Stands for one operator.

    Args:
        name: In `paddle._C_ops`.
        original: Paddle's function.
        listed: The operator's name in the lists of `paddle.amp`.
    """

    def __init__(self, name: str, original: Callable[..., Any], listed: str):
        self.name, self.original, self.listed = name, original, listed
        self.first_only = name in SCALARS_AFTER_FIRST
        self.is_native = name in MOVES_DATA or name in CHECKS_ITSELF
        self.auto_casts = name not in NO_AUTO_CAST and not name.endswith("_")

    def __call__(self, *arguments: Any, **kwargs: Any) -> Any:
        """Calls the operator; its arguments are Paddle's."""
        args: Sequence[Any] = arguments
        if self.is_native and not (auto_cast.state.enabled and self.auto_casts):
            return self.original(*args, **kwargs)
        tensors, asked = find_tensors(args[:1] if self.first_only else args, kwargs)
        if tensors and auto_cast.state.enabled and self.auto_casts:
            args, kwargs, tensors = self._auto_cast(args, kwargs, tensors)
        if self.is_native:
            return self.original(*args, **kwargs)
        if not any(is_half(tensor.dtype) for tensor in tensors):
            return self._return_asked(args, kwargs, tensors, asked)
        return self.compute(args, kwargs, tensors, asked)

    def compute(self, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Any], asked: Any) -> Any:
        """Computes in float32 from tensors of which one at least is in half precision.

        Args:
            args: The operator's arguments.
            kwargs: Those by name.
            tensors: The floating-point ones among them.
            asked: The dtype that the caller asks for; None for the operator's own.

        Raises:
            TypeError: The dtypes do not go together.
        """
        dtype = common_dtype(self.name, tensors)
        if not is_half(dtype):
            args, kwargs = map_arguments(args, kwargs, lambda tensor: to_dtype(tensor, dtype))
            return self.original(*args, **kwargs)
        if asked is not None and asked is not dtype and self.name in ROUNDS_FIRST:
            args, kwargs = map_arguments(args, kwargs, lambda tensor: to_dtype(tensor, asked))
            dtype = asked
        result = self._call_widened(args, kwargs, dtype if self.name in PROMOTES else None)
        if asked is not None and not is_half(asked):
            return result
        return self._round(result, asked or dtype)

    def _call_widened(self, args: Sequence[Any], kwargs: dict[str, Any], dtype: Any) -> Any:
        """Calls Paddle's function with float32 for all half precision, first rounded to `dtype` if there is one."""

        def prepare(tensor: Any) -> Any:
            return widen(tensor if dtype is None else to_dtype(tensor, dtype))

        if self.first_only:
            return self.original(prepare(args[0]), *map(_plain_dtype, args[1:]), **kwargs)
        widened, named = map_arguments(args, kwargs, prepare)
        return self.original(
            *map(_plain_dtype, widened), **{name: _plain_dtype(value) for name, value in named.items()}
        )

    def _round(self, result: Any, dtype: Any) -> Any:
        kept = FLOAT32_OUTPUTS.get(self.name, ())
        if kept and isinstance(result, list | tuple):
            return type(result)(
                each if position in kept else map_tensors(each, lambda tensor: round_to(tensor, dtype))
                for position, each in enumerate(result)
            )
        return result if 0 in kept else map_tensors(result, lambda tensor: round_to(tensor, dtype))

    def _auto_cast(
        self, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Any]
    ) -> tuple[Sequence[Any], dict[str, Any], list[Any]]:
        dtype = auto_cast.decide(self.name, self.listed, tensors)
        convert_input = auto_cast.converter(self.name, tensors, dtype)
        if self.first_only:
            args = [convert_input(args[0]), *args[1:]]
        else:
            args, kwargs = map_arguments(args, kwargs, convert_input)
        return args, kwargs, find_tensors(args[:1] if self.first_only else args, kwargs)[0]

    def _return_asked(
        self, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Any], asked: Any
    ) -> Any:
        """Calls Paddle's function without half-precision inputs; half precision may be asked for all the same."""
        if not is_half(asked) or not paddle.in_dynamic_mode():
            return self.original(*args, **kwargs)
        if tensors and self.name in ROUNDS_FIRST:
            args, kwargs = map_arguments(args, kwargs, lambda tensor: to_dtype(tensor, asked))
        return self._round(self._call_widened(args, kwargs, None), asked)


def common_dtype(name: str, tensors: Sequence[Any]) -> Any:
    """The dtype that an operator returns, before `dtype` arguments and outputs of a fixed dtype.

    Args:
        name: In `paddle._C_ops`.
        tensors: Its floating-point inputs in order, at least one.

    Raises:
        TypeError: The inputs are of several dtypes, and a GPU would refuse them.
    """
    first = tensors[0].dtype
    others = {tensor.dtype for tensor in tensors if tensor.dtype is not first}
    if not others:
        return first
    if name in PROMOTES:
        return promoted_dtype(name, tensors)
    if name in MIXES and others == {FLOAT32}:
        return first
    names = ", ".join(dict.fromkeys(dtype_name(tensor.dtype) for tensor in tensors))
    raise TypeError(
        f"{name} was given tensors of {names}: on a GPU its inputs must be of one dtype, so convert them before"
    )


def promoted_dtype(name: str, tensors: Sequence[Any]) -> Any:
    """The dtype that Paddle converts tensors of several dtypes to.

    Args:
        name: Of the operator in `paddle._C_ops`.
        tensors: Its floating-point inputs.
    """
    deciding = [tensor.dtype for tensor in tensors if tensor.ndim or name not in SCALARS_GIVE_WAY]
    dtypes = set(deciding or [tensor.dtype for tensor in tensors])
    if FLOAT64 in dtypes:
        return FLOAT64
    return dtypes.pop() if len(dtypes) == 1 else FLOAT32


def dtype_name(dtype: Any) -> str:
    """The name of a dtype, without Paddle's prefix."""
    return str(dtype).removeprefix("paddle.")


def _plain_dtype(value: Any) -> Any:
    """float32 for a half-precision dtype that is asked for."""
    return FLOAT32 if is_half(as_dtype(value)) else value
