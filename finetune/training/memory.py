"""How much memory a run has needed so far."""

import resource
import sys


def peak_memory_bytes() -> int:
    """Peak so far: device memory where a GPU is in use, resident memory of the process otherwise."""
    import paddle

    if paddle.device.get_device().startswith("gpu"):
        return int(paddle.device.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
