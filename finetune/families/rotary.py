"""Rotary positions that are float32 inside a half-precision run.

Positions are turned by cos and sin of angles that reach thousands of radians; bfloat16 tells 257 from 258 no more.
PaddleNLP rounds the tables to the type of the run, before they are used or even where they are kept, and where they
are worked out in every pass (Gemma) automatic mixed precision makes the angles themselves bfloat16. Here all of that
is float32, a head is turned in float32, and what comes out is rounded once. The gradient needs the tables only, so
that less is kept for it than PaddleNLP's form keeps.

In float32 PaddleNLP's own functions run as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import paddle
from paddle.autograd import PyLayer

from finetune.families.attention import HALF_TYPES
from finetune.machine.stand_ins import replace

# What the tables' functions look at: the type that they should have.
_LIKE_FLOAT32 = SimpleNamespace(dtype=paddle.float32)


class _Rotation(PyLayer):
    """x * cos + rotate_half(x) * sin, Su et al., "RoFormer" (2021)."""

    @staticmethod
    def forward(ctx: Any, x: Any, cos: Any, sin: Any, halves: bool) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.halves = halves
        wide = x.astype("float32")
        return (wide * cos + _half_turn(wide, halves) * sin).astype(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        cos, sin = ctx.saved_tensor()
        wide = grad.astype("float32")
        # The half turn is an antisymmetric matrix: its transpose is its negative.
        return (wide * cos - _half_turn(wide * sin, ctx.halves)).astype(grad.dtype)


def turn(x: Any, cos: Any, sin: Any, *, halves: bool = True) -> Any:
    """Turns pairs of a head's places by an angle each, in float32.

    Args:
        x: [..., head dim], any float type.
        cos: float32, broadcasts to x; both places of a pair have the same value.
        sin: Like `cos`.
        halves: Whether place i is paired with place i + head dim / 2; otherwise with its neighbour.

    Returns:
        Shape and type of x.
    """
    with paddle.amp.auto_cast(enable=False):
        return _Rotation.apply(x, cos, sin, halves)


def _half_turn(x: Any, halves: bool) -> Any:
    """(a, b) -> (-b, a) for every pair."""
    if halves:
        first, second = paddle.chunk(x, 2, axis=-1)
        return paddle.concat([-second, first], axis=-1)
    pairs = x.reshape([*x.shape[:-1], x.shape[-1] // 2, 2])  # [..., head dim / 2, 2]
    return paddle.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)


def keep_tables(rotary_layer: Any) -> None:
    """Has a rotary layer of PaddleNLP's answer float32 tables, whatever type it is asked for."""
    # A tensor that is an attribute of a layer is converted with its weights; an array is not.
    frequencies = getattr(rotary_layer, "inv_freq", None)  # [head dim / 2]
    kept = None if frequencies is None else frequencies.astype("float32").numpy()
    rotary_layer.forward = functools.partial(_float32_tables, rotary_layer, rotary_layer.forward, kept)


def _float32_tables(
    layer: Any, stock: Callable[..., Any], frequencies: Any, _like: Any, *arguments: Any, **more: Any
) -> Any:
    if frequencies is not None and layer.inv_freq.dtype != paddle.float32:
        layer.inv_freq = paddle.to_tensor(frequencies)
    # Some layers work them out in every pass, or anew for longer texts: by a product that would be half precision.
    with paddle.amp.auto_cast(enable=False):
        return stock(_LIKE_FLOAT32, *arguments, **more)


def turn_in_float32(modeling: Any, *, head_axis: int = 2) -> None:
    """Has a module of PaddleNLP's turn queries and keys of half precision by `turn`.

    Args:
        modeling: Has `apply_rotary_pos_emb(q, k, cos, sin, position_ids)`.
        head_axis: Of q and k [batch, ., ., head dim].
    """
    stock = modeling.apply_rotary_pos_emb

    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, position_ids: Any = None) -> tuple[Any, Any]:
        if q.dtype not in HALF_TYPES or cos.dtype != paddle.float32:
            pair: tuple[Any, Any] = stock(q, k, cos, sin, position_ids)
            return pair
        cos, sin = (table.reshape([-1, table.shape[-1]]) for table in (cos, sin))  # [positions, head dim]
        if position_ids is None:
            position_ids = paddle.arange(q.shape[3 - head_axis]).unsqueeze(0)  # [1, length]
        cos, sin = (
            table[position_ids].unsqueeze(head_axis) for table in (cos, sin)
        )  # [batch, ., ., head dim], 1 at the heads
        return turn(q, cos, sin), turn(k, cos, sin)

    replace(modeling, "apply_rotary_pos_emb", apply_rotary_pos_emb)
