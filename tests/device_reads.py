"""Finds where a program reads numbers from the device, which on a GPU makes the host wait for it.

On a CPU the same calls cost nothing, so they are counted instead. Left out is what only stands for something on a CPU:
the network between processes, and arithmetic in half precision.
"""

from __future__ import annotations

import functools
import json
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_CPU_ONLY = ("finetune/processes/cpu/", "finetune/machine/half_precision/")
_LIBRARY = "/site-packages/paddle/"
_TENSOR_METHODS = (
    "numpy", "item", "tolist", "cpu", "nonzero", "masked_select", "unique",
    "__array__", "__bool__", "__float__", "__format__", "__index__", "__int__", "__repr__", "__str__",
)  # fmt: skip
# The sizes of their results depend on what the tensors hold.
_FUNCTIONS = ("nonzero", "masked_select", "unique", "unique_consecutive")


class DeviceReads:
    """What was read, as long as `is_watching`.

    Attributes:
        found: For each read the call, and the file and line of ours (or of PaddleNLP) that made it.
        is_watching: Whether reads are noted.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self.is_watching = False
        self._inside = threading.local()

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        """Notes reads within the block, from an empty list on."""
        self.found, self.is_watching = [], True
        try:
            yield self.found
        finally:
            self.is_watching = False

    def wrap(self, call: Callable, name: str, reads: Callable[..., bool] = lambda *_: True) -> Callable:
        """The call, noted whenever it reads; what it calls itself is not noted again."""

        @functools.wraps(call)
        def noted(*arguments: Any, **named: Any) -> Any:
            depth = getattr(self._inside, "depth", 0)
            if self.is_watching and not depth and reads(*arguments):
                self._note(name)
            self._inside.depth = depth + 1
            try:
                return call(*arguments, **named)
            finally:
                self._inside.depth = depth

        return noted

    def _note(self, name: str) -> None:
        frames = [frame for frame in traceback.extract_stack()[:-2] if _LIBRARY not in frame.filename]
        paths = [frame.filename.removeprefix(f"{ROOT}/") for frame in frames]
        if not any(path.startswith(_CPU_ONLY) for path in paths):
            self.found.append(f"{name} in {paths[-1]}:{frames[-1].lineno}")


@contextmanager
def patched_reads() -> Iterator[DeviceReads]:
    """Has every call of Paddle that reads from the device noted, for the time of the block."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in _calls()]
    try:
        yield patch_reads()
    finally:
        for owner, name, call in originals:
            setattr(owner, name, call)


def patch_reads() -> DeviceReads:
    """Has them noted for good."""
    reads = DeviceReads()
    for owner, name in _calls():
        is_read = {"reads": _has_bool_index} if name == "__getitem__" else {}
        setattr(owner, name, reads.wrap(getattr(owner, name), name, **is_read))
    return reads


def _calls() -> list[tuple[Any, str]]:
    """What reads, by owner and name."""
    import paddle

    methods = [(paddle.Tensor, name) for name in (*_TENSOR_METHODS, "__getitem__")]
    functions = [(paddle, name) for name in _FUNCTIONS]
    return [(owner, name) for owner, name in methods + functions if hasattr(owner, name)]


def _has_bool_index(_tensor: Any, index: Any) -> bool:
    import paddle

    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, paddle.Tensor) and part.dtype == paddle.bool for part in parts)


def watch_run(path: Path) -> None:
    """For a process that runs the entry script: writes what each step and each evaluation reads, as JSON lines."""
    from finetune.training.evaluation import LossEvaluation
    from finetune.training.optimizer_step import OptimizerStep

    reads = patch_reads()

    def watched(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        @functools.wraps(call)
        def run(*arguments: Any, **named: Any) -> Any:
            with reads.watching() as found:
                result = call(*arguments, **named)
            with path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"call": name, "reads": found}) + "\n")
            return result

        setattr(owner, name, run)

    watched(OptimizerStep, "train_batch")
    watched(LossEvaluation, "run")


def watched_reads(path: Path, call: str) -> list[list[str]]:
    """What `watch_run` wrote about a call, one list for each time it ran."""
    lines = []
    with suppress(FileNotFoundError):
        lines = path.read_text(encoding="utf-8").splitlines()
    return [record["reads"] for record in map(json.loads, lines) if record["call"] == call]
