"""What users get wrong, through the entry script: exit code 2, a message with a remedy, nothing lost."""

from __future__ import annotations

import fcntl
import json
import shutil

import pytest

from finetune.run.directory import LOCK_FILE
from tests.conftest import FAST, ROOT, launch, losses, run_entry, write_arguments


@pytest.fixture
def arguments(tiny_llama, small_data, tmp_path):
    """Writes an argument file that would run, with some settings changed."""

    def write(**settings):
        base = FAST | {
            "model_name_or_path": str(tiny_llama),
            "dataset_name_or_path": str(small_data),
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
        }
        return write_arguments(tmp_path / "arguments.json", **(base | settings))

    return write


def fails(capsys, path, *messages: str) -> None:
    capsys.readouterr()
    assert run_entry(path) == 2
    stderr = capsys.readouterr().err
    for message in messages:
        assert message in stderr
    assert "Traceback" not in stderr


def test_all_argument_faults_at_once_without_importing_paddle(tmp_path):
    path = write_arguments(
        tmp_path / "bad.json", model_name_or_path="x", dataset_name_or_path="./data", output_dir="out", do_train=True,
        learnin_rate=1, max_length=10, src_length=20, lora=True, prefix_tuning=True,
    )  # fmt: skip
    result = launch("-X", "importtime", "finetune_generation.py", path)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert any("learnin_rate" in line and "learning_rate" in line for line in lines)
    assert any("src_length" in line for line in lines)
    assert any("prefix_tuning" in line for line in lines)
    assert len(lines) == 3
    assert "| paddle" not in result.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"src": "a", "tgt": ', "train.json:2:"),
        (b'{"src": "a"}', "tgt"),
        (b'{"src": {"a": 5}, "tgt": "b"}', "src"),
        (b"\xff\xfe broken", "UTF-8"),
        (b"[1, 2]", "object"),
    ],
)
def test_broken_data_lines(arguments, small_data, tmp_path, capsys, line, message):
    folder = shutil.copytree(small_data, tmp_path / "data")
    lines = (folder / "train.json").read_bytes().splitlines()
    (folder / "train.json").write_bytes(b"\n".join([lines[0], line, *lines[2:]]))
    fails(capsys, arguments(dataset_name_or_path=str(folder)), "train.json:2", message)


def test_missing_dev_file(arguments, small_data, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(small_data / "train.json", folder)
    fails(capsys, arguments(dataset_name_or_path=str(folder), do_eval=True), "dev.json")


def test_unknown_dataset_name(arguments, capsys):
    fails(capsys, arguments(dataset_name_or_path="no_such_set"), "no_such_set", "train.json")


def test_model_that_is_nowhere(arguments, capsys):
    fails(
        capsys, arguments(model_name_or_path="someone/some-model"),
        "someone/some-model", "python -m finetune.models.tiny",
    )  # fmt: skip


def test_model_of_an_unknown_family(arguments, tiny_llama, tmp_path, capsys):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "t5", "architectures": ["T5"]}
    (folder / "config.json").write_text(json.dumps(config))
    fails(capsys, arguments(model_name_or_path=str(folder)), "t5", "llama")


