"""Runs a case as real processes of the entry scripts, and what they said."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT
from tests.limits.cases import Case
from tests.limits.materials import BASE, Materials, environment, launching
from tests.limits.surroundings import CANNOT

MAX_SECONDS = 60
_TRACEBACK = re.compile(
    r"^(Traceback \(most|C\+\+ Traceback|terminate called|Fatal Python error)", re.MULTILINE
)


@dataclass(frozen=True)
class End:
    """How a command ended.

    Attributes:
        code: Its exit code; None after `MAX_SECONDS`, when it was ended.
        text: All that its processes wrote.
        seconds: That it took.
    """

    code: int | None
    text: str
    seconds: float

    def find_line(self, pattern: str) -> str:
        """The first error or warning with the pattern in it; without one, the first error at all, or ""."""
        lines = [line for line in self.text.splitlines() if line.startswith(("error: ", "warning: "))]
        errors = [line for line in lines if line.startswith("error: ")]
        return next(iter([line for line in lines if re.search(pattern, line)] + errors), "")

    @property
    def has_traceback(self) -> bool:
        """Whether some part of the program has shown a stack."""
        return _TRACEBACK.search(self.text) is not None

    @property
    def is_impossible(self) -> bool:
        """Whether this system does not let such surroundings be made."""
        return self.code == CANNOT


def run_case(case: Case, materials: Materials, home: Path) -> End:
    """Runs a case in a fresh folder of its own."""
    places = dict(materials.places)
    if case.is_large:
        places |= {"model": places["large"], "adapter": places["large_adapter"]}
    for path in case.closed:
        if (name := path.partition("/")[0]) in places:
            places[name] = Path(shutil.copytree(places[name], home / name))
    command = _command(case, places, home)
    if case.kind == "predict":
        (home / "out").mkdir()
    for path, mode in case.closed.items():
        _prepare(home / path, command)
        (home / path).chmod(mode)
    try:
        return _run(case, command, home)
    finally:
        for path in case.closed:
            with contextlib.suppress(FileNotFoundError):  # an old checkpoint may have been renamed
                (home / path).chmod(0o755)


def _prepare(path: Path, command: list[str]) -> None:
    """Makes what a case closes and the materials do not have: an output folder, what an earlier run has left in it."""
    if path.parent.name == "out":
        whole = [*command, "--save_total_limit", "3"]
        subprocess.run(whole, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=100)
        for other in path.parent.iterdir():
            if other.is_dir() and other.name != "checkpoint-2":
                shutil.rmtree(other)
            elif other.is_file() and other != path:
                other.unlink()
    elif path.name == "out":
        path.mkdir(exist_ok=True)
    elif not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.touch()


def _command(case: Case, places: dict[str, Path], home: Path) -> list[str]:
    out, model = home / "out", places["model"]
    if case.kind == "train":
        path = home / "arguments.json"
        folders = {"model_name_or_path": model, "dataset_name_or_path": places["data"], "output_dir": out}
        settings = BASE | {name: str(folder) for name, folder in folders.items()} | case.settings
        path.write_text(json.dumps(settings))
        return launching(case.num_processes, home / "log", [str(ROOT / "finetune_generation.py"), str(path)])
    script, words = {
        "merge": ("merge_lora_params", ["--model_name_or_path", model, "--lora_path", places["adapter"],
                                        "--merge_model_path", out / "merged"]),
        "ranks": ("merge_tp_params", ["--model_name_or_path", places["ranks"], "--output_dir", out / "merged"]),
        "export": ("export_model", ["--model_name_or_path", model, "--output_path", out / "exported"]),
        "predict": ("predict_generation", ["--model_name_or_path", model, "--data_file", places["data"] / "dev.json",
                                           "--max_new_tokens", 8]
                    + ([] if case.stdout else ["--output_file", out / "answers.jsonl"])),
    }[case.kind]  # fmt: skip
    return [sys.executable, str(ROOT / f"{script}.py"), *map(str, words), "--device", "cpu"]


def _run(case: Case, command: list[str], home: Path) -> End:
    words = [sys.executable, "-m", "tests.limits.surroundings"]
    if case.small is not None:
        words += ["--small", str(home / "out"), str(case.small)]
    if case.closed:
        words.append("--without_rights")
    if case.limit:
        words += ["--limit", case.limit[0], str(case.limit[1])]
    began = time.monotonic()
    with (
        open(case.stdout or os.devnull, "w", encoding="utf-8") as stream,
        subprocess.Popen(
            [*words, "--", *command], cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL,
            stdout=stream if case.stdout else subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            text=True, errors="replace",
        ) as process,
    ):  # fmt: skip
        try:
            written = process.communicate(timeout=MAX_SECONDS)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            written = process.communicate()
    seconds = time.monotonic() - began
    logs = [path.read_text(errors="replace") for path in sorted(home.glob("log/workerlog.*"))]
    text = "\n".join([written[1], written[0] or "", *logs])
    return End(code, text, seconds)
