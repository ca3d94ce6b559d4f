"""Which device a run uses, decided without importing paddle (that import alone takes seconds)."""

import glob
import os
from collections.abc import Mapping
from importlib import metadata

_DEVICE_KINDS = ("cpu", "gpu", "xpu", "npu", "mlu", "gcu", "intel_hpu", "iluvatar_gpu", "metax_gpu")
_NVIDIA_NODES = "/dev/nvidia[0-9]*"
_WSL_NODE = "/dev/dxg"


def has_gpu_build() -> bool:
    """True when the installed Paddle is the CUDA build."""
    try:
        metadata.version("paddlepaddle-gpu")
    except metadata.PackageNotFoundError:
        return False
    return True


def count_visible_gpus(environ: Mapping[str, str] | None = None) -> int:
    """Number of NVIDIA devices this process may use.

    ``CUDA_VISIBLE_DEVICES`` is read the way CUDA reads it: an empty list or -1 hides every device,
    an index with no device behind it ends the list, names (``GPU-...``, ``MIG-...``) count as they stand.
    """
    environ = os.environ if environ is None else environ
    num_devices = len(glob.glob(_NVIDIA_NODES)) or int(os.path.exists(_WSL_NODE))
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None or num_devices == 0:
        return num_devices
    num_visible = 0
    for entry in (part.strip() for part in listed.split(",")):
        if entry.startswith(("GPU-", "MIG-")) or (entry.isdecimal() and int(entry) < num_devices):
            num_visible += 1
        else:
            break
    return num_visible


def detect_device(requested: str | None = None) -> str:
    """The device to run on: what was asked for, else "gpu" where Paddle could use one, else "cpu"."""
    if requested is not None:
        return requested
    return "gpu" if has_gpu_build() and count_visible_gpus() > 0 else "cpu"


def device_kind(device: str) -> str:
    """The part before the index: "gpu" of "gpu:0"."""
    return device.partition(":")[0]


def use_device(device: str, num_processes: int = 1) -> None:
    """Has Paddle make tensors on a device from here on, whatever it would choose by the way it was compiled.

    Args:
        device: "cpu", "gpu", "gpu:1" or another of Paddle's.
        num_processes: Of this run. With several the launcher gives each one its card, and an index says nothing.
    """
    import paddle

    paddle.set_device(device if num_processes == 1 else device_kind(device))


def find_device_fault(requested: str | None) -> str | None:
    """Why the requested device cannot be used, as one line with its remedy; None when it can."""
    if requested is None:
        return None
    kind, colon, index = requested.partition(":")
    if kind not in _DEVICE_KINDS or (colon and not index.isdecimal()):
        return f'device is "{requested}": choose one of {", ".join(_DEVICE_KINDS)}, with an index if need be ("gpu:0")'
    if kind != "gpu":
        return None
    if not has_gpu_build():
        return (
            f'device is "{requested}", but the installed Paddle is the CPU build: install paddlepaddle-gpu for your '
            "CUDA version (see the README), or run with --device cpu"
        )
    num_visible = count_visible_gpus()
    if num_visible == 0:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "none is present" if hidden is None else f'CUDA_VISIBLE_DEVICES="{hidden}" shows none'
        return (
            f'device is "{requested}", but no NVIDIA device can be used ({seen}): check the driver with nvidia-smi '
            "and CUDA_VISIBLE_DEVICES, or run with --device cpu"
        )
    if colon and int(index) >= num_visible:
        return f'device is "{requested}", but only {num_visible} NVIDIA device(s) are visible: use gpu:0 to gpu:{num_visible - 1}'
    return None
