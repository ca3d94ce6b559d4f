"""Operators that write into one of their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle

from finetune.machine.half_precision.calls import OperatorCall
from finetune.machine.half_precision.operators import PROMOTES, SCALARS_AFTER_FIRST, SECOND_IS_WRITTEN
from finetune.machine.half_precision.tensor_types import (
    Tensor,
    convert,
    find_tensors,
    is_half,
    overwrite,
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
            TypeError: The dtypes do not go together.
        """
        tensors, asked = find_tensors(args[:1] if self.first_only else args, kwargs)
        dtypes = {tensor.dtype for tensor in tensors}
        if not any(map(is_half, dtypes)):
            return self.original(*args, **kwargs)
        if len(dtypes) > 1 and self.name.removesuffix("_") in PROMOTES:
            # Paddle turns the written tensor itself into one of a wider dtype, in which CPU has a kernel.
            return self.original(*args, **kwargs)
        written = args[self.position] if len(args) > self.position else kwargs["x"]
        if self.base is None:
            return self._change_copy(written, args, kwargs)
        if written.is_leaf and not written.stop_gradient:
            # Refuses to write into a parameter while gradients are recorded; the assignment below would not.
            paddle._C_ops.reshape_(written, written.shape)
        result = self.base.compute(args, kwargs, tensors, asked)
        first, *others = result if isinstance(result, list | tuple) else (result,)
        overwrite(written, first)
        return (written, *others) if others else written

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
