"""Chooses thread counts and MKL's code path for the processor at hand, before Paddle loads.

Paddle's CPU wheel carries MKL 2019, which takes a slow generic path on every processor that is not
Intel's; `MKL_DEBUG_CPU_TYPE` picks the vector kernels by hand. Paddle itself sets OMP_NUM_THREADS=1
at import, and MKL then follows it, so a training step would use one core however many there are. OpenMP
threads of Paddle's own slow it down, threads inside MKL's matrix products pay: hence one of the former
and as many of the latter as this process may have cores. `benchmarks/cpu_step.py --sides settings,defaults`
shows what that brings on the machine at hand.

All of it is read once, when Paddle's libraries load: call `configure_processor` before that.
"""

import ctypes
import os
import sys
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

# MKL's AVX-512 kernels use all five groups; a processor that lacks one would stop with an illegal instruction.
_AVX512_FLAGS = frozenset({"avx512f", "avx512cd", "avx512dq", "avx512bw", "avx512vl"})
_AVX2_FLAGS = frozenset({"avx2", "fma"})
_NOT_INTEL_X86 = {"AuthenticAMD": "AMD", "HygonGenuine": "Hygon"}
_OWN_SETTINGS = "FINETUNE_CPU_SETTINGS"
"""Lists what an earlier process set, so that the processes it starts do not take that for the user's wish."""

_MKL_TYPE_AVX2 = "5"
_MKL_TYPE_AVX512 = "7"
# From malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


@dataclass(frozen=True)
class Processor:
    """What /proc/cpuinfo says that matters here.

    Attributes:
        vendor: The vendor_id, such as "GenuineIntel"; empty where there is none (ARM, not Linux).
        flags: Instruction-set flags that all listed processors have.
        core_of_cpu: Logical CPU number -> (socket, core); empty where the text does not tell, as on
            ARM. Two logical CPUs of one core share its vector units, so MKL gains nothing from both.
    """

    vendor: str
    flags: frozenset[str]
    core_of_cpu: dict[int, tuple[int, int]]


def parse_cpuinfo(text: str) -> Processor:
    """Reads the text of /proc/cpuinfo; whatever is missing is left empty."""
    blocks = [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        for block in text.split("\n\n")
        if block.strip()
    ]
    flag_sets = [frozenset(block["flags"].split()) for block in blocks if "flags" in block]
    return Processor(
        vendor=blocks[0].get("vendor_id", "") if blocks else "",
        flags=frozenset.intersection(*flag_sets) if flag_sets else frozenset(),
        core_of_cpu={
            int(block["processor"]): (int(block["physical id"]), int(block["core id"]))
            for block in blocks
            if {"processor", "physical id", "core id"} <= block.keys()
        },
    )


def mkl_cpu_type(processor: Processor) -> str | None:
    """The value of MKL_DEBUG_CPU_TYPE that opens the vector kernels, or None to leave MKL its own choice.

    Only processors that MKL 2019 knows but does not favour get one: Intel's are recognised without
    it, ARM wheels carry no MKL, and a type that the processor lacks would crash it.
    """
    if processor.vendor not in _NOT_INTEL_X86:
        return None
    if processor.flags >= _AVX512_FLAGS:
        return _MKL_TYPE_AVX512
    return _MKL_TYPE_AVX2 if processor.flags >= _AVX2_FLAGS else None


def count_cores(
    processor: Processor, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")
) -> int:
    """Counts the physical cores that this process may use, at least 1.

    Honours the affinity mask (taskset, a scheduler) and the CPU quota of its control group (containers).
    """
    # macOS and Windows have no affinity call.
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    if allowed <= processor.core_of_cpu.keys():
        num_cores = len({processor.core_of_cpu[cpu] for cpu in allowed})
    else:
        num_cores = len(allowed)
    quota = cgroup_quota(proc, cgroup)
    return max(1, num_cores if quota is None else min(num_cores, int(quota)))


