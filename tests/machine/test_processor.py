import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.machine.processor import (
    Processor,
    cgroup_quota,
    configure_processor,
    count_cores,
    keep_freed_memory,
    local_processes,
    mkl_cpu_type,
    parse_cpuinfo,
)

ROOT = Path(__file__).resolve().parents[2]
AVX2 = "fpu sse2 avx avx2 fma bmi2"
AVX512 = AVX2 + " avx512f avx512cd avx512dq avx512bw avx512vl"


def cpuinfo(vendor: str, flags: str, cores: tuple[int, ...] = (0, 1)) -> str:
    """The text of an x86 /proc/cpuinfo with one logical CPU per entry of `cores`."""
    return "\n\n".join(
        f"processor\t: {cpu}\nvendor_id\t: {vendor}\nmodel name\t: some\nphysical id\t: 0\ncore id\t\t: {core}\n"
        f"flags\t\t: {flags}"
        for cpu, core in enumerate(cores)
    )


ARM_CPUINFO = (
    "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\n\nprocessor\t: 1\n"
)


def test_what_a_parent_process_chose_is_not_the_users_wish():
    """A configured process that starts a launch passes its environment on: the ranks must share anew."""
    environ: dict[str, str] = {}
    processor = Processor("", frozenset(), {})
    configure_processor(environ, processor=processor, num_cores=8)
    assert environ["MKL_NUM_THREADS"] == "8"
    environ["PADDLE_LOCAL_SIZE"] = "4"
    configure_processor(environ, processor=processor, num_cores=8)
    assert environ["MKL_NUM_THREADS"] == "2"
    environ["MKL_NUM_THREADS"] = "3"
    configure_processor(environ, processor=processor, num_cores=8)
    assert environ["MKL_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (cpuinfo("AuthenticAMD", AVX512), "7"),
        (cpuinfo("AuthenticAMD", AVX2), "5"),
        (cpuinfo("AuthenticAMD", AVX512.replace("avx512dq", "")), "5"),
        (cpuinfo("AuthenticAMD", "fpu sse2 avx"), None),
        (cpuinfo("HygonGenuine", AVX2), "5"),
        (cpuinfo("GenuineIntel", AVX512), None),
        (ARM_CPUINFO, None),
        ("", None),
    ],
    ids=["amd-avx512", "amd-avx2", "amd-part-of-avx512", "amd-old", "hygon", "intel", "arm", "no-cpuinfo"],
)
def test_mkl_code_path(text, expected):
    environ: dict[str, str] = {}
    processor = parse_cpuinfo(text)
    assert mkl_cpu_type(processor) == expected
    configure_processor(environ, processor=processor, num_cores=2)
    assert environ.get("MKL_DEBUG_CPU_TYPE") == expected
    assert (environ["OMP_NUM_THREADS"], environ["MKL_NUM_THREADS"]) == ("1", "2")


def test_a_flag_that_one_core_lacks_does_not_count():
    text = cpuinfo("AuthenticAMD", AVX512, (0,)) + "\n\n" + cpuinfo("AuthenticAMD", AVX2, (1,))
    assert mkl_cpu_type(parse_cpuinfo(text)) == "5"


def test_log_line_says_what_and_why():
    line = configure_processor({}, processor=parse_cpuinfo(cpuinfo("AuthenticAMD", AVX512)), num_cores=2)
    assert (
        line
        == "CPU: OMP_NUM_THREADS=1 MKL_NUM_THREADS=2 KMP_BLOCKTIME=0 MKL_DEBUG_CPU_TYPE=7 (AMD, AVX-512, 2 cores)"
    )
    line = configure_processor(
        {"PADDLE_LOCAL_SIZE": "4"}, processor=parse_cpuinfo(cpuinfo("GenuineIntel", AVX2)), num_cores=8
    )
    assert (
        line
        == "CPU: OMP_NUM_THREADS=1 MKL_NUM_THREADS=2 KMP_BLOCKTIME=0 (Intel, 8 cores, shared by 4 processes)"
    )


def test_users_settings_stay():
    environ = {"MKL_NUM_THREADS": "7", "MKL_DEBUG_CPU_TYPE": "5"}
    line = configure_processor(environ, processor=parse_cpuinfo(cpuinfo("AuthenticAMD", AVX512)), num_cores=2)
    del environ["FINETUNE_CPU_SETTINGS"]
    assert environ == {
        "MKL_NUM_THREADS": "7",
        "MKL_DEBUG_CPU_TYPE": "5",
        "OMP_NUM_THREADS": "1",
        "KMP_BLOCKTIME": "0",
    }
    assert line.endswith("kept as the user set it: MKL_NUM_THREADS=7 MKL_DEBUG_CPU_TYPE=5")


