"""Shared by all tests: tiny checkpoints built once, and the entry script run in two ways."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune.machine.processor import configure_processor  # noqa: E402
from tests.texts import write_data_sets  # noqa: E402

configure_processor()  # before any test imports Paddle
# Under nohup, or in the background of a shell, signals are ignored, which processes that tests start would inherit.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)
pytest_plugins = ["tests.tiny_models"]
# No test writes into the home folder.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="finetune-tests-")
os.environ["FINETUNE_LANG"] = "en"  # whatever the locale of the machine

FAST = {
    "device": "cpu",
    "do_train": True,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "src_length": 96,
    "max_length": 160,
    "disable_tqdm": True,
}
"""Settings of a short training on the small data set."""


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """A data folder with 40 training and 10 dev lines of the sample set."""
    folder = tmp_path_factory.mktemp("small_data")
    for split, count in (("train", 40), ("dev", 10)):
        lines = (ROOT / "data" / f"{split}.json").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{split}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def data_sets(tmp_path_factory) -> dict[str, Path]:
    """Files in the shapes that other tools use, by name; see tests/texts.py."""
    return write_data_sets(tmp_path_factory.mktemp("data_sets"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A random two-layer Llama with a SentencePiece tokenizer trained on the sample set."""
    from finetune.models.tiny.checkpoint import build_tiny

    folder = tmp_path_factory.mktemp("tiny") / "llama"
    build_tiny("llama", folder, hidden_size=32, num_layers=2, num_heads=4, vocab_size=600, max_length=256)
    return folder


@pytest.fixture(scope="session")
def sharp_llama(tmp_path_factory) -> Path:
    """A tiny Llama whose layers matter for what it writes."""
    from tests.serving.export.builders import build_sharp

    return build_sharp("llama", tmp_path_factory.mktemp("sharp") / "llama")


@pytest.fixture(scope="session")
def exported_llama(sharp_llama, tmp_path_factory) -> Path:
    """The same, exported for static inference."""
    from tests.serving.export.builders import export_folder

    return export_folder(sharp_llama, tmp_path_factory.mktemp("exported") / "llama")


def write_arguments(path: Path, **settings) -> Path:
    """Writes an argument file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    return path


def read_log(output_dir: Path, kind: str = "train") -> list[dict]:
    """Records of one kind from a run's train_log.jsonl."""
    lines = (output_dir / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(output_dir: Path) -> list[float]:
    """Loss of every logged step."""
    return [record["loss"] for record in read_log(output_dir)]


def run_entry(arguments: Path, *command_line: object) -> int:
    """Runs finetune_generation.py inside this process (which has Paddle loaded already); its exit code."""
    import finetune_generation
    from finetune.processes.command import run_command

    argv, sys.argv = sys.argv, ["finetune_generation.py", str(arguments), *map(str, command_line)]
    try:
        return run_command(finetune_generation.main)
    finally:
        sys.argv = argv


def launch(*command_line: object, timeout: float = 120, **environ: str) -> subprocess.CompletedProcess:
    """Runs a script of the repository as a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, command_line)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environ,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
