"""Curves that are sent to VisualDL, TensorBoard, Weights & Biases, SwanLab and MLflow are those of train_log.jsonl."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
from paddlenlp.trainer import TrainerCallback

from finetune.settings.trackers import TRACKER_PACKAGES, reports_to
from tests.conftest import FAST, losses, read_log, run_entry, write_arguments

FILES = {
    "visualdl": ("visualdl", "vdlrecords*.log"),
    "tensorboard": ("tensorboardX", "events.out.tfevents*"),
    "wandb": ("wandb", "run-*.wandb"),
    "swanlab": ("swanlab", "*.swanlab"),
    "mlflow": ("mlflow", "mlflow.db"),
}
"""Service -> its package, and what it leaves in the output folder."""


@pytest.fixture
def train(tiny_llama, small_data, tmp_path):
    """Runs a short training that reports to a service and gives its output folder."""

    def run(service: str, *, code: int = 0, **changes):
        settings = FAST | {
            "model_name_or_path": str(tiny_llama),
            "dataset_name_or_path": str(small_data),
            "output_dir": str(tmp_path / "out"),
            "max_steps": 3,
            "do_eval": True,
            "evaluation_strategy": "steps",
            "eval_steps": 3,
            "report_to": [service],
            **changes,
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


class StandInMlflow(ModuleType):
    """Stands for the package where it is not installed: keeps what it is told."""

    def __init__(self, fails_after: int = 10**9):
        super().__init__("mlflow")
        self.__spec__ = ModuleSpec("mlflow", None)
        self.metrics, self.parameters, self.runs, self.ended = [], {}, [], 0
        self.fails_after = fails_after

    def set_tracking_uri(self, address):
        self.address = address

    def start_run(self, *, run_id, run_name):
        self.runs.append((run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "0f1e"))

    def log_params(self, parameters):
        self.parameters |= parameters

    def log_metrics(self, metrics, *, step):
        if len(self.metrics) >= self.fails_after:
            raise ConnectionError("the server is gone")
        self.metrics.append((step, metrics))

    def end_run(self):
        self.ended += 1


@pytest.fixture
def mlflow(monkeypatch):
    stand_in = StandInMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", stand_in)
    monkeypatch.delitem(sys.modules, "finetune.reporting.mlflow_callback", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield stand_in
    sys.modules.pop("finetune.reporting.mlflow_callback", None)


def test_mlflow_gets_curves_and_settings_and_goes_on_with_its_run(train, mlflow):
    out = train("mlflow", wandb_api_key="hush", save_strategy="steps", save_steps=3)
    curve = {step: metrics["train/loss"] for step, metrics in mlflow.metrics if "train/loss" in metrics}
    assert curve == dict(enumerate(losses(out), 1))
    (evaluation,) = (line for line in read_log(out, "eval"))
    assert [metrics["eval/loss"] for _, metrics in mlflow.metrics if "eval/loss" in metrics] == [
        evaluation["eval_loss"]
    ]
    assert mlflow.parameters["max_steps"] == "3"
    assert "hush" not in str(mlflow.parameters)
    assert mlflow.address.startswith("sqlite:///") and str(out) in mlflow.address
    assert mlflow.runs == [(None, "out")] and mlflow.ended == 1
    train("mlflow", max_steps=4, eval_steps=4, save_strategy="steps", save_steps=4)
    assert mlflow.runs[1:] == [("0f1e", None)]
    assert [step for step, metrics in mlflow.metrics if "train/loss" in metrics] == [1, 2, 3, 4]


def test_a_server_that_fails_ends_no_training(train, mlflow, caplog):
    mlflow.fails_after = 1
    out = train("mlflow")
    assert len(losses(out)) == 3
    assert caplog.text.count("MLflow got no more of this run: the server is gone") == 1


def test_mlflow_has_the_curve_of_the_log(train, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = train("mlflow")
    (database,) = out.rglob("mlflow.db")
    client = tracking.MlflowClient(f"sqlite:///{database}")
    run_id = database.with_name("mlflow_run_id").read_text(encoding="utf-8").strip()
    history = client.get_metric_history(run_id, "train/loss")
    assert {each.step: each.value for each in history} == pytest.approx(
        dict(enumerate(losses(out), 1)), rel=1e-9
    )
    assert client.get_run(run_id).info.status == "FINISHED"


def test_all_names_every_tracker_that_is_installed(monkeypatch):
    for name in TRACKER_PACKAGES.values():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    assert all(reports_to(["all"], service) for service in TRACKER_PACKAGES)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert not reports_to(["all"], "mlflow")
    assert not reports_to(["visualdl"], "mlflow")
