"""Which model answers are compared with: the start of the run, the base without its adapter, or another folder."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest

from finetune.models.tiny.checkpoint import build_tiny
from finetune.run.reference import REFERENCE_FILE
from tests.conftest import ROOT, losses, read_log, run_entry, write_arguments

PAIRS = ROOT / "tests" / "reference" / "data" / "pairs"
COMMON = {
    "device": "cpu", "do_train": True, "max_steps": 3, "save_steps": 1, "save_strategy": "steps", "logging_steps": 1,
    "per_device_train_batch_size": 4, "learning_rate": 5e-3, "src_length": 96, "max_length": 200, "data_cache": False,
    "disable_tqdm": True, "dataset_name_or_path": str(PAIRS), "loss_type": "sigmoid", "lora": True, "lora_rank": 4,
}  # fmt: skip

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 600, "max_length": 256}


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny_llama):
    """Runs with a name and settings; each once."""
    folder, done = tmp_path_factory.mktemp("references"), {}

    def run(name: str, **settings) -> Path:
        if name not in done:
            places = {"model_name_or_path": str(tiny_llama), "output_dir": str(folder / name)}
            done[name] = write_arguments(folder / f"{name}.json", **COMMON | places | settings)
            assert run_entry(done[name]) == 0
        return folder / name

    run.again = lambda name, *words: run_entry(done[name], *words)
    return run


def table(out: Path) -> np.ndarray:
    with np.load(out / REFERENCE_FILE, allow_pickle=False) as file:
        (found,) = (file[name] for name in file.files)
    return found


def test_an_adapter_is_continued_against_its_start_or_against_the_base(start, capfd):
    adapter = start("first")
    capfd.readouterr()
    begun = start("begun", lora_path=str(adapter))
    told = capfd.readouterr().err
    assert f"Reference: the model as the run finds it, with the adapter of {adapter}" in told
    assert abs(read_log(begun)[0]["rewards_margin"]) < 1e-5

    base = start("base", lora_path=str(adapter), reference_model="base")
    assert "Reference: the model without its adapter" in capfd.readouterr().err
    assert abs(read_log(base)[0]["rewards_margin"]) > 1e-3
    # A new adapter begins without effect: the first run was compared with the base too.
    assert np.array_equal(table(base), table(adapter)) and not np.allclose(
        table(begun), table(base), atol=1e-3
    )


def test_another_model_is_asked_and_released(start, tmp_path_factory, monkeypatch, capfd):
    from finetune.run import model as models

    other = tmp_path_factory.mktemp("other") / "model"
    build_tiny("llama", other, **SHAPE, seed=77)
    in_memory, load = [], models.load_base_model

    def count_and_load(*arguments):
        gc.collect()
        in_memory.append(sum(type(each).__name__ == "LlamaForCausalLM" for each in gc.get_objects()))
        return load(*arguments)

    monkeypatch.setattr(models, "load_base_model", count_and_load)
    out = start("other", reference_model=str(other))
    assert in_memory[-2:] == [in_memory[-2]] * 2, "the reference is gone when the model of the run is loaded"
    assert f"Reference: {other}, asked before training and released" in capfd.readouterr().err
    own = start("own", model_name_or_path=str(other))
    assert np.array_equal(table(out), table(own))
    assert abs(read_log(out)[0]["rewards_margin"]) > 1e-4

    expected = losses(out)
    for entry in out.iterdir():  # and continued, it is not loaded again
        if entry.name not in ("checkpoint-1", "train_log.jsonl", "arguments.json", REFERENCE_FILE):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    before = len(in_memory)
    assert start.again("other") == 0
    assert losses(out) == expected and len(in_memory) == before + 1


@pytest.mark.parametrize("damage", ["half", "changed", "empty"])
def test_a_damaged_file_is_made_anew(start, damage):
    out = start("first")
    expected, file = losses(out), out / REFERENCE_FILE
    content = file.read_bytes()
    for entry in out.iterdir():
        if entry.name not in ("checkpoint-1", "train_log.jsonl", "arguments.json"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    changed = bytearray(content)
    changed[len(content) // 2] ^= 0xFF
    file.write_bytes({"half": content[: len(content) // 2], "changed": bytes(changed), "empty": b""}[damage])
    assert start.again("first") == 0
    assert losses(out) == expected and file.read_bytes() == content


def test_what_is_no_reference_is_refused(tmp_path, tiny_llama, capfd):
    small, foreign = tmp_path / "small", tmp_path / "foreign"
    build_tiny("llama", small, **SHAPE | {"vocab_size": 560})
    build_tiny("qwen2", foreign, **SHAPE)
    places = {"model_name_or_path": str(tiny_llama), "output_dir": str(tmp_path / "out")}
    cases = [
        ({"reference_model": str(tmp_path / "none")}, "reference_model is"),
        ({"reference_model": str(foreign)}, "has another tokenizer than"),
        ({"reference_model": str(small)}, "give a reference that knows all tokens of"),
        ({"reference_model": "base", "loss_type": "orpo"}, "but loss_type orpo knows none"),
        ({"reference_model": "base", "reference_free": True}, "but reference_free is true"),
    ]
    for settings, words in cases:
        file = write_arguments(tmp_path / "a.json", **COMMON | places | settings)
        assert run_entry(file) == 2
        assert words in capfd.readouterr().err
