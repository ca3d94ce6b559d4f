"""bfloat16 and float16 on a CPU: what a run in half precision computes on a GPU, up to the order of summation.

Paddle's CPU build has half-precision kernels for what moves data and for little else. Here an operator with
half-precision inputs computes in float32 and rounds its results, as a GPU's kernels do, which multiply half-precision
numbers and add them up in float32. Storage is real: weights, activations, gradients and what travels between processes
have 16 bits. Paddle's automatic mixed precision, GradScaler, optimizers and autograd are Paddle's own.

    wrapping.py        an operator that widens, computes and rounds; refuses mixed types as a GPU's kernels do
    operators.py       which operators have half-precision kernels, and which mix types
    mixed_precision.py the choice of an operator's type inside `paddle.amp.auto_cast`
    updates.py         AdamW with master weights; the check of GradScaler
    tensor_methods.py  operators of Python (`a + b`), in-place ones, and indexing

Every replaced attribute goes through `finetune.stand_ins`. Without `install` nothing is replaced, and this module
imports nothing of Paddle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_originals: list[tuple[Any, str, Any]] = []


def is_installed() -> bool:
    """Whether this process computes in half precision on its CPU."""
    return bool(_originals)


def install() -> None:
    """Puts the stand-ins in place, in this process; a second call changes nothing."""
    if _originals:
        return
    from finetune.half_precision import mixed_precision, tensor_methods, updates, wrapping
    from finetune.stand_ins import replace

    replacements = wrapping.wrapped_operators(special=updates.special_operators())
    for owner, name, operator in list(wrapping.find_uses(replacements)):
        known_as = f"paddle._C_ops.{operator.__name__}"
        _originals.append((owner, name, replace(owner, name, operator, known_as=known_as)))
    for owner, name, value in [
        *tensor_methods.replacements(),
        *mixed_precision.replacements(),
        *updates.replacements(),
    ]:
        _originals.append((owner, name, replace(owner, name, value)))


def uninstall() -> None:
    """Takes the stand-ins away again."""
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)


@contextmanager
def half_precision_on_cpu() -> Iterator[None]:
    """Half precision on the CPU for the time of the block."""
    was_installed = is_installed()
    install()
    try:
        yield
    finally:
        if not was_installed:
            uninstall()