def cgroup_quota(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The tightest CPU limit of this process's control groups in cores, or None where there is none.

    Reads both layouts: `cpu.max` of version 2 and `cpu.cfs_quota_us` of version 1, in the process's
    group and all groups above it, since each may limit.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    limits: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        roots = [cgroup] if not controllers else [cgroup / controllers, cgroup / "cpu"]
        for root in roots:
            group = root / path.lstrip("/")
            # In a container the path is often the host's and does not exist inside: only the root does.
            for directory in (group, *group.parents):
                limits += _group_limit(directory)
                if directory == root:
                    break
    return min(limits, default=None)


def local_processes(environ: MutableMapping[str, str]) -> int:
    """How many processes of this launch run on this host.

    `python -m paddle.distributed.launch` gives each worker PADDLE_LOCAL_SIZE; without it this process
    is alone.
    """
    value = environ.get("PADDLE_LOCAL_SIZE", "")
    return max(1, int(value)) if value.isdigit() else 1


def configure_processor(
    environ: MutableMapping[str, str] = os.environ,
    *,
    processor: Processor | None = None,
    num_cores: int | None = None,
) -> str:
    """Puts the settings into the environment that the user has not set.

    Args:
        environ: Where to read and set them.
        processor: Taken from /proc/cpuinfo when None.
        num_cores: Physical cores of this host that the launch may use; counted when None.

    Returns:
        One line for the log: what is in force, and why.

    Warns:
        RuntimeWarning: Paddle is loaded already, so nothing was set.
    """
    processor = processor or _read_processor()
    num_cores = num_cores or count_cores(processor)
    num_processes = local_processes(environ)
    settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": str(max(1, num_cores // num_processes))}
    # By default MKL's threads spin 200 ms after each product: on cores that the elementwise kernels or
    # other processes need in the meantime.
    settings["KMP_BLOCKTIME"] = "0"
    if cpu_type := mkl_cpu_type(processor):
        settings["MKL_DEBUG_CPU_TYPE"] = cpu_type
    own = dict(pair.partition("=")[::2] for pair in environ.get(_OWN_SETTINGS, "").split())
    by_user = {name: environ[name] for name in settings if name in environ and environ[name] != own.get(name)}
    wanted = {name: value for name, value in settings.items() if name not in by_user}
    changes = {name: value for name, value in wanted.items() if environ.get(name) != value}
    if changes and environ is os.environ and "paddle" in sys.modules:
        message = f"CPU: {_listed(changes)} not set, because Paddle was imported before configure_processor()"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return message
    environ.update(wanted)
    environ[_OWN_SETTINGS] = _listed(wanted)
    kept = {name: value for name, value in by_user.items() if value != settings[name]}
    line = f"CPU: {_listed({name: environ[name] for name in settings})} ({_reason(processor, num_cores, num_processes)})"
    return line + (f"; kept as the user set it: {_listed(kept)}" if kept else "")


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed for the next step instead of handing it back to the system.

    Paddle frees and allocates the same large tensors at every step on CPU; by default each one is a fresh
    mapping whose pages the kernel has to clear again. Costs about 5 % more resident memory and saves
    about 8 % of a step on a model with a large vocabulary (benchmarks/README.md). Only for training and
    evaluation on CPU: on GPU Paddle has its own pool.

    Returns:
        Whether it took effect; False without glibc, or when the user tunes malloc with MALLOC_*
        variables or GLIBC_TUNABLES.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no libc to open by None, or one without mallopt
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def _reason(processor: Processor, num_cores: int, num_processes: int) -> str:
    vendor = _NOT_INTEL_X86.get(processor.vendor, processor.vendor.replace("GenuineIntel", "Intel"))
    kernels = {_MKL_TYPE_AVX512: ", AVX-512", _MKL_TYPE_AVX2: ", AVX2"}.get(mkl_cpu_type(processor) or "", "")
    shared = f", shared by {num_processes} processes" if num_processes > 1 else ""
    return f"{vendor or 'unknown processor'}{kernels}, {num_cores} core{'s' * (num_cores > 1)}{shared}"


def _listed(settings: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _read_processor() -> Processor:
    try:
        return parse_cpuinfo(Path("/proc/cpuinfo").read_text())
    except OSError:
        return Processor(vendor="", flags=frozenset(), core_of_cpu={})


def _group_limit(directory: Path) -> list[float]:
    """The limit of one control group in cores, as a list of none or one."""
    try:
        quota, _, period = (directory / "cpu.max").read_text().strip().partition(" ")
    except OSError:
        try:
            quota = (directory / "cpu.cfs_quota_us").read_text().strip()
            period = (directory / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return []
    if not (quota.isdigit() and period.isdigit()):  # "max" and -1 stand for no limit
        return []
    return [int(quota) / int(period)]
