"""Sums in one order on a GPU, for runs that must repeat to the last digit.

Some CUDA kernels add with atomic operations, in the order in which threads happen to come: the gradient of an embedding
(many tokens, one row) and the backward pass of flash attention are the ones that matter here. cuBLAS may split a product
differently when streams share its workspace, and NCCL may choose among algorithms. On CPU every sum has one order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping
from typing import Any

from finetune.machine.device import device_kind

FLAGS: dict[str, Any] = {"FLAGS_cudnn_deterministic": True, "FLAGS_embedding_deterministic": 1}
"""Paddle's flags. The first also holds for flash attention and FlashMask, the second for embedding gradients."""

ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
"""Read by NVIDIA's libraries when they start; what the person has set stays."""


def make_deterministic(
    device: str,
    *,
    set_flags: Callable[[dict[str, Any]], None] | None = None,
    environ: MutableMapping[str, str] | None = None,
) -> None:
    """Chooses kernels whose sums have one order; to be called before Paddle does anything on the device.

    Args:
        device: What the run is on. On anything but a GPU nothing happens.
        set_flags: Takes flags by name; None: `paddle.set_flags`.
        environ: None: that of this process.
    """
    if device_kind(device) != "gpu":
        return
    environ = os.environ if environ is None else environ
    for name, value in ENVIRONMENT.items():
        environ.setdefault(name, value)
    if set_flags is None:
        import paddle

        set_flags = paddle.set_flags
    set_flags(FLAGS)