@pytest.mark.parametrize(
    ("local_size", "threads"), [("1", "8"), ("3", "2"), ("8", "1"), ("16", "1"), ("", "8")]
)
def test_cores_are_divided_among_the_processes_of_a_launch(local_size, threads):
    environ = {"PADDLE_LOCAL_SIZE": local_size}
    configure_processor(environ, processor=Processor("", frozenset(), {}), num_cores=8)
    assert environ["MKL_NUM_THREADS"] == threads
    assert local_processes({}) == 1


def test_cores_are_counted_once_per_core_and_within_the_affinity(monkeypatch, tmp_path):
    processor = parse_cpuinfo(cpuinfo("GenuineIntel", AVX2, (0, 0, 1, 1)))
    for allowed, expected in [({0, 1, 2, 3}, 2), ({0, 1}, 1), ({1, 2}, 2), ({7}, 1)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, allowed=allowed: allowed, raising=False)
        assert count_cores(processor, tmp_path, tmp_path) == expected


@pytest.mark.parametrize(
    ("files", "own_groups", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"box/cpu.max": "400000 100000\n", "box/job/cpu.max": "max 100000\n"}, "0::/box/job\n", 4.0),
        ({"cpu.max": "200000 100000\n"}, "0::/not/mounted/here\n", 2.0),
        (
            {"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            "4:memory:/\n3:cpu,cpuacct:/\n",
            3.0,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "1:cpu:/\n0::/\n", None),
        ({}, "0::/\n", None),
    ],
    ids=["v2", "v2-no-limit", "v2-parent", "v2-in-container", "v1", "v1-no-limit", "no-files"],
)
def test_quota_of_control_groups(tmp_path, files, own_groups, expected):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text(own_groups)
    for name, text in files.items():
        (cgroup / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroup / name).write_text(text)
    assert cgroup_quota(proc, cgroup) == expected


def test_quota_limits_the_cores(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert count_cores(Processor("", frozenset(), {}), tmp_path, tmp_path) == 1


def test_too_late_is_said_and_sets_nothing(monkeypatch):
    for name in (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "KMP_BLOCKTIME",
        "MKL_DEBUG_CPU_TYPE",
        "FINETUNE_CPU_SETTINGS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "paddle", sys)
    with pytest.warns(
        RuntimeWarning, match=r"MKL_NUM_THREADS=2 KMP_BLOCKTIME=0 not set, because Paddle was imported before"
    ):
        configure_processor(processor=Processor("", frozenset(), {}), num_cores=2)
    assert "MKL_NUM_THREADS" not in os.environ


@pytest.mark.distributed
def test_launched_processes_get_their_share(tmp_path):
    """The launcher imports Paddle, which sets OMP_NUM_THREADS=1 for its children; the rest is ours to set."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from finetune.machine.processor import Processor, configure_processor\n"
        "line = configure_processor(processor=Processor('', frozenset(), {}), num_cores=6)\n"
        "Path(sys.argv[1], 'rank' + os.environ['PADDLE_TRAINER_ID']).write_text(line)\n"
    )
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("PADDLE_", "FLAGS_"))
    }
    environ["PYTHONPATH"] = str(ROOT)
    command = [
        sys.executable,
        "-m",
        "paddle.distributed.launch",
        "--nproc_per_node",
        "2",
        "--log_dir",
        str(tmp_path / "log"),
    ]
    result = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for rank in range(2):
        line = (tmp_path / f"rank{rank}").read_text()
        assert line.startswith("CPU: OMP_NUM_THREADS=1 MKL_NUM_THREADS=3 KMP_BLOCKTIME=0 (")
        assert "shared by 2 processes" in line


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_page_faults():
    """64 MB that are freed and allocated again: the second time no page is fetched from the kernel."""
    code = (
        "import ctypes, resource, sys\n"
        "from finetune.machine.processor import keep_freed_memory\n"
        "if sys.argv[1] == 'keep': assert keep_freed_memory()\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]\n"
        "libc.free.argtypes = [ctypes.c_void_p]\n"
        "libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]\n"
        "def touch():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    block = libc.malloc(64 << 20); libc.memset(block, 1, 64 << 20); libc.free(block)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "touch(); print(touch())"
    )
    environ = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))
    }
    faults = {}
    for mode in ("keep", "default"):
        command = [sys.executable, "-c", code, mode]
        result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
        faults[mode] = int(result.stdout)
    assert faults["keep"] < 100 < faults["default"]


def test_malloc_tuned_by_the_user_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    assert keep_freed_memory() is False
