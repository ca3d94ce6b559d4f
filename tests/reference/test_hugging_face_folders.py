"""Folders in Hugging Face's form after a training: what others read from them, those of families, too, that transformers
has no class of.

Models are trained a little, merged by the scripts' own code, and asked for their likeliest tokens by `predict`'s decoder
and by the reader of the family (`tests.reference.readers`).
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.families.family import families, get_family
from finetune.families.tiny_recipe import TinyShape
from finetune.merge.hf_out import hugging_face_config
from finetune.merge.lora import main as merge_adapter
from finetune.merge.tensor_parallel import main as merge_files
from tests.conftest import run_entry, write_arguments
from tests.families.cases import FACTS
from tests.merge.rank_writing import check_same, read_whole, write_ranks
from tests.reference.chatglm2_qwen_published import PUBLISHED, published_name
from tests.reference.curves import COMMON, HERE
from tests.reference.exchange import load_theirs
from tests.reference.readers import (
    READERS,
    VARIANTS,
    borrowed_tokens,
    llama_shapes,
    load_borrowed,
    reference_tokens,
)
from tests.serving.export.builders import build_sharp

HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
REQUIRED = os.environ.get("FINETUNE_REQUIRE_PARITY") == "1"
NUM_TOKENS = 8
PROMPTS = ("今天天气很好，我们去公园。", "Answer", "问题：水在什么时候结冰？ 答案：", "a")


BY_NUMPY = [name for name, variant in VARIANTS.items() if READERS[variant.family].logits]
BORROWED = [name for name, variant in VARIANTS.items() if READERS[variant.family].borrowed]
OWN = [name for name, reader in READERS.items() if reader.is_own]
LIVE = [
    *((name, method) for name in BORROWED for method in ("sft", "lora")),
    *((name, "sft") for name in OWN),  # merges of their adapters: test_exchange.py
]


def test_every_family_has_a_reader():
    assert set(READERS) == set(families())
    assert {*BY_NUMPY, *BORROWED, *OWN} == set(VARIANTS)
    for name, reader in READERS.items():
        assert reader.is_own != bool(reader.borrowed or reader.logits), name


def build(name: str, folder: Path) -> Path:
    """A small model whose layers matter, in PaddleNLP's form."""
    variant = VARIANTS[name]
    build_sharp(variant.family, folder, seed=variant.seed)
    edit(folder / "config.json", **variant.fields)
    if variant.left_out:
        path = folder / "model.safetensors"
        kept = {key: value for key, value in load_file(path).items() if not key.endswith(variant.left_out)}
        save_file(kept, path, metadata={"format": "np"})
    return folder


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def train(base: Path, out: Path, **settings: Any) -> Path:
    """Three steps through the entry script."""
    arguments = COMMON | {
        "max_steps": 3,
        "warmup_steps": 0,
        "learning_rate": 2e-3,
        "model_name_or_path": str(base),
        "dataset_name_or_path": str(HERE / "data"),
        "output_dir": str(out),
        **settings,
    }
    assert run_entry(write_arguments(out.with_suffix(".json"), **arguments)) == 0
    return out


def our_tokens(folder: Path) -> tuple[list[list[int]], list[list[int]], int]:
    """Prompts as ids, and what `predict` answers to them: together, then two alone; and the padding."""
    from finetune.serving.decoding.options import ModelOptions
    from finetune.serving.decoding.settings import DecodingSettings
    from finetune.serving.predict.loading import load_responder, plan_model

    responder = load_responder(plan_model(ModelOptions(model_name_or_path=str(folder))))
    encoder, settings = responder.encoder, DecodingSettings(max_new_tokens=NUM_TOKENS, stop_ids=())
    rows = [[*encoder.prefix_ids, *encoder.encode(prompt), *encoder.answer_prefix_ids] for prompt in PROMPTS]
    together = responder.decoder.generate(rows, settings)
    assert [responder.decoder.generate([row], settings)[0] for row in rows[:2]] == together[:2]
    lengths = [len(row) for row in rows]
    assert len(set(lengths)) == len(rows) and {length % 2 for length in lengths} == {0, 1}
    assert len({token for answer in together for token in answer}) > NUM_TOKENS // 2, "worth comparing"
    return rows, together, encoder.pad_token_id


# What configurations of any model say, and what the families' own leave unsaid and their code does not read.
OTHER_FIELDS = {
    *(
        "architectures",
        "model_type",
        "_name_or_path",
        "torch_dtype",
        "use_cache",
        "initializer_range",
        "hidden_act",
    ),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "tie_word_embeddings",
        "max_position_embeddings",
        "rope_scaling",
    ),
    *(
        "rope_theta",
        "num_key_value_heads",
        "seq_length",
        "normed_head",
        "attn_dropout_prob",
        "emb_dropout_prob",
    ),
    *(
        "scale_attn_weights",
        "attention_dropout",
        "hidden_dropout",
        "attention_softmax_in_fp32",
        "post_layer_norm",
    ),
    *("apply_query_key_layer_scaling", "apply_residual_connection_post_layernorm", "bias_dropout_fusion"),
    "fp32_residual_connection",
}


SMALLEST = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_length"), 8) | dict.fromkeys(
    ("num_layers", "num_heads", "num_kv_heads"), 1
)


