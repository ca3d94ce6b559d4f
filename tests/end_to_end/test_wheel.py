"""The wheel by itself: built from the source archive, in an environment of its own, in a folder without the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from finetune.storage.shipped_files import shipped_arguments
from tests.conftest import ROOT
from tests.source_files import tracked

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(1800)]

UV = Path(sys.executable).with_name("uv")


def call(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program in another folder, without what this process would hand down of the repository."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environ["UV_NO_CACHE"] = "1"  # it would fill the folder of caches that tests leave behind
    result = subprocess.run(
        list(map(str, words)), cwd=cwd, env=environ, capture_output=True, text=True, timeout=1500
    )
    assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from what git has by way of the source archive."""
    source = tmp_path_factory.mktemp("source")
    for path in tracked():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    out = tmp_path_factory.mktemp("built")
    call(UV, "build", "--out-dir", out, source, cwd=source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> Path:
    """The folder of programs of an environment that holds the locked packages and the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    call(sys.executable, "-m", "venv", folder / "env", cwd=folder)  # with pip, which PaddleNLP imports
    python = folder / "env" / "bin" / "python"
    lock = ROOT / "requirements" / "cpu.lock"
    call(UV, "pip", "install", "--python", python, "--require-hashes", "-r", lock, cwd=folder)
    call(UV, "pip", "install", "--python", python, "--no-deps", wheel, cwd=folder)
    return python.parent


def test_the_wheel_holds_the_package_and_its_files_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"finetune", "paddle_finetune"}
    assert {"finetune/py.typed", "finetune/shipped/data/train.json"} <= set(names)
    for short in shipped_arguments():
        assert f"finetune/shipped/{short}_argument.json" in names
    metadata = next(name for name in names if name.endswith("/METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "\nKeywords: " in text and "\nProject-URL: " in text and "\nAuthor: " in text


def test_tiny_train_merge_predict_in_another_folder(programs, tmp_path):
    program = programs / "paddle-finetune"
    assert call(program, "--version", cwd=tmp_path).stdout.startswith("paddle-finetune ")
    assert "A run can start" in call(program, "doctor", "--offline", cwd=tmp_path).stdout
    call(program, "tiny", "llama", "model", "--hidden_size", 32, "--num_layers", 2, cwd=tmp_path)
    told = call(
        program, "init", "--model_name_or_path", "model", "--sample_data", "--output_file", "run.json",
        "--output_dir", "out", "--max_steps", 2, "--max_train_samples", 40, "--max_eval_samples", 8, cwd=tmp_path,
    ).stdout  # fmt: skip
    assert "paddle-finetune train run.json" in told
    assert "What is learned" in call(program, "preview", "run.json", cwd=tmp_path).stdout
    trained = call(program, "train", "run.json", cwd=tmp_path)
    next_line = next(line for line in (trained.stdout + trained.stderr).splitlines() if "merge lora" in line)
    assert "paddle-finetune merge lora --lora_path out --merge_model_path out-merged" in next_line
    call(
        program, "merge", "lora", "--lora_path", "out", "--merge_model_path", "merged", "--model_name_or_path",
        "model", cwd=tmp_path,
    )  # fmt: skip
    lines = (tmp_path / "data" / "dev.json").read_text(encoding="utf-8").splitlines()[:2]
    (tmp_path / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    call(
        program, "predict", "--model_name_or_path", "merged", "--data_file", "in.jsonl", "--output_file", "a.jsonl",
        "--max_new_tokens", 4, cwd=tmp_path,
    )  # fmt: skip
    answers = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == 2 and all("output" in json.loads(line) for line in answers)
    found = call(programs / "python", "-c", "import finetune; print(finetune.__file__)", cwd=tmp_path).stdout
    assert "site-packages" in found