def test_output_folder_of_somebody_else(arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    fails(capsys, arguments(), "is not empty", "--overwrite_output_dir true")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_checkpoints_of_another_program_are_left_alone(arguments, tmp_path, capsys):
    theirs = tmp_path / "out" / "checkpoint-100"
    theirs.mkdir(parents=True)
    (theirs / "model_state.pdparams").write_bytes(b"days of work")
    (theirs / "trainer_state.json").write_text("{}")
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    (tmp_path / "out" / "trainer_state.json").write_text("{}")
    for more in ({}, {"overwrite_output_dir": True}):
        fails(
            capsys, arguments(**settings, **more), "holds checkpoint-100, which another program wrote",
            "choose another output_dir", f"model_name_or_path (or lora_path, prefix_path) to {theirs}",
        )  # fmt: skip
    assert (tmp_path / "out" / "trainer_state.json").read_text() == "{}"
    assert (theirs / "model_state.pdparams").read_bytes() == b"days of work"


def test_results_of_another_program_are_not_overwritten_by_an_evaluation(arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "all_results.json").write_text('{"theirs": 1}')
    fails(capsys, arguments(do_train=False, do_eval=True), "holds all_results.json of another program")
    assert (tmp_path / "out" / "all_results.json").read_text() == '{"theirs": 1}'


def test_finished_run_is_not_overwritten_unless_asked(arguments, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_entry(arguments(do_eval=True)) == 0
    before = (out / "model.safetensors").read_bytes()
    fails(
        capsys,
        arguments(learning_rate=1e-2),
        "a finished run with other settings",
        "learning_rate (0.001 -> 0.01)",
    )
    fails(capsys, arguments(max_steps=4, do_eval=True), "finished run without checkpoints")
    assert (out / "model.safetensors").read_bytes() == before
    assert run_entry(arguments(lora=True, overwrite_output_dir=True)) == 0
    # Nothing of the replaced run is left to be taken for the new one's.
    assert not (out / "model.safetensors").exists()
    assert (out / "lora_config.json").is_file()
    assert "eval_loss" not in json.loads((out / "all_results.json").read_text())


def test_overwriting_run_continues_once_begun(arguments, tmp_path):
    out = tmp_path / "out"
    assert run_entry(arguments(save_strategy="steps", save_steps=1)) == 0
    again = arguments(save_strategy="steps", save_steps=1, max_steps=4, overwrite_output_dir=True)
    assert run_entry(again) == 0
    curve = losses(out)
    # As a kill after step 3 would leave it: the new run's marker, no final files, a checkpoint.
    (out / ".overwriting.json").write_text((out / "arguments.json").read_text())
    (out / "trainer_state.json").unlink()
    shutil.rmtree(out / "checkpoint-4")
    assert run_entry(again) == 0
    assert losses(out) == curve
    assert not (out / ".overwriting.json").exists()


def test_resuming_an_older_checkpoint_sets_later_ones_aside(arguments, tmp_path):
    out = tmp_path / "out"
    assert run_entry(arguments(save_strategy="steps", save_steps=1, max_steps=4)) == 0
    shutil.copytree(out / "checkpoint-1", tmp_path / "checkpoint-1")
    code = run_entry(
        arguments(
            save_strategy="steps", save_steps=1, max_steps=3, save_total_limit=1,
            resume_from_checkpoint=str(out / "checkpoint-1"),
        )
    )  # fmt: skip
    assert code == 0
    assert sorted(path.name for path in out.glob("*checkpoint-*")) == ["checkpoint-3"]


def test_no_secret_is_written_anywhere(arguments, tmp_path):
    code = run_entry(arguments(wandb_api_key="SEKRET1", aistudio_token="SEKRET2", report_to=["visualdl"]))
    assert code == 0
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any("vdlrecords" in path.name for path in written)
    assert not [path for path in written if b"SEKRET" in path.read_bytes()]


def test_second_run_in_the_same_folder(arguments, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails(capsys, arguments(), "in use by another running process")


def contents(folder):
    """All files but the lock, which names the process that looked."""
    return {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE
    }


def test_finished_run_started_again_says_so_and_touches_nothing(arguments, tmp_path, capsys):
    path = arguments(save_strategy="steps", save_steps=2)
    assert run_entry(path) == 0
    before = contents(tmp_path / "out")
    capsys.readouterr()
    assert run_entry(path) == 0
    assert "holds this run, finished" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_continuing_with_other_batches_is_refused(arguments, tmp_path, capsys):
    assert run_entry(arguments(save_strategy="steps", save_steps=2)) == 0
    (tmp_path / "out" / "trainer_state.json").unlink()
    fails(
        capsys, arguments(save_strategy="steps", save_steps=2, max_steps=4, per_device_train_batch_size=2),
        "global_batch_size 4, this run has 2",
    )  # fmt: skip


def test_continuing_with_other_settings_or_data_is_said(arguments, small_data, tmp_path, capsys):
    assert run_entry(arguments(save_strategy="steps", save_steps=2)) == 0
    (tmp_path / "out" / "trainer_state.json").unlink()
    folder = shutil.copytree(small_data, tmp_path / "data")
    lines = (folder / "train.json").read_text(encoding="utf-8").splitlines()
    (folder / "train.json").write_text("\n".join(reversed(lines)), encoding="utf-8")
    capsys.readouterr()
    path = arguments(
        save_strategy="steps", save_steps=2, max_steps=4, weight_decay=0.5, dataset_name_or_path=str(folder)
    )
    assert run_entry(path) == 0
    stderr = capsys.readouterr().err
    assert "weight_decay (0.0 -> 0.5)" in stderr
    assert "the training data changed since this run began" in stderr


def test_resume_from_a_broken_checkpoint_by_name(arguments, tmp_path, capsys):
    assert run_entry(arguments(save_strategy="steps", save_steps=2)) == 0
    checkpoint = tmp_path / "out" / "checkpoint-2"
    (checkpoint / "optimizer.safetensors").unlink()
    fails(
        capsys, arguments(resume_from_checkpoint=str(checkpoint), max_steps=4),
        "cannot be used: optimizer.safetensors is missing",
    )  # fmt: skip


def test_adapter_of_another_model(arguments, tiny_llama, tmp_path, capsys):
    from finetune.models.tiny.checkpoint import build_tiny

    assert run_entry(arguments(lora=True)) == 0
    other = build_tiny("llama", tmp_path / "other", hidden_size=64, num_layers=2, num_heads=4, vocab_size=600)
    fails(
        capsys,
        arguments(lora=True, lora_path=str(tmp_path / "out"), model_name_or_path=str(other),
                  output_dir=str(tmp_path / "out2")),
        "does not fit this model", "Was it trained on another base?",
    )  # fmt: skip


def test_lora_targets_that_match_nothing(arguments, capsys):
    fails(
        capsys, arguments(lora=True, lora_target_modules=[".*q_prj"]),
        "no module matches '.*q_prj'", "q_proj",
    )  # fmt: skip


def test_more_degrees_than_processes(tiny_llama, tmp_path, capsys):
    code = run_entry(
        ROOT / "llama" / "sft_argument.json", "--model_name_or_path", tiny_llama, "--device", "cpu",
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 2
    assert "tensor_parallel_degree" in capsys.readouterr().err
