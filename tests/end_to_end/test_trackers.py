"""Curves that are sent to VisualDL, TensorBoard, Weights & Biases and SwanLab are those of train_log.jsonl."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import ClassVar

import pytest
from paddlenlp.trainer import TrainerCallback

from tests.conftest import FAST, losses, read_log, run_entry, write_arguments

FILES = {
    "visualdl": ("visualdl", "vdlrecords*.log"),
    "tensorboard": ("tensorboardX", "events.out.tfevents*"),
    "wandb": ("wandb", "run-*.wandb"),
    "swanlab": ("swanlab", "*.swanlab"),
}
"""Service -> its package, and what it leaves in the output folder."""


@pytest.fixture
def train(tiny_llama, small_data, tmp_path):
    """Runs a short training that reports to a service and gives its output folder."""

    def run(service: str, *, code: int = 0):
        settings = FAST | {
            "model_name_or_path": str(tiny_llama),
            "dataset_name_or_path": str(small_data),
            "output_dir": str(tmp_path / "out"),
            "max_steps": 3,
            "do_eval": True,
            "evaluation_strategy": "steps",
            "eval_steps": 3,
            "report_to": [service],
        }
        assert run_entry(write_arguments(tmp_path / "arguments.json", **settings)) == code
        return tmp_path / "out"

    return run


@pytest.mark.parametrize("service", FILES)
def test_a_record_is_left(train, service, monkeypatch):
    package, pattern = FILES[service]
    pytest.importorskip(package)
    for variable in ("WANDB_MODE", "SWANLAB_MODE"):
        monkeypatch.setenv(variable, "offline")
    assert list(train(service).rglob(pattern))


def test_visualdl_has_the_curve_of_the_log(train):
    reader = pytest.importorskip("visualdl").LogReader
    out = train("visualdl")
    (file,) = out.rglob("vdlrecords*.log")
    record = reader(file_path=str(file))

    def curve(tag: str) -> dict[int, float]:
        return {each.id: each.value for each in record.get_data("scalar", tag)}

    assert curve("train/loss") == pytest.approx(dict(enumerate(losses(out), 1)), rel=1e-6)
    (evaluation,) = (line for line in read_log(out, "eval"))
    assert curve("eval/loss") == pytest.approx({3: evaluation["eval_loss"]}, rel=1e-6)
    assert list(record.get_data("hyper_parameters", "hparam"))


class RecordingCallback(TrainerCallback):
    """Stands for SwanLab's callback: keeps what it is told."""

    logs: ClassVar[list[dict]] = []

    def __init__(self, *, log_dir: str):
        self.log_dir = log_dir

    def on_log(self, args, state, control, logs=None, **_more):
        if state.is_world_process_zero:
            self.logs.append(logs)


def test_swanlab_s_own_callback_is_told(train, monkeypatch, capfd):
    for name in ("swanlab", "swanlab.integration", "swanlab.integration.paddlenlp"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.SwanLabCallback = RecordingCallback
        monkeypatch.setitem(sys.modules, name, module)
    RecordingCallback.logs.clear()
    out = train("swanlab")
    steps = [logs for logs in RecordingCallback.logs if "loss" in logs]
    assert [logs["loss"] for logs in steps] == losses(out)
    assert [logs["eval_loss"] for logs in RecordingCallback.logs if "eval_loss" in logs]


def test_a_service_without_its_package_is_refused(train, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "swanlab", None)
    train("swanlab", code=2)
    assert "report_to names swanlab, whose package swanlab is not installed" in capfd.readouterr().err
