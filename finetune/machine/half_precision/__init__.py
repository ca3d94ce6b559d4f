"""bfloat16 and float16 on CPU, so that a run in half precision can be rehearsed without a GPU.

Paddle's CPU build stores half-precision tensors and moves them about, but has no kernels to compute with them. With
`install` an operator that is given half-precision tensors computes in float32 and rounds its outputs once, to the
nearest value, ties to even; its gradients come about in the same way. That is what the kernels on a GPU do, up to
the order in which they add. `paddle.amp` works as on a GPU, with Paddle's own lists of operators.

What an operator costs grows by the conversions of its inputs and outputs: a training step takes several times as
long as in float32. Float32 tensors go through unchanged, and before `install` nothing is replaced or imported.

    operators       what Paddle's operators do with half-precision inputs, as tables
    tensor_types    what the tables need to know of tensors and their dtypes
    calls           operators that compute in float32 and round
    in_place        operators that write into their input
    fused           operators with no CPU form at all
    methods         arithmetic and indexing of tensors
    auto_cast       which dtype `paddle.amp.auto_cast` has an operator compute in
    optimizers      master weights
    loss_scaling    gradients of a scaled loss
    installation    puts all of these in place
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def install() -> None:
    """Lets this process compute in half precision on CPU; a second call changes nothing."""
    from finetune.machine.half_precision import installation

    installation.install()


def uninstall() -> None:
    """Puts back what stood there before; without `install`, changes nothing."""
    if is_installed():
        from finetune.machine.half_precision import installation

        installation.uninstall()


def is_installed() -> bool:
    """Whether the stand-ins are in place in this process."""
    import sys

    module = sys.modules.get("finetune.machine.half_precision.installation")
    return module is not None and module.is_installed()


@contextmanager
def half_precision_on_cpu() -> Iterator[None]:
    """Installs for the time of a block; what was installed before stays so."""
    if is_installed():
        yield
        return
    install()
    try:
        yield
    finally:
        uninstall()
