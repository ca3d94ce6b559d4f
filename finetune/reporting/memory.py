"""How much memory a run has needed so far."""

import sys
from pathlib import Path


def peak_memory_bytes() -> int:
    """Peak so far: device memory where a GPU is in use, resident memory of the process otherwise."""
    import paddle

    if paddle.device.get_device().startswith("gpu"):
        return int(paddle.device.cuda.max_memory_allocated())
    return peak_resident_bytes()


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
