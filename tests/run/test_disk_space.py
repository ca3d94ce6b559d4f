"""What a run will write is known before it begins, and compared with what the disk has."""

import json
import os
import resource

import pytest

from finetune.checkpoints.folder import MANIFEST_NAME
from finetune.errors import UserError
from finetune.run.directory import RunDirectory
from finetune.run.disk_space import DiskNeed, check_disk, plan_disk, try_writing
from finetune.settings.arguments import parse_arguments

MILLION = 10**6


@pytest.fixture
def settings(tmp_path):
    """Checked arguments, with some of them changed."""

    def make(**changes):
        base = {"model_name_or_path": str(tmp_path), "dataset_name_or_path": str(tmp_path), "output_dir": str(tmp_path / "out"),
                "do_train": True, "device": "cpu"}  # fmt: skip
        path = tmp_path / "arguments.json"
        path.write_text(json.dumps(base | changes))
        return parse_arguments([str(path)])

    return make


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"save_steps": 5, "save_total_limit": 2}, DiskNeed(4 * MILLION, 12 * MILLION, 3)),
        ({"save_steps": 5}, DiskNeed(4 * MILLION, 12 * MILLION, 20)),
        ({"save_steps": 60, "save_total_limit": 2}, DiskNeed(4 * MILLION, 12 * MILLION, 1)),
        ({"save_strategy": "no"}, DiskNeed(4 * MILLION, 12 * MILLION, 0)),
        ({"save_strategy": "epoch", "num_train_epochs": 3}, DiskNeed(4 * MILLION, 12 * MILLION, 3)),
    ],
)
def test_what_a_run_writes(settings, changes, expected):
    assert plan_disk(settings(**changes), num_saved=MILLION, num_trained=MILLION, num_steps=100) == expected


def test_an_adapter_writes_itself_only(settings):
    need = plan_disk(settings(save_steps=50), num_saved=MILLION, num_trained=MILLION // 2, num_steps=100)
    assert need == DiskNeed(4 * MILLION, 8 * MILLION, 2)


def test_half_precision_keeps_float32_weights_beside(settings):
    args = settings(save_steps=50, fp16=True, fp16_opt_level="O2", rehearse_half_precision=True)
    need = plan_disk(args, num_saved=MILLION, num_trained=MILLION, num_steps=100)
    assert need == DiskNeed(2 * MILLION, 14 * MILLION, 2)


@pytest.mark.parametrize("name", ["ignore_save_lr_and_optim", "save_only_model"])
@pytest.mark.parametrize(
    ("precision", "expected"),
    [({}, 4), ({"fp16": True, "fp16_opt_level": "O2", "rehearse_half_precision": True}, 2 + 4)],
)
def test_checkpoints_without_moments_are_smaller(settings, name, precision, expected):
    args = settings(**precision | {name: True})
    need = plan_disk(args, num_saved=MILLION, num_trained=MILLION, num_steps=100)
    assert need.checkpoint_bytes == expected * MILLION


def test_room_is_compared(tmp_path):
    run, need = RunDirectory(tmp_path), DiskNeed(4 * MILLION, 12 * MILLION, 3)
    assert check_disk(run, need, free_bytes=60 * MILLION) is None
    note = check_disk(run, need, free_bytes=60 * MILLION - 1)
    assert note is not None
    assert (
        "has 60 MB free, and this run writes up to 40 MB there (3 checkpoints of 12 MB and the result of 4 MB)"
        in note
    )
    check_disk(run, need, free_bytes=12 * MILLION)
    with pytest.raises(
        UserError, match="has 12 MB free, and one checkpoint of this run takes 12 MB: make room"
    ):
        check_disk(run, need, free_bytes=12 * MILLION - 1)


def test_checkpoints_that_stand_need_no_more_room(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        files = {"model.safetensors": {"size": 1, "sha256": "0" * 64}}
        manifest = json.dumps({"step": step, "files": files})
        (tmp_path / f"checkpoint-{step}" / MANIFEST_NAME).write_text(manifest)
    need = DiskNeed(4 * MILLION, 12 * MILLION, 3)
    assert check_disk(RunDirectory(tmp_path), need, free_bytes=6 * MILLION) is None
    with pytest.raises(UserError, match="the result of this run takes 4 MB"):
        check_disk(RunDirectory(tmp_path), need, free_bytes=3 * MILLION)


def test_a_limit_of_file_sizes_is_seen(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * MILLION, hard))
    try:
        with pytest.raises(UserError, match=r"may have 10 MB, and the run writes some of 12 MB .*ulimit -f"):
            check_disk(RunDirectory(tmp_path), DiskNeed(4 * MILLION, 12 * MILLION, 3), free_bytes=10**12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_takes_no_file_is_refused(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(
            UserError, match=r"output_dir \S+ cannot be written \(File too large: raise the limit"
        ):
            try_writing(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []
    try_writing(tmp_path)
    assert os.listdir(tmp_path) == []
