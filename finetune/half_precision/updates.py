"""What changes weights: AdamW with master weights, GradScaler's check, and the operator that makes ranges.

Paddle's optimizers make master weights and moments in Python; only the kernel that uses them is a GPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle
from paddle.amp import grad_scaler

from finetune.half_precision import mixed_precision
from finetune.half_precision.wrapping import HALF_TYPES, ORIGINALS, cast, is_half, write_into

_MASTER, _SKIP_UPDATE, _MULTI_PRECISION = 8, 9, 18
"""Places among the arguments of `paddle._C_ops.adamw_`."""


def adamw_(*args: Any) -> Any:
    """Stands for the GPU kernel of `paddle._C_ops.adamw_`, whose arguments these are.

    With a master weight, the update is that of the float32 master weight, and the parameter becomes its rounded copy.
    A gradient may be float32 beside a half-precision parameter.
    """
    parameter, gradient, master = args[0], args[1], args[_MASTER]
    values = list(args)
    values[1] = cast(gradient, paddle.float32)
    if parameter.dtype not in HALF_TYPES:
        return ORIGINALS["adamw_"](*values)
    if args[_SKIP_UPDATE] is not None and bool(args[_SKIP_UPDATE]):
        return args[0], *args[3:9]
    with mixed_precision.switched_off():
        wide = cast(parameter, paddle.float32) if master is None else master
        moments = {place: cast(args[place], paddle.float32) for place in (3, 4, 5) if is_half(args[place])}
        for place, moment in moments.items():
            values[place] = moment
        values[0], values[_MASTER], values[_MULTI_PRECISION] = wide, None, False
        ORIGINALS["adamw_"](*values)
        write_into(parameter, wide)
        for place, moment in moments.items():
            write_into(args[place], moment)
    return args[0], *args[3:9]


def arange(start: Any, end: Any, step: Any, dtype: Any, *rest: Any, **options: Any) -> Any:
    """Stands for `paddle._C_ops.arange` where it is asked for half precision."""
    if dtype in HALF_TYPES:
        limits = [cast(each, paddle.float32) for each in (start, end, step)]
        return ORIGINALS["cast"](ORIGINALS["arange"](*limits, paddle.float32, *rest, **options), dtype)
    return ORIGINALS["arange"](start, end, step, dtype, *rest, **options)


def special_operators() -> dict[str, Callable[..., Any]]:
    """Stand-ins by the operator's name."""
    return {"adamw_": adamw_, "arange": arange}


class _LegacyOperators:
    """`paddle._legacy_C_ops` as GradScaler sees it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(paddle._legacy_C_ops, name)

    @staticmethod
    def check_finite_and_unscale(
        gradients: list[Any], scale: Any, outputs: list[Any], found_inf: Any
    ) -> None:
        """Divides gradients by the scale, and says whether one of them was no finite number.

        The division is that of the GPU kernel: by a multiplication with the inverse, in float32, rounded once.
        """
        found = False
        inverse = 1.0 / scale
        for gradient, output in zip(gradients, outputs, strict=True):
            wide = cast(gradient, paddle.float32)
            found = found or not bool(paddle.isfinite(wide).all())
            ORIGINALS["assign_out_"](cast(wide * inverse, output.dtype), output)
        found_inf.set_value(np.full(found_inf.shape, found))


def replacements() -> Iterator[tuple[Any, str, Any]]:
    """(module, attribute, stand-in)."""
    yield grad_scaler, "_legacy_C_ops", _LegacyOperators()
