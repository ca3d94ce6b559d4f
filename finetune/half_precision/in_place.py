"""Operators that write into one of their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune.half_precision.calls import OperatorCall, common_dtype, dtype_name
from finetune.half_precision.operators import SCALARS_AFTER_FIRST, SECOND_IS_WRITTEN
from finetune.half_precision.tensor_types import (
    Tensor,
    convert,
    is_half,
    map_arguments,
    overwrite,
    scan,
    to_dtype,
    widen,
)


class InPlaceCall:
    """Stands for one operator that writes its result into an input.

    Args:
        name: In `paddle._C_ops`, with "_" at the end.
        original: Paddle's function.
        base: Stands for the operator that returns the result as a new tensor; None where Paddle has none.
    """

    def __init__(self, name: str, original: Callable[..., Any], base: OperatorCall | None):
        self.name, self.original, self.base = name, original, base
        self.position = 1 if name in SECOND_IS_WRITTEN else 0
        self.first_only = name in SCALARS_AFTER_FIRST

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the operator; its arguments are Paddle's.

        Raises:
            TypeError: The result has a wider dtype than the tensor that it is written into.
        """
        tensors, asked = scan(args[:1] if self.first_only else args, kwargs)
        if not any(is_half(tensor.dtype) for tensor in tensors):
            return self.original(*args, **kwargs)
        written = args[self.position] if len(args) > self.position else kwargs["x"]
        if not is_half(written.dtype):
            return self._write_wider(written, args, kwargs, tensors)
        if self.base is None:
            return self._change_copy(written, args, kwargs)
        self._check(written, tensors)
        result = self.base.compute(args, kwargs, tensors, asked)
        first, *others = result if isinstance(result, list | tuple) else (result,)
        overwrite(written, first)
        return (written, *others) if others else written

    def _write_wider(self, written: Any, args: Any, kwargs: dict[str, Any], tensors: list[Any]) -> Any:
        """Half-precision inputs beside a wider one that is written."""
        self._check(written, tensors)
        args, kwargs = map_arguments(args, kwargs, lambda tensor: to_dtype(tensor, written.dtype))
        return self.original(*args, **kwargs)

    def _change_copy(self, written: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """For operators that draw or fill, and have no gradient."""
        copy = convert(written.detach(), "float32")
        args = [
            copy if each is written else widen(each) if isinstance(each, Tensor) else each for each in args
        ]
        kwargs = {name: copy if each is written else each for name, each in kwargs.items()}
        self.original(*args, **kwargs)
        overwrite(written, copy)
        return written

    def _check(self, written: Any, tensors: list[Any]) -> None:
        name = self.name.removesuffix("_")
        result = common_dtype(name, tensors)
        if result is not written.dtype:
            raise TypeError(
                f"{self.name} would write {dtype_name(result)} into a tensor of {dtype_name(written.dtype)}"
            )
