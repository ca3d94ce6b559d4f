import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.machine import environment
from finetune.machine.environment import TESTED_RANGES, check_environment, is_tested

ROOT = Path(__file__).resolve().parents[2]

GOOD_VERSIONS = {
    "paddlepaddle": "3.3.1",
    "paddlenlp": "3.0.0b4",
    "aistudio-sdk": "0.2.6",
    "huggingface_hub": "0.36.2",
    "datasets": "4.0.0",
    "pyarrow": "21.0.0",
    "scipy": "1.15.3",
    "scikit-learn": "1.6.1",
    "pandas": "2.3.3",
    "numpy": "1.26.4",
    "tokenizers": "0.21.4",
}


def faults_with(**changes: str | None) -> tuple[str, ...]:
    """The faults of the good set with some versions changed (None: not installed)."""
    versions = GOOD_VERSIONS | {name.replace("__", "-"): version for name, version in changes.items()}

    def installed_version(package: str) -> str:
        version = versions.get(package)
        if version is None:
            raise metadata.PackageNotFoundError(package)
        return version

    try:
        check_environment(installed_version)
    except UserError as error:
        return error.faults
    return ()


@pytest.mark.parametrize(
    ("version", "tested_range", "expected"),
    [
        ("1.26.4", ">=1.26,<=1.26.4", True),
        ("1.26.5", ">=1.26,<=1.26.4", False),
        ("1.26", ">=1.26.0", True),
        ("3", ">=3.0", True),
        ("3.10", "<3.9", False),
        ("4.0.0", "<4.1", True),
        ("3.0.0b4", "==3.0.0b4", True),
        ("3.0.0b3", "==3.0.0b4", False),
        ("3.0.0", "==3.0.0b4", False),
        ("3.3.1+cu126", ">=3.3,<3.4", True),
        ("3.4.0rc1", ">=3.3,<3.4", False),
    ],
)
def test_ranges(version, tested_range, expected):
    assert is_tested(version, tested_range) is expected


def test_tested_set_has_no_fault():
    assert faults_with() == ()


def test_gpu_wheel_stands_for_the_cpu_wheel():
    assert faults_with(paddlepaddle=None, paddlepaddle__gpu="3.3.0.post126") == ()


def test_all_faults_at_once_with_one_repair_command():
    faults = faults_with(numpy="2.1.0", pyarrow="23.0.0", datasets=None)
    assert faults[0] == "datasets is not installed; tested is datasets>=3,<4.1."
    assert faults[1] == "pyarrow 23.0.0 is installed; tested is pyarrow>=15,<22."
    assert faults[2] == "numpy 2.1.0 is installed; tested is numpy>=1.26,<=1.26.4."
    assert len(faults) == 4
    assert "make install" in faults[3]
    assert faults[3].endswith("pip install 'datasets>=3,<4.1' 'pyarrow>=15,<22' 'numpy>=1.26,<=1.26.4'")


def test_missing_paddle_names_both_ways():
    (fault, repair) = faults_with(paddlepaddle=None)
    assert "PaddlePaddle is not installed" in fault
    assert "pip install 'paddlepaddle>=3.3.1,<3.4'" in fault
    assert "paddlepaddle-gpu 3.3 for your CUDA" in fault
    assert "'paddlepaddle>=3.3.1,<3.4'" in repair


def test_old_gpu_wheel_is_not_sent_to_pypi():
    (fault,) = faults_with(paddlepaddle=None, paddlepaddle__gpu="2.6.2")
    assert "paddlepaddle-gpu 2.6.2 is installed" in fault
    assert "Paddle's own package index" in fault


def test_both_paddle_wheels_at_once():
    (fault,) = faults_with(paddlepaddle__gpu="3.3.1")
    assert "both installed" in fault
    assert "pip uninstall -y paddlepaddle paddlepaddle-gpu" in fault


def test_unsuited_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 0, "final", 0))
    (fault,) = faults_with()
    assert fault == "Python 3.13.0 runs this program; tested is >=3.10,<3.13."


def test_ranges_equal_pyproject():
    """A bound changed in one place only would let pip install what the start-up check refuses."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    requirements = dict(re.findall(r'"([A-Za-z0-9_-]+?)((?:==|>=|<|>)[^"]+)"', text))
    for package, tested_range in TESTED_RANGES.items():
        assert requirements[package] == tested_range, package
    assert requirements["paddlepaddle"] == environment.PADDLE_RANGE
    assert requirements["paddlepaddle-gpu"] == environment.PADDLE_GPU_RANGE
    assert f'requires-python = "{environment.PYTHON_RANGE}"' in text
    dependencies = text.partition("dependencies = [")[2].partition("]")[0]
    bounded = {
        name
        for name, spec in re.findall(r'"([A-Za-z0-9_-]+?)((?:==|>=|<)[^"]+)"', dependencies)
        if "<" in spec or "==" in spec
    }
    assert bounded == set(TESTED_RANGES)


@pytest.mark.parametrize("lock", ["base", "chat", "cpu", "dev"])
def test_lock_is_complete_and_names_no_place(lock):
    text = (ROOT / "requirements" / f"{lock}.lock").read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^(-|torch|transformers|peft|nvidia)", text, re.MULTILINE)
    pins = re.findall(r"^([a-z0-9-]+)==([^ +]+) [^\n]*\\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    assert len(pins) == len(re.findall(r"^\S", text, re.MULTILINE)), "a pin without a hash"
    versions = dict(pins)
    for package, tested_range in TESTED_RANGES.items():
        assert is_tested(versions[package.replace("_", "-")], tested_range), package
    assert ("paddlepaddle" in versions) == (lock != "base")


def test_check_imports_nothing_heavy():
    code = (
        "import sys, time; start = time.perf_counter(); from finetune.machine.environment import check_environment, UserError\n"
        "try: check_environment()\n"
        "except UserError: pass\n"
        "print(sorted({'paddle', 'paddlenlp', 'numpy'} & set(sys.modules)), time.perf_counter() - start)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules, _, seconds = result.stdout.strip().rpartition(" ")
    assert modules == "[]"
    # 50 ms is the aim on a quiet machine; the limit leaves room for a busy one, and is far below an import of numpy plus Paddle.
    assert float(seconds) < 0.5
