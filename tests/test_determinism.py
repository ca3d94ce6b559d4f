"""Deterministic kernels: chosen when asked for, before the device is used, and not otherwise."""

import json

import paddle
import pytest

from finetune.machine.determinism import ENVIRONMENT, FLAGS, make_deterministic
from finetune.run.processes import prepare_device
from finetune.settings.arguments import parse_arguments


def choose(device: str, environ: dict[str, str]) -> list[dict]:
    calls: list[dict] = []
    make_deterministic(device, set_flags=calls.append, environ=environ)
    return calls


@pytest.mark.parametrize("device", ["gpu", "gpu:1"])
def test_flags_and_environment_on_a_gpu(device):
    environ: dict[str, str] = {}
    assert choose(device, environ) == [
        {"FLAGS_cudnn_deterministic": True, "FLAGS_embedding_deterministic": 1}
    ]
    assert environ == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


def test_what_the_person_has_set_stays():
    environ = {"NCCL_ALGO": "Tree"}
    choose("gpu", environ)
    assert environ == {**ENVIRONMENT, "NCCL_ALGO": "Tree"}


@pytest.mark.parametrize("device", ["cpu", "npu:0"])
def test_nothing_happens_elsewhere(device):
    environ: dict[str, str] = {}
    assert choose(device, environ) == [] and environ == {}


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_sets_the_flags_before_it_uses_the_device(tmp_path, monkeypatch, asked):
    path = tmp_path / "args.json"
    path.write_text(
        json.dumps(
            {
                "model_name_or_path": "owner/model",
                "dataset_name_or_path": str(tmp_path),
                "output_dir": str(tmp_path / "out"),
                "do_train": True,
                "deterministic": asked,
            }
        )
    )
    args = parse_arguments([str(path)])
    assert args.model.deterministic is asked
    args.training.device = "gpu"
    events: list = []
    monkeypatch.setattr(paddle, "set_flags", lambda flags: events.append(flags))
    monkeypatch.setattr(paddle, "set_device", events.append)
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    prepare_device(args, 1)
    assert events == ([FLAGS, "gpu"] if asked else ["gpu"])


def test_it_is_silent_on_cpu(capsys):
    make_deterministic("cpu")
    assert capsys.readouterr() == ("", "")
