"""Merging the files of ranks: identity for every family, refusals, interruption."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.merge.tensor_parallel import MergeOptions, main, merge, parse_options
from finetune.storage.output_folder import RECORD_NAME
from tests.conftest import ROOT
from tests.merge.rank_writing import (
    NAMES,
    check_same,
    part_of,
    read_whole,
    run_command,
    tiny_model,
    write_ranks,
)

LAYOUTS = ((2, 1), (4, 1), (1, 2), (2, 2))


def test_old_result_survives_a_crash_between_the_renames(llama_ranks, tmp_path, monkeypatch):
    source, output, renamed = llama_ranks[0], tmp_path / "out", []
    weights = (_merge(source, output) / "model.safetensors").read_bytes()
    rename = os.rename

    def rename_once(old, new):
        if renamed:
            raise SystemError("killed")
        renamed.append(old)
        rename(old, new)

    monkeypatch.setattr(os, "rename", rename_once)
    with pytest.raises(SystemError):
        _merge(source, output, overwrite=True)
    monkeypatch.undo()
    assert not output.exists() and (tmp_path / ".out.replaced").is_dir()
    with pytest.raises(UserError, match="holds what was merged from"):
        _merge(source, output)
    assert (output / "model.safetensors").read_bytes() == weights
    _merge(source, output, overwrite=True)
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model-00001-of-00002.safetensors"], r"model-00001-of-00002.safetensors is here, model-00002-of-00002.safetensors and model.safetensors.index.json are not. Copy"),
        (["peft_model-00001-of-00001.safetensors"], r"peft_model-00001-of-00001.safetensors is here, peft_model.safetensors.index.json is not"),
        (["pytorch_model-00001-of-00009.bin", "pytorch_model-00003-of-00009.bin"], r"bin and pytorch_model-00003-of-00009.bin are here, .*, 3 more and pytorch_model.bin.index.json are not"),
    ],
)  # fmt: skip
def test_numbered_files_without_their_index_are_named(names, message, tmp_path):
    (tmp_path / "run").mkdir()
    for name in names:
        (tmp_path / "run" / name).write_bytes(b"")
    with pytest.raises(UserError, match=message):
        _merge(tmp_path / "run", tmp_path / "out")


def _merge(source: Path, output: Path, **options) -> Path:
    merge(MergeOptions(source, output, **options))
    return output


@pytest.fixture
def llama_ranks(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """A llama in two tensor-parallel and two pipeline parts, and its whole weights."""
    model = tiny_model("llama")
    return write_ranks(tmp_path / "run", model, get_family("llama"), tensor=2, pipeline=2), model[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_split_then_merge_is_identity(name, dtype, tmp_path):
    model = tiny_model(name, dtype)
    for tensor, pipeline in LAYOUTS:
        folder = tmp_path / f"{tensor}x{pipeline}"
        write_ranks(folder, model, get_family(name), tensor=tensor, pipeline=pipeline)
        merged = _merge(folder, folder.with_suffix(".merged"))
        check_same(read_whole(merged), model[1])


@pytest.mark.parametrize("name", ["llama", "qwen", "chatglm2"])
def test_something_was_divided(name, tmp_path):
    """Guards the test above: without parts of other shapes, it would show nothing."""
    config, weights = tiny_model(name)
    family = get_family(name)
    divided = [
        key
        for key, value in weights.items()
        if part_of(family, config, key, value, degree=2, rank=1).shape != value.shape
    ]
    assert len(divided) >= len(weights) / 3


def test_small_shards_have_an_index(llama_ranks, tmp_path):
    source, weights = llama_ranks
    merged = _merge(source, tmp_path / "out", max_shard_bytes=40_000)
    index = json.loads((merged / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"].keys() == weights.keys()
    files = sorted(path.name for path in merged.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in weights.values())
    check_same(read_whole(merged), weights)


def test_configuration_is_that_of_a_whole_model(llama_ranks, tmp_path):
    source, _ = llama_ranks
    for name in ("generation_config.json", "tokenizer.model", "chat_template.jinja"):
        (source / name).write_bytes(b"{}\r\n")
    (source / "optimizer.tp00.pdopt").write_bytes(b"not wanted")
    merged = _merge(source, tmp_path / "out")
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    assert config["tensor_parallel_degree"] == 1
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (merged / "tokenizer.model").read_bytes() == b"{}\r\n"
    assert sorted(path.name for path in merged.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", RECORD_NAME, "model.safetensors",
        "tokenizer.model",
    ]  # fmt: skip


def test_files_of_paddle_save(tmp_path):
    """What `paddle.save` itself writes, with names of parameters beside the arrays."""
    paddle = pytest.importorskip("paddle")
    config, weights = tiny_model("llama", "bfloat16")
    family = get_family("llama")
    write_ranks(tmp_path / "run", (config, weights), family, tensor=2)
    for rank in range(2):
        state = {
            key: paddle.to_tensor(np.ascontiguousarray(part_of(family, config, key, value, degree=2, rank=rank))).view("bfloat16")
            for key, value in weights.items()
        }  # fmt: skip
        paddle.save(state, str(tmp_path / "run" / f"model_state.tp{rank:02d}.pdparams"))
    check_same(read_whole(_merge(tmp_path / "run", tmp_path / "out")), weights)


def test_numbered_files_of_a_rank(tmp_path):
    """PaddleNLP numbers the files of a rank that are larger than its limit."""
    model = tiny_model("llama")
    source = write_ranks(tmp_path / "run", model, get_family("llama"), tensor=2)
    for rank in range(2):
        path = source / f"model_state.tp{rank:02d}.pdparams"
        content = list(pickle.loads(path.read_bytes()).items())
        path.unlink()
        for number, part in enumerate((content[:5], content[5:]), start=1):
            name = f"model_state.tp{rank:02d}-{number:05d}-of-00002.pdparams"
            (source / name).write_bytes(pickle.dumps(dict(part), protocol=4))
    check_same(read_whole(_merge(source, tmp_path / "out")), model[1])
    (source / "model_state.tp01-00002-of-00002.pdparams").unlink()
    with pytest.raises(UserError, match=r"model_state.tp01-00001-of-00002.pdparams, but the numbers"):
        _merge(source, tmp_path / "out2")


def _lora_weights(config) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    hidden = config["hidden_size"]
    sizes = {"self_attn.q_proj": (hidden, hidden), "mlp.down_proj": (config["intermediate_size"], hidden)}
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (inner, outer) in sizes.items():
            name = f"llama.layers.{layer}.{module}"
            weights[f"{name}.lora_A"] = generator.standard_normal((inner, 4)).astype(np.float32)
            weights[f"{name}.lora_B"] = generator.standard_normal((4, outer)).astype(np.float32)
    return weights


def test_lora_shards(tmp_path):
    config, _ = tiny_model("llama")
    model = config, _lora_weights(config)
    source = write_ranks(
        tmp_path / "run", model, get_family("llama"), tensor=2, pipeline=2, stem="lora_model_state"
    )
    (source / "lora_config.json").write_text('{"r": 4, "tensor_parallel_degree": 2}', encoding="utf-8")
    merged = _merge(source, tmp_path / "out")
    check_same(read_whole(merged), model[1])
    index = json.loads((merged / "peft_model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["type"] == "lora"
    assert set(index["weight_map"].values()) == {"peft_model-00001-of-00001.safetensors"}
    assert json.loads((merged / "lora_config.json").read_text(encoding="utf-8")) == {
        "r": 4, "tensor_parallel_degree": -1,
    }  # fmt: skip
    # The result is a checkpoint like any other: merged again, it stays what it is.
    check_same(read_whole(_merge(merged, tmp_path / "again")), model[1])


def test_prefix_shards(tmp_path):
    generator = np.random.default_rng(2)
    shapes = {
        "0.weight": (8, 16),
        "1.weight": (16, 32),
        "1.bias": (32,),
        "3.weight": (32, 64),
        "3.bias": (64,),
    }
    whole = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    axes = {"0.weight": 0, "1.weight": 1, "1.bias": 0, "3.weight": 0}
    source = tmp_path / "run"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(tiny_model("llama")[0]), encoding="utf-8")
    for rank in range(2):
        state = {
            name: np.split(array, 2, axis=axes[name])[rank] if name in axes else array
            for name, array in whole.items()
        }
        (source / f"prefix_model_state.tp{rank:02d}.pdparams").write_bytes(pickle.dumps(state, protocol=4))
    merged = _merge(source, tmp_path / "out")
    check_same(read_whole(merged), whole)
    index = json.loads((merged / "peft_model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["type"] == "ptuning"


def test_tied_weight_of_two_stages(tmp_path, llama_ranks):
    source, weights = llama_ranks
    name = next(key for key in weights if "embed_tokens" in key)
    for rank in range(2):
        first, last = (source / f"model_state.tp{rank:02d}_pp{stage:02d}.pdparams" for stage in (0, 1))
        content = pickle.loads(last.read_bytes())
        content[name] = pickle.loads(first.read_bytes())[name]
        last.write_bytes(pickle.dumps(content, protocol=4))
    check_same(read_whole(_merge(source, tmp_path / "out")), weights)
    content[name] = (name, content[name][1] + 1)
    last.write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(UserError, match=r"tp01_pp01.pdparams: llama.embed_tokens.weight.*differs"):
        _merge(source, tmp_path / "out2")


def _alter(path: Path, change) -> None:
    content = pickle.loads(path.read_bytes())
    change(content)
    path.write_bytes(pickle.dumps(content, protocol=4))


def _set(name: str, change):
    def alter(content):
        content[name] = (name, change(content[name][1]))

    return alter


NORM = "llama.layers.0.input_layernorm.weight"
QUERY = "llama.layers.0.self_attn.q_proj.weight"
LATER = "model_state.tp01_pp00.pdparams"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / LATER).unlink(), "lacks model_state.tp01_pp00.pdparams: .*2 pipeline stages"),
        (lambda folder: [(folder / f"model_state.tp01_pp{p:02d}.pdparams").unlink() for p in (0, 1)],
         "files of 1 tensor-parallel ranks, but config.json tells of 2"),
        (lambda folder: [(folder / f"model_state.tp{t:02d}_pp01.pdparams").unlink() for t in (0, 1)],
         "lacks layers 2, 3 of 4"),
        (lambda folder: (folder / "model_state.tp00.pdparams").write_bytes(b""), "runs with different layouts"),
        (lambda folder: (folder / "model_state.shard00.pdparams").write_bytes(b""), "is named after shard00"),
        (lambda folder: (folder / "model_state.pdparams").write_bytes(b""), "not clear which"),
        (lambda folder: os.truncate(folder / LATER, 20_000), f"{LATER} is damaged"),
        (lambda folder: _alter(folder / LATER, _set(NORM, lambda a: a + 1)),
         f"{LATER}: {NORM}, which every rank holds whole, differs .*model_state.tp00_pp00.*--differing_replicas"),
        (lambda folder: _alter(folder / LATER, _set(QUERY, lambda a: a[:, :8])), rf"{LATER}: {QUERY} has shape \[64, 8\]"),
        (lambda folder: _alter(folder / LATER, _set(QUERY, lambda a: a.astype(np.float16))), r"\(float16\)"),
        (lambda folder: _alter(folder / LATER, lambda c: c.pop(NORM)), f"hold different tensors .{NORM}"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together(damage, message, llama_ranks, tmp_path):
    source, _ = llama_ranks
    damage(source)
    with pytest.raises(UserError, match=message):
        _merge(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_differing_replicas_may_be_accepted(llama_ranks, tmp_path):
    source, weights = llama_ranks
    _alter(source / LATER, _set(NORM, lambda a: a + 1))
    main(
        [
            "--model_name_or_path",
            str(source),
            "--output_dir",
            str(tmp_path / "out"),
            "--differing_replicas",
            "first",
        ]
    )
    check_same(read_whole(tmp_path / "out"), weights)


def test_manifest_is_checked(llama_ranks, tmp_path):
    source, weights = llama_ranks
    files = {path.name: {"size": path.stat().st_size, "sha256": "0" * 64} for path in source.iterdir()}
    (source / "manifest.json").write_text(json.dumps({"step": 3, "files": files}), encoding="utf-8")
    check_same(read_whole(_merge(source, tmp_path / "out")), weights)
    with pytest.raises(UserError, match="was altered after it was written"):
        _merge(source, tmp_path / "out2", verify=True)
    files[LATER]["size"] += 1
    (source / "manifest.json").write_text(json.dumps({"step": 3, "files": files}), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{LATER} has \d+ bytes, but manifest.json tells of"):
        _merge(source, tmp_path / "out2")


def test_whole_checkpoint_is_copied(tmp_path, tiny_llama):
    merged = _merge(tiny_llama, tmp_path / "out")
    check_same(read_whole(merged), read_whole(tiny_llama))
    assert (merged / "config.json").read_bytes() == (tiny_llama / "config.json").read_bytes()


def test_folder_of_a_run_names_its_newest_checkpoint(tmp_path):
    for step in (5, 10):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds no weights.*newest checkpoint is .*checkpoint-10$"):
        _merge(tmp_path / "run", tmp_path / "out")


def test_existing_output(llama_ranks, tmp_path):
    source, weights = llama_ranks
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="not empty and not the result of a merge"):
        _merge(source, out, overwrite=True)
    (out / "mine.txt").unlink()
    _merge(source, out)
    with pytest.raises(UserError, match="add --overwrite true"):
        _merge(source, out)
    _merge(source, out, overwrite=True)
    check_same(read_whole(out), weights)
    with pytest.raises(UserError, match="is the checkpoint itself"):
        _merge(source, source)


def test_options():
    options = parse_options(
        ["--model_name_or_path", "a/run/", "--max_shard_size", "1.5GiB", "--overwrite", "true"]
    )
    assert options.max_shard_bytes == 3 * 2**29
    assert options.overwrite
    assert options.output == Path("a/run-merged").absolute()
    assert not parse_options(["--model_name_or_path", "a", "--overwrite", "False"]).overwrite


def test_command_needs_no_framework(llama_ranks, tmp_path):
    """Neither Paddle nor anything else that takes seconds to load."""
    source, weights = llama_ranks
    program = (
        "import sys; from finetune.merge.tensor_parallel import main; main(sys.argv[1:]); "
        "print([m for m in ('paddle', 'paddlenlp', 'torch', 'transformers', 'safetensors') if m in sys.modules])"
    )
    words = [sys.executable, "-c", program, "--model_name_or_path", source, "--output_dir", tmp_path / "out"]
    run = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"
    assert "tensor-parallel degree 2, pipeline degree 2" in run.stdout
    check_same(read_whole(tmp_path / "out"), weights)


def test_wrong_folder_is_exit_code_2(llama_ranks, tmp_path):
    source, _ = llama_ranks
    (source / LATER).unlink()
    run = run_command("--model_name_or_path", source, "--output_dir", tmp_path / "out")
    assert run.returncode == 2
    assert run.stderr.startswith("error: ") and LATER in run.stderr
    assert run_command("--model_name_or_path", source, "--max_shard_size", "5XB").returncode == 2
