"""Checks the installed packages against the tested set before anything heavy is imported.

PaddleNLP 3.0.0b4 leaves most of its dependencies unbounded, and several of them have since moved on
in ways that stop its import half-way with an ImportError far from the cause. This check reads package
metadata only: it costs a few milliseconds, and it can name the package and the command that mends it.

`python -m finetune.environment` runs it by itself.
"""

import re
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from finetune.errors import EXIT_USER_ERROR, UserError
from finetune.machine.command_parser import CommandParser
from finetune.machine.memory_limit import check_address_space
from finetune.machine.screen import print_text

PADDLE_RANGE = ">=3.3.1,<3.4"
"""Tested releases of the CPU wheel."""

PADDLE_GPU_RANGE = ">=3.3,<3.4"
"""Tested releases of the GPU wheel; its 3.3.0 has the API that the CPU wheel has in 3.3.1."""

TESTED_RANGES: dict[str, str] = {
    "paddlenlp": "==3.0.0b4",
    "aistudio-sdk": ">=0.2.6,<0.3",
    "huggingface_hub": ">=0.29,<1",
    "datasets": ">=3,<4.1",
    "pyarrow": ">=15,<22",
    "scipy": ">=1.11,<1.16",
    "scikit-learn": ">=1.3,<1.7",
    "pandas": ">=2,<3",
    "numpy": ">=1.26,<=1.26.4",
    "tokenizers": ">=0.21,<0.22",
}
"""Package name -> tested versions, equal to the bounded dependencies of pyproject.toml."""

PYTHON_RANGE = ">=3.10,<3.13"

_COMPARISONS: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": lambda version, bound: version >= bound,
    "<=": lambda version, bound: version <= bound,
    "<": lambda version, bound: version < bound,
    ">": lambda version, bound: version > bound,
}


def is_tested(version: str, tested_range: str) -> bool:
    """Tells whether a version lies in a range such as ">=1.2,<2" or "==3.0.0b4".

    Pre-release and local parts ("rc1", "+cu126") count only for "==", where the public part has to be
    the same text: the tested set has no other use for them.

    Args:
        version: An installed version, as its metadata gives it.
        tested_range: Comma-separated comparisons, all of which must hold.
    """
    return all(_holds(version, comparison.strip()) for comparison in tested_range.split(","))


def check_environment(installed_version: Callable[[str], str] = metadata.version) -> None:
    """Compares the installed packages with the tested set, without importing any of them.

    Args:
        installed_version: Gives a package's version or raises PackageNotFoundError; a parameter for
            the sake of tests.

    Raises:
        UserError: A package is missing or outside its tested range. All faults are collected, and
            the last line gives the command that repairs them.
    """
    faults: list[str] = []
    requirements: list[str] = []
    python_version = ".".join(map(str, sys.version_info[:3]))
    if not is_tested(python_version, PYTHON_RANGE):
        faults.append(f"Python {python_version} runs this program; tested is {PYTHON_RANGE}.")
    faults += _paddle_faults(installed_version, requirements)
    for package, tested_range in TESTED_RANGES.items():
        version = _version_or_none(package, installed_version)
        if version is None:
            faults.append(f"{package} is not installed; tested is {package}{tested_range}.")
        elif not is_tested(version, tested_range):
            faults.append(f"{package} {version} is installed; tested is {package}{tested_range}.")
        else:
            continue
        requirements.append(package + tested_range)
    if faults:
        raise UserError([*faults, *_repair_line(requirements)])


def _paddle_faults(installed_version: Callable[[str], str], requirements: list[str]) -> list[str]:
    cpu_version = _version_or_none("paddlepaddle", installed_version)
    gpu_version = _version_or_none("paddlepaddle-gpu", installed_version)
    if cpu_version and gpu_version:
        return [
            f"paddlepaddle {cpu_version} and paddlepaddle-gpu {gpu_version} are both installed and overwrite "
            "each other's files: run `pip uninstall -y paddlepaddle paddlepaddle-gpu`, then install one of them."
        ]
    if gpu_version:
        if is_tested(gpu_version, PADDLE_GPU_RANGE):
            return []
        return [
            f"paddlepaddle-gpu {gpu_version} is installed; tested is paddlepaddle-gpu{PADDLE_GPU_RANGE}. "
            "PyPI stops at 2.6.2: install 3.3 for your CUDA version from Paddle's own package index "
            "(README.md, section GPU)."
        ]
    if cpu_version and is_tested(cpu_version, PADDLE_RANGE):
        return []
    requirements.append("paddlepaddle" + PADDLE_RANGE)
    if cpu_version:
        return [f"paddlepaddle {cpu_version} is installed; tested is paddlepaddle{PADDLE_RANGE}."]
    return [
        f"PaddlePaddle is not installed. On CPU: pip install 'paddlepaddle{PADDLE_RANGE}'. On GPU: install "
        "paddlepaddle-gpu 3.3 for your CUDA version from Paddle's own package index (README.md, section GPU)."
    ]


def _repair_line(requirements: list[str]) -> list[str]:
    if not requirements:
        return []
    pip_command = "pip install " + " ".join(f"'{requirement}'" for requirement in requirements)
    if (Path(__file__).resolve().parents[2] / "Makefile").is_file():
        return [
            f"Repair with: make install (uses .venv of this checkout), or in your own environment: {pip_command}"
        ]
    return [f"Repair with: {pip_command}"]


def _holds(version: str, comparison: str) -> bool:
    match = re.fullmatch(r"(==|>=|<=|<|>)(.+)", comparison)
    assert match, f"no comparison: {comparison!r}"
    operator, bound = match.groups()
    if operator == "==":
        return version.partition("+")[0] == bound
    return _COMPARISONS[operator](_release(version), _release(bound))


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers without trailing zeros, so that 3 equals 3.0 and 3.3rc1 counts as 3.3."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in match.group().split(".")] if match else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _version_or_none(package: str, installed_version: Callable[[str], str]) -> str | None:
    try:
        return installed_version(package)
    except metadata.PackageNotFoundError:
        return None


def check_machine() -> None:
    """What has to be right before Paddle is imported: the packages, and the addresses that it needs.

    Raises:
        UserError: A package is missing or outside its tested range, or the limit of the address space is too small.
    """
    check_environment()
    check_address_space()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check alone; returns 0, or 2 after the faults stand on stderr."""
    description = (
        "Says whether every installed package has a version that was tested, and if not, what to do."
    )
    CommandParser(prog="python -m finetune.environment", description=description).parse_args(arguments)
    try:
        check_environment()
    except UserError as error:
        print_text(str(error), stream=sys.stderr)
        return EXIT_USER_ERROR
    print_text("Every package that matters has a version that was tested.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
