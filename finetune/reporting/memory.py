"""How much memory a run has needed so far."""

import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """Peak so far: device memory where a GPU is in use, resident memory of the process otherwise."""
    import paddle

    if paddle.device.get_device().startswith("gpu"):
        return int(paddle.device.cuda.max_memory_allocated())
    return peak_resident_bytes()


def peak_tensor_bytes() -> int:
    """The most bytes of tensors that Paddle held at once so far, on the device in use; code and libraries do not count."""
    import paddle

    if paddle.device.get_device().startswith("gpu"):
        return int(paddle.device.cuda.max_memory_allocated())
    # The counter of Paddle's allocator for host memory, which has no name in the public interface.
    return int(paddle.base.core.host_memory_stat_peak_value("Allocated", 0))


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far, in bytes (0 where the system does not tell)."""
    try:
        # Not getrusage: its maximum survives exec, so a large parent process would be reported.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
