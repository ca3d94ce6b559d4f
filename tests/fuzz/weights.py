"""What programs write: model folders, adapters, checkpoints, pickles."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from finetune.errors import UserError
from finetune.storage.checkpoints import Checkpoint, read_file
from tests.fuzz.commands import (
    arguments,
    finetune,
    prepare_model,
    prepare_run,
    stop_at,
)
from tests.fuzz.folders import copy_damaged, draw_damages
from tests.fuzz.mutations import (
    BYTE_CHANGES,
    change_bytes,
    dump_json,
)
from tests.fuzz.runner import WrongWeights


def prepare_models(folder: Path) -> None:
    prepare_run(folder)
    prepare_model(folder, "qwen2")
    _write_shards(folder / "llama", folder / "llama_sharded")
    _write_pickles(folder / "llama", folder / "llama_pickled")


def _write_shards(source: Path, folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {f"model-{i + 1:05}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, held in shards.items():
        save_file({name: weights[name] for name in held}, folder / shard, metadata={"format": "np"})
    mapped = {name: shard for shard, held in shards.items() for name in held}
    index = {"metadata": {"total_size": sum(each.nbytes for each in weights.values())}, "weight_map": mapped}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_pickles(source: Path, folder: Path) -> None:
    from safetensors.numpy import load_file

    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model_state.pdparams").write_bytes(pickle.dumps(dict(weights), protocol=4))


MODELS = ("llama", "llama", "qwen2", "llama_sharded", "llama_pickled")


def draw_model_folder(good: Path) -> st.SearchStrategy[Any]:
    def draw(name: str) -> st.SearchStrategy[Any]:
        files = sorted(path.name for path in (good / name).iterdir())
        weights = [file for file in files if "model" in file and "tokenizer" not in file]
        settings = st.sampled_from([{"preview": 1}, {}, {}])
        return st.tuples(
            st.just(name), draw_damages([*files, "config.json", "config.json", *weights, *weights]), settings
        )

    return st.sampled_from(MODELS).flatmap(draw)


def run_model_folder(good: Path, case: Any, place: Path) -> None:
    name, damages, settings = case
    folder = copy_damaged(good / name, place / "model", damages)
    check_values(folder)
    (place / "arguments.json").write_bytes(
        dump_json(arguments(good, model_name_or_path=str(folder), **settings))
    )
    with stop_at("finetune.run.adapter", "adapt"):
        finetune(["arguments.json"])


def check_values(folder: Path) -> None:
    """Compares what our reader gives for safetensors files with the format's own library.

    Raises:
        WrongWeights: The library refuses what we read, or reads something else.
    """
    import safetensors

    for path in sorted(folder.glob("*.safetensors")):
        try:
            found = {name: array for name, array in read_file(path).arrays.items()}
        except UserError:
            continue
        try:
            expected = dict(safetensors.deserialize(path.read_bytes()))
        except Exception as error:
            raise WrongWeights(
                f"WrongWeights: {path.name} is read, but safetensors refuses it: {error}"
            ) from None
        if found.keys() != expected.keys():
            raise WrongWeights(f"WrongWeights: {path.name} holds {sorted(expected)}, read {sorted(found)}")
        for name, array in found.items():
            same = list(array.shape) == list(expected[name]["shape"])
            if not same or np.asarray(array.read()).tobytes() != bytes(expected[name]["data"]):
                raise WrongWeights(f"WrongWeights: {path.name} holds other values of {name}")
    try:
        Checkpoint(folder)
    except UserError:
        return


# Adapters


def prepare_adapters(folder: Path) -> None:
    """Adapters in the form of this project and of peft, by a run and a merge of this project."""
    from finetune.merge.lora import main as merge

    prepare_run(folder)
    settings = arguments(
        folder,
        output_dir=str(folder / "paddle"),
        lora=True,
        lora_rank=2,
        save_strategy="no",
        disable_tqdm=True,
    )
    (folder / "arguments.json").write_bytes(dump_json(settings))
    finetune([str(folder / "arguments.json")])
    base = ["--model_name_or_path", str(folder / "llama")]
    merge(
        [
            *base,
            "--lora_path",
            str(folder / "paddle"),
            "--merge_model_path",
            str(folder / "peft"),
            "--save_format",
            "peft",
        ]
    )


def draw_adapter_folder(good: Path) -> st.SearchStrategy[Any]:
    def draw(name: str) -> st.SearchStrategy[Any]:
        files = [
            path.name
            for path in (good / name).iterdir()
            if "adapter" in path.name or "peft_model" in path.name
        ]
        files += [path.name for path in (good / name).glob("lora_config.json")]
        return st.tuples(st.just(name), draw_damages(sorted(files)), st.booleans())

    return st.sampled_from(["paddle", "peft"]).flatmap(draw)


def run_adapter_folder(good: Path, case: Any, place: Path) -> None:
    from finetune.merge.lora import main as merge

    name, damages, is_trained = case
    folder = copy_damaged(good / name, place / "adapter", damages)
    check_values(folder)
    if is_trained:
        settings = arguments(good, lora=True, lora_path=str(folder), save_strategy="no", disable_tqdm=True)
        (place / "arguments.json").write_bytes(dump_json(settings))
        with stop_at("finetune.training.trainer", "FinetuneTrainer._loop"):
            finetune([str(place / "arguments.json")])
    merge(
        [
            "--model_name_or_path",
            str(good / "llama"),
            "--lora_path",
            str(folder),
            "--merge_model_path",
            str(place / "out"),
        ]
    )


# Checkpoints


def prepare_checkpoints(folder: Path) -> None:
    prepare_run(folder)
    settings = arguments(folder, output_dir=str(folder / "run"), save_steps=1, disable_tqdm=True)
    (folder / "arguments.json").write_bytes(dump_json(settings))
    finetune([str(folder / "arguments.json")])


def draw_checkpoint(good: Path) -> st.SearchStrategy[Any]:
    run = good / "run"
    files = sorted(str(path.relative_to(run)) for path in run.rglob("checkpoint-2/*") if path.is_file())
    own = ["arguments.json", "trainer_state.json", "all_results.json", "train_log.jsonl"]
    others = [name for name in own if (run / name).is_file()]
    return st.tuples(draw_damages([*files, *files, *others], max_size=2), st.booleans())


def run_checkpoint(good: Path, case: Any, place: Path) -> None:
    from finetune.checkpoints.folder import MANIFEST_NAME, _facts, _file_names

    damages, is_signed = case
    folder = copy_damaged(good / "run", place / "out", damages)
    manifest, checkpoint = folder / "checkpoint-2" / MANIFEST_NAME, folder / "checkpoint-2"
    if is_signed and manifest.is_file() and all(not name.endswith(MANIFEST_NAME) for name, *_ in damages):
        content = json.loads(manifest.read_bytes())
        names = [
            name
            for name in _file_names(checkpoint)
            if (checkpoint / name).is_file() and name != MANIFEST_NAME
        ]
        manifest.unlink()
        manifest.write_text(
            json.dumps(content | {"files": {name: _facts(checkpoint / name) for name in names}})
        )
    settings = arguments(good, output_dir=str(folder), save_steps=1, disable_tqdm=True, max_steps=3)
    (place / "arguments.json").write_bytes(dump_json(settings))
    with stop_at("finetune.training.trainer", "FinetuneTrainer._loop"):
        finetune([str(place / "arguments.json")])


# Pickles


def prepare_pickles(folder: Path) -> None:
    from tests.storage.hostile_files import holding, save_archive, tensor, write_all

    arrays = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.ones(3, np.float16),
        "c": {"d": np.zeros(2)},
    }
    for protocol in (2, 3, 4):
        (folder / f"good{protocol}.pdparams").write_bytes(pickle.dumps(arrays, protocol=protocol))
    save_archive(folder / "good.bin", holding(tensor()))
    for path in list(write_all(folder)):
        if path.stat().st_size > 10_000_000:
            path.unlink()  # too long to be changed; tests/storage reads them as they are


def draw_pickle(good: Path) -> st.SearchStrategy[Any]:
    names = sorted(path.name for path in good.iterdir())
    kinds = [*names, *["good2.pdparams", "good3.pdparams", "good4.pdparams", "good.bin"] * (len(names) // 4)]
    return st.tuples(st.sampled_from(kinds), st.one_of(st.none(), BYTE_CHANGES, BYTE_CHANGES))


def run_pickle(good: Path, case: Any, place: Path) -> None:
    name, changes = case
    content = (good / name).read_bytes()
    path = place / name
    path.write_bytes(change_bytes(content, changes) if changes else content)
    for array in read_file(path).arrays.values():
        np.asarray(array.read()).tobytes()
