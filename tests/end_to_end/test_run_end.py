"""Whatever moment of its end a run is killed at, the same command completes what is missing and trains nothing again."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

import finetune.reporting.plot
import finetune.run.final_weights
import finetune.run.report
import finetune.training.checkpoint_series
from finetune.errors import UserError
from finetune.run.directory import RunDirectory
from finetune.training.trainer import FinetuneTrainer
from tests.conftest import FAST, run_entry, write_arguments


class Killed(BaseException):
    """Ends the process where no handler of the program hears it."""


@pytest.fixture
def arguments(tiny_llama, small_data, tmp_path):
    """A run whose end has every part: an evaluation by texts, its file, the curve, the upload."""
    return write_arguments(
        tmp_path / "arguments.json",
        **FAST,
        model_name_or_path=str(tiny_llama),
        dataset_name_or_path=str(small_data),
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        do_eval=True,
        eval_with_do_generation=True,
        max_new_tokens=2,
        save_generation_output=True,
        save_to_aistudio=True,
        aistudio_repo_id="somebody/model",
    )


@pytest.fixture
def uploads(monkeypatch) -> list[Path]:
    """The folders that were uploaded."""
    found: list[Path] = []
    monkeypatch.setattr(finetune.run.report, "upload", lambda folder, *_: found.append(folder))
    return found


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob(pattern)}


def kill_after(monkeypatch, owner, name: str) -> None:
    """The process ends when a function has done its work."""
    work = getattr(owner, name)

    def work_and_end(*args, **kwargs):
        work(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(owner, name, work_and_end)


MOMENTS = {
    "final weights": (finetune.run.final_weights, "_move_final_files"),
    "evaluation": (FinetuneTrainer, "evaluate"),
    "results": (finetune.run.report, "write_results"),
    "generated texts": (finetune.run.report, "write_generations"),
    "curve": (finetune.reporting.plot, "plot_losses"),
    "summary": (finetune.run.report, "print_summary"),
    "upload": (finetune.run.report, "upload"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_same_command_completes_the_end(moment, arguments, uploads, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, *MOMENTS[moment])
        run_entry(arguments)
    weights = hashes(out, "model*.safetensors")
    assert weights
    (out / "tmp-final-dead").mkdir()
    (out / ".loss.png.tmp").touch()
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "train", lambda *_: pytest.fail("trained again"))
        assert run_entry(arguments) == 0
    assert hashes(out, "model*.safetensors") == weights
    for name in ("all_results.json", "generated_output.json", "loss.png", "trainer_state.json"):
        assert (out / name).stat().st_size > 0
    assert uploads[-1] == out
    records = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert [(record["kind"], record["step"]) for record in records] == [
        ("train", 1),
        ("train", 2),
        ("eval", 2),
    ]
    results = json.loads((out / "all_results.json").read_text())
    metrics = {name for name in records[-1] if name.startswith("eval_")} - {"eval_seconds"}
    assert metrics and metrics <= results.keys() and results["train_steps"] == 2
    assert not [
        path
        for path in out.iterdir()
        if path.name.startswith(("tmp-", ".trained")) or path.name.endswith(".tmp")
    ]
    capsys.readouterr()
    num_uploads = len(uploads)
    assert run_entry(arguments) == 0
    assert "holds this run, finished" in capsys.readouterr().err
    assert len(uploads) == num_uploads


def test_checkpoints_that_a_killed_run_had_no_time_to_delete_go(
    tiny_llama, small_data, tmp_path, monkeypatch
):
    settings = FAST | {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 2}
    path = write_arguments(
        tmp_path / "arguments.json", **settings, model_name_or_path=str(tiny_llama),
        dataset_name_or_path=str(small_data), output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    work = finetune.training.checkpoint_series.rotate

    def end_before(folder, *, newest, **options):
        if newest.name == "checkpoint-2":
            raise Killed
        return work(folder, newest=newest, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(finetune.training.checkpoint_series, "rotate", end_before)
        run_entry(path)
    assert {each.name for each in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    assert run_entry(path) == 0
    assert [each.name for each in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_an_adapter_that_continues_on_another_base_is_told_so(tiny_llama, small_data, tmp_path, capsys):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    settings = FAST | {"save_strategy": "steps", "save_steps": 1, "lora": True, "max_steps": 1}
    path = write_arguments(
        tmp_path / "arguments.json", **settings, model_name_or_path=str(base),
        dataset_name_or_path=str(small_data), output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    assert run_entry(path) == 0
    assert run_entry(path, "--max_steps", 2) == 0
    assert "other base weights" not in capsys.readouterr().err
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 0x01
    weights.write_bytes(content)
    assert run_entry(path, "--max_steps", 3) == 0
    said = capsys.readouterr().err
    assert (
        f"warning: the adapter was trained on other base weights than {base} holds now (model.safetensors)"
        in said
    )


@pytest.mark.parametrize(
    "facts",
    [
        {"metrics": [1], "best_step": None},
        {"metrics": {"train_loss": "low"}, "best_step": None},
        {"metrics": {}, "best_step": "x"},
    ],
)
def test_a_record_of_the_end_that_holds_other_values_is_named(tmp_path, facts):
    (tmp_path / ".trained.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="holds no metrics of a training"):
        finetune.run.final_weights.take_up_final_weights(RunDirectory(tmp_path), None)  # type: ignore[arg-type]