def check_published(folder: Path, family: str) -> None:
    """Names of tensors, fields and files are those that the family is published with."""
    reader, (config, weights) = READERS[family], read_folder(folder, family)
    assert set(reader.fields) <= set(config) <= {*reader.fields, *OTHER_FIELDS}
    assert config.get("use_cache", True)
    if family in PUBLISHED:
        shape = TinyShape(
            **SMALLEST | {"num_layers": config.get("num_layers") or config["num_hidden_layers"]}
        )
        names = get_family(family).tiny.weights(shape)
        assert set(weights) == {published_name(name, family) for name in names}
    else:
        reader.weights(weights, config, llama_shapes(reader.config(config)))
    vocabulary, tokenizer_class = reader.tokenizer
    assert (folder / vocabulary).is_file() and not (folder / "sentencepiece.bpe.model").exists()
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == tokenizer_class
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"]
    assert "auto_map" not in config, "there was no code"


def read_folder(folder: Path, family: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and the tensors that are trained."""
    config, weights = json.loads((folder / "config.json").read_text()), read_whole(folder)
    for key, shape in FACTS[family].computed_tensors.items():
        if key in weights:  # published files hold it, and the published code works it out anew
            assert weights.pop(key).ndim == len(shape), key
    return config, weights


def check_tokens(folder: Path, family: str, *, live: bool) -> None:
    """Compares the answers of both sides, from the folder alone."""
    reader, (config, weights) = READERS[family], read_folder(folder, family)
    if not reader.is_own:
        check_published(folder, family)
    rows, ours, padding = our_tokens(folder)
    if live:
        model = load_theirs(folder) if reader.is_own else load_borrowed(reader, config, weights)
        assert borrowed_tokens(model, rows, NUM_TOKENS, padding=padding) == ours
        for row, answer in zip(rows[:2], ours, strict=False):
            assert borrowed_tokens(model, [row], NUM_TOKENS, padding=padding) == [answer]
    else:
        assert reference_tokens(reader, config, weights, rows, NUM_TOKENS) == ours


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Gives the folder in Hugging Face's form of a variant, made once, trained as "sft" or as "lora"."""
    root, found = tmp_path_factory.mktemp("hugging_face"), {}

    def make(name: str, method: str) -> Path:
        if (name, method) not in found:
            base, out = root / name, root / f"{name}-{method}-merged"
            if not base.exists():
                build(name, base)
            if method == "untrained":
                merge_files(hf("--model_name_or_path", base, "--output_dir", out))
            elif method == "sft":
                run = train(base, root / f"{name}-run")
                merge_files(hf("--model_name_or_path", run, "--output_dir", out))
            else:
                run = train(base, root / f"{name}-adapter", lora=True, lora_rank=4, learning_rate=0.02)
                merge_adapter(hf("--model_name_or_path", base, "--lora_path", run, "--merge_model_path", out))
            found[name, method] = out
        return found[name, method]

    return make


def hf(*words: Any) -> list[str]:
    return [*map(str, words), "--save_format", "hf"]


@pytest.mark.parametrize("name", [name for name in BORROWED if name not in BY_NUMPY])
def test_names_fields_and_files_are_those_of_published_folders(name, merged):
    """Of those that the next test does not ask for."""
    check_published(merged(name, "untrained"), VARIANTS[name].family)


@pytest.mark.parametrize(("name", "method"), [*((name, "sft") for name in BY_NUMPY), ("chatglm", "lora")])
def test_numpy_writes_the_same_tokens(name, method, merged):
    check_tokens(merged(name, method), VARIANTS[name].family, live=False)


@pytest.mark.parity
@pytest.mark.skipif(
    not HAS_TORCH and not REQUIRED, reason="PyTorch is not installed; make parity installs it"
)
@pytest.mark.parametrize(("name", "method"), LIVE)
def test_transformers_writes_the_same_tokens(name, method, merged):
    check_tokens(merged(name, method), VARIANTS[name].family, live=True)


@pytest.mark.parametrize("name", ["chatglm3", "internlm2"])
def test_files_of_ranks_give_the_same_folder(name, merged, tmp_path):
    """What a run of two processes leaves, whose parts of the tensors are cut here."""
    expected, family = merged(name, "sft"), get_family(VARIANTS[name].family)
    run = expected.with_name(f"{name}-run")
    config = json.loads((run / "config.json").read_text())
    ranks = write_ranks(tmp_path / "ranks", (config, read_whole(run)), family, tensor=2)
    for path in run.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and not (ranks / path.name).exists():
            shutil.copyfile(path, ranks / path.name)
    merge_files(hf("--model_name_or_path", ranks, "--output_dir", tmp_path / "merged"))
    check_same(read_whole(tmp_path / "merged"), read_whole(expected))
    assert files_of(tmp_path / "merged") == files_of(expected)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "merged" / name).read_text()) == json.loads(
            (expected / name).read_text()
        )


@pytest.mark.parametrize(("base", "name"), [(10000.0, "chatglm3-6b"), (500000.0, "chatglm3-6b-32k")])
def test_code_that_reads_the_rotary_base_is_named(base, name, tmp_path):
    """That of ChatGLM3-6B has no `rope_ratio`: the models of long texts have code of their own."""
    family = get_family("chatglm3")
    config = family.tiny.config(TinyShape(**SMALLEST)) | {"rotary_base": base}
    assert hugging_face_config(config, family, dtype="float32")["_name_or_path"] == name


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
