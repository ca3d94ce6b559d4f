"""What there is on this machine for a run: versions, device, memory, disk, hubs, and what to install.

It imports no Paddle and changes nothing. A fault is told with its remedy and ends with exit code 2; what only some runs
need, such as a hub, is told and is no fault.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from finetune import __version__
from finetune.errors import EXIT_USER_ERROR, UserError, hide_credentials
from finetune.machine.command_names import called_as
from finetune.machine.command_parser import CommandParser
from finetune.machine.device import count_visible_gpus, detect_device, has_gpu_build
from finetune.machine.environment import check_machine
from finetune.machine.language.translation import translate_piece
from finetune.machine.processor import configure_processor
from finetune.machine.screen import print_text

_PACKAGES = (
    "paddlepaddle",
    "paddlepaddle-gpu",
    "paddlenlp",
    "numpy",
    "datasets",
    "tokenizers",
    "safetensors",
)
_EXTRAS = {
    "gradio": "the training page and the chat page: pip install 'paddle-finetune[chat]'",
    "uvicorn": "the server: pip install 'paddle-finetune[serve]'",
    "wandb": "report_to wandb: pip install wandb",
    "swanlab": "report_to swanlab: pip install swanlab",
    "mlflow": "report_to mlflow: pip install mlflow",
    "visualdl": "report_to visualdl: pip install visualdl",
    "tensorboardX": "report_to tensorboard: pip install tensorboardX",
}
"""Module -> what it is for, and how to get it."""
_GIBIBYTE = 1 << 30
_SMALL_DISK_BYTES = 5 * _GIBIBYTE


def main(argv: Sequence[str] | None = None) -> int:
    """Tells what there is; returns 0, or 2 where a run could not start."""
    parser = CommandParser(
        prog=f"{called_as() or 'paddle-finetune'} doctor",
        description="Tell what this machine has for a run, and what to install or to mend.",
    )
    parser.add_argument("--offline", action="store_true", help="do not try whether the hubs can be reached")
    options = parser.parse_args(argv)
    for title, lines in (
        ("Versions", _versions()),
        ("Device", _device()),
        ("Memory", _memory()),
        ("Disk", _disk()),
        ("Hubs", _hubs(offline=options.offline)),
        ("Not installed, needed by some runs only", _extras()),
    ):
        shown = [f"  {line}" for line in lines]
        if shown:
            print_text(translate_piece(title), *shown)
    try:
        check_machine()
    except UserError as error:
        print_text("To mend", *(f"  {fault}" for fault in error.faults))
        return EXIT_USER_ERROR
    print_text("A run can start: every package that matters has a version that was tested.")
    return 0


def _versions() -> Iterator[str]:
    yield f"paddle-finetune {__version__}, Python {platform.python_version()}, {platform.platform()}"
    found = {package: version for package in _PACKAGES if (version := _version(package)) is not None}
    yield (
        ", ".join(f"{package} {version}" for package, version in found.items())
        or "no package of the tested set"
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device() -> Iterator[str]:
    num_gpus = count_visible_gpus()
    if detect_device() == "gpu":
        yield f"runs use the GPU; {num_gpus} visible"
        return
    yield "runs use the CPU"
    if num_gpus:
        yield (
            f"{num_gpus} GPU{'s are' if num_gpus > 1 else ' is'} visible, but this Paddle is built for the CPU: install "
            "paddlepaddle-gpu for your CUDA from Paddle's own package index (README.md, section GPU)"
        )
    elif has_gpu_build():
        yield "Paddle is built for GPUs, but none is visible: check the driver and CUDA_VISIBLE_DEVICES"
    yield configure_processor(dict(os.environ))


def _memory() -> Iterator[str]:
    import psutil

    memory = psutil.virtual_memory()
    yield f"{memory.available / _GIBIBYTE:.1f} GiB of {memory.total / _GIBIBYTE:.1f} GiB are free"


def _disk() -> Iterator[str]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for use, folder in (("this folder", Path.cwd()), ("downloads", cache)):
        there = next(place for place in (folder, *folder.parents) if place.is_dir())
        free = shutil.disk_usage(there).free
        little = ": little, a checkpoint of full training takes 12 to 16 bytes for each weight"
        yield f"{free / _GIBIBYTE:.1f} GiB free for {use} ({folder})" + little * (free < _SMALL_DISK_BYTES)


def _hubs(*, offline: bool) -> Iterator[str]:
    from finetune.models.hubs.hugging_face import is_offline
    from finetune.models.hubs.reach import is_reachable
    from finetune.models.hubs.repository import HUBS

    if offline or is_offline():
        yield "not tried"
        return
    with ThreadPoolExecutor(len(HUBS)) as pool:
        ask: Callable[[str], bool] = is_reachable
        answers = list(pool.map(ask, [hub.endpoint() for hub in HUBS.values()]))
    for hub, answers_at_all in zip(HUBS.values(), answers, strict=True):
        state = "answers" if answers_at_all else "cannot be reached"
        yield f"{hub.title} ({hide_credentials(hub.endpoint())}) {state}"
    if not any(answers):
        yield "give models and data as local folders, or name a mirror in HF_ENDPOINT"


def _extras() -> Iterator[str]:
    for module, use in _EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield f"{module}  {use}"
