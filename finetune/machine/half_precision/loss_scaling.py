"""Gradients of a scaled loss, as `paddle.amp.GradScaler` has them divided and searched for overflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paddle

from finetune.machine.half_precision.tensor_types import FLOAT32, convert, is_half, overwrite


def unscale(gradients: Sequence[Any], scale: Any, *, divided: Sequence[Any]) -> bool:
    """Divides gradients by the loss scale, in float32, and rounds them to their dtype.

    Args:
        gradients: Any floating-point dtype.
        scale: float32, one element.
        divided: Where the results go; may be the gradients themselves.

    Returns:
        Whether one of the results is not finite.
    """
    found = False
    inverse = 1.0 / convert(scale, FLOAT32)
    for gradient, target in zip(gradients, divided, strict=True):
        overwrite(target, convert(gradient, FLOAT32) * inverse.reshape([]))
        found = found or not bool(paddle.isfinite(target).all())
    return found


def make_check(original: Callable[..., Any]) -> Callable[..., None]:
    """Stands for `paddle._legacy_C_ops.check_finite_and_unscale`, which has no half-precision kernel on CPU."""

    def check_finite_and_unscale(
        gradients: Sequence[Any], scale: Any, divided: Sequence[Any], found: Any, *attributes: Any
    ) -> Any:
        if not any(is_half(gradient.dtype) for gradient in gradients):
            return original(gradients, scale, divided, found, *attributes)
        with paddle.no_grad():
            result = unscale(gradients, scale, divided=divided)
            found.set_value(paddle.full(found.shape, result, "bool"))
        return divided, found

    return check_finite_and_unscale


def make_operator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands for `paddle._C_ops.check_finite_and_unscale_`, which divides in place and returns what it found."""

    def check_finite_and_unscale_(gradients: Sequence[Any], scale: Any) -> Any:
        if not any(is_half(gradient.dtype) for gradient in gradients):
            return original(gradients, scale)
        with paddle.no_grad():
            found = unscale(gradients, scale, divided=gradients)
        return gradients, paddle.to_tensor([found])

    return check_finite_and_unscale_
