"""The command: files, faults, what a broken run leaves."""

from __future__ import annotations

import json
import os
import resource
import shutil

import pytest

from finetune.errors import UserError
from finetune.serving.decoding.decoder import StaticDecoder
from finetune.serving.decoding.exported import ExportedFacts, read_facts
from finetune.serving.export import run as export_run
from finetune.serving.export.options import ExportOptions, parse_options
from tests.conftest import launch
from tests.serving.export.builders import export_folder


def test_the_command_writes_a_folder_that_stands_alone(sharp_llama, tmp_path):
    output = tmp_path / "exported"
    command = (
        "export_model.py",
        "--model_name_or_path",
        sharp_llama,
        "--output_path",
        output,
        "--device",
        "cpu",
    )
    result = launch(*command)
    assert result.returncode == 0, result.stderr
    assert "llama as a static graph, float32, texts of up to 256 tokens" in result.stdout
    for name in ("model.json", "model.pdiparams", "static_decoder.json"):
        assert (output / name).stat().st_size > 0
    for path in sharp_llama.iterdir():
        if path.name != "model.safetensors":
            assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported"]

    again = launch(*command)
    assert again.returncode == 2
    assert again.stderr == (
        f"error: output_path {output} is not empty: give a folder that does not exist yet, or empty this one\n"
    )


def test_faults_of_the_options_are_all_told(tmp_path):
    (tmp_path / "file").touch()
    options = ExportOptions(
        model_name_or_path="x",
        output_path=tmp_path / "file",
        dtype="bfloat16",
        lora_path=tmp_path / "a",
        prefix_path=tmp_path / "b",
    )
    with pytest.raises(UserError) as error:
        options.check()
    for part in ("both given", "lora_path", "prefix_path", "is a file", "dtype is bfloat16, which"):
        assert any(part in fault for fault in error.value.faults)


def test_a_wrong_type_ends_with_2(capsys):
    with pytest.raises(SystemExit) as end:
        parse_options(["--model_name_or_path", "x", "--output_path", "y", "--dtype", "int4"])
    assert end.value.code == 2 and "invalid choice: 'int4'" in capsys.readouterr().err


def test_a_broken_export_leaves_nothing(sharp_llama, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_run, "_save_graph", fail)
    with pytest.raises(
        UserError, match=r"cannot be written .No space left on device.: make room on that disk"
    ):
        export_folder(sharp_llama, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", [0.1, 0.5, 0.999])
def test_a_file_of_weights_that_is_cut_short_is_refused(exported_llama, tmp_path, part):
    """Paddle would run it with whatever it reads."""
    folder = tmp_path / "copy"
    shutil.copytree(exported_llama, folder)
    path = folder / "model.pdiparams"
    os.truncate(path, int(path.stat().st_size * part))
    with pytest.raises(
        UserError, match=r"model\.pdiparams is cut short or damaged: it ends within tensor \d+ of \d+"
    ):
        StaticDecoder(folder)


def test_weights_of_another_graph_are_refused(exported_llama, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported_llama, folder)
    (folder / "model.pdiparams").write_bytes(2 * (folder / "model.pdiparams").read_bytes())
    with pytest.raises(
        UserError, match=r"model\.pdiparams holds \d+ tensors, but the graph beside it has \d+"
    ):
        StaticDecoder(folder)


def test_an_export_that_paddle_cuts_short_in_silence_fails(sharp_llama, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"has not written the whole model .* \(ulimit -f\)"):
            export_folder(sharp_llama, tmp_path / "exported")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_the_graph_is_refused(exported_llama, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported_llama, folder)
    (folder / "model.pdiparams").unlink()
    with pytest.raises(UserError, match=r"is no exported model: it has no model.pdiparams; export the model"):
        StaticDecoder(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no valid JSON .*export_model.py again"),
        ("[]", "holds no JSON object but a list"),
        ('{"format": 99}', "has format 99, this version runs 1"),
    ],
)
def test_facts_of_another_kind_are_refused(exported_llama, tmp_path, content, message):
    folder = tmp_path / "copy"
    shutil.copytree(exported_llama, folder)
    (folder / "static_decoder.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_facts(folder)


def test_half_precision_does_not_run_on_cpu(exported_llama, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(exported_llama, folder)
    facts = json.loads((folder / "static_decoder.json").read_text())
    ExportedFacts(**facts | {"dtype": "bfloat16"}).save(folder)
    with pytest.raises(UserError, match="exported as bfloat16, which Paddle cannot multiply on CPU"):
        StaticDecoder(folder)
