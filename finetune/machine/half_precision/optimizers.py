"""Optimizers' kernels on half-precision parameters.

The kernels of a GPU read the float32 copy of a parameter (the master weight) where there is one, and the parameter
otherwise; compute in float32 whatever the dtypes of the gradient and of the moments are; and write the parameter
rounded, beside the master weight. Those of the CPU update a float32 tensor, which here is the master weight, or a
float32 copy of the parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from finetune.machine.half_precision.tensor_types import (
    Tensor,
    convert,
    find_tensors,
    is_half,
    overwrite,
    widen,
)


@dataclass(frozen=True)
class Signature:
    """Where an optimizer's kernel has its arguments, counted from 0; the parameter is the first.

    Attributes:
        gradient: The gradient.
        master: The master weight, or None in its place.
        multi_precision: Whether there is one.
        states: Tensors that it updates besides.
    """

    gradient: int
    master: int
    multi_precision: int
    states: tuple[int, ...]


SIGNATURES = {
    "adamw_": Signature(gradient=1, master=8, multi_precision=18, states=(3, 4, 5, 6, 7)),
    "adam_": Signature(gradient=1, master=8, multi_precision=15, states=(3, 4, 5, 6, 7)),
    "sgd_": Signature(gradient=2, master=3, multi_precision=4, states=()),
    "momentum_": Signature(gradient=1, master=4, multi_precision=9, states=(2,)),
    "adagrad_": Signature(gradient=1, master=4, multi_precision=6, states=(2,)),
    "adamax_": Signature(gradient=1, master=6, multi_precision=10, states=(3, 4, 5)),
    "lamb_": Signature(gradient=1, master=7, multi_precision=14, states=(3, 4, 5, 6)),
    "rmsprop_": Signature(gradient=2, master=6, multi_precision=11, states=(1, 3, 5)),
}
"""Kernels by their names in `paddle._C_ops`."""


class OptimizerCall:
    """Stands for an optimizer's kernel.

    Args:
        name: In `paddle._C_ops`.
        original: Paddle's function.
    """

    def __init__(self, name: str, original: Callable[..., Any]):
        self.original, self.signature = original, SIGNATURES[name]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Updates the parameter; the arguments are Paddle's, by position, as its optimizers give them."""
        tensors, _ = find_tensors(args, kwargs)
        if not any(is_half(tensor.dtype) for tensor in tensors):
            return self.original(*args, **kwargs)
        where, values = self.signature, list(args)
        parameter, master = args[0], args[where.master]
        values[where.gradient] = widen(args[where.gradient])
        if is_half(parameter.dtype):
            values[0] = convert(parameter, "float32") if master is None else master
            values[where.master], values[where.multi_precision] = None, False
        for place in where.states:
            if isinstance(args[place], Tensor):
                values[place] = widen(args[place])
        result = self.original(*values, **kwargs)
        for place in (0, *where.states):
            # A parameter is a rounded copy of its master weight; moments may be in half precision, too.
            if isinstance(args[place], Tensor) and is_half(args[place].dtype):
                overwrite(args[place], values[place])
        return result
