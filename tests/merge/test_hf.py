"""Hugging Face's form: the name tables are PaddleNLP's, there and back is identity, folders have what is needed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from finetune.errors import UserError
from finetune.families.family import families, get_family, import_object
from finetune.merge.hf_out import hugging_face_config
from finetune.merge.lora import MergeOptions, export_peft, merge
from finetune.merge.tensor_parallel import MergeOptions as RankOptions
from finetune.merge.tensor_parallel import merge as merge_ranks
from finetune.models.hf_names import (
    embedding_name,
    is_hugging_face,
    is_tied,
    is_turned,
    joined_columns,
    to_hugging_face,
    to_paddle,
)
from tests.merge.lora_writing import TOLERANCE, folder_logits, write_adapter, write_base
from tests.merge.rank_writing import check_same, read_whole, tiny_model, write_ranks

FAMILIES = sorted(families())
VARIANTS = [(name, {}) for name in FAMILIES] + [
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("opt", {"word_embed_proj_dim": 32}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_names_and_transposes_are_those_of_paddlenlp(name, changes):
    """Every name in PaddleNLP's table that weights have, in both directions."""
    from finetune.models.tensor_readers import _name_table

    family = get_family(name)
    config, weights = tiny_model(name)
    config |= changes
    model_class = import_object(family.model_class)
    paddle_config = model_class.config_class.from_dict(family.adapt_config(config))
    table = _name_table(model_class, paddle_config, family)
    tied = is_tied(config, family)
    shapes = {key: value.shape for key, value in weights.items()} | {
        "opt.embeddings.project_in.weight": (32, 64), "opt.decoder.project_out.weight": (64, 32),
        "lm_head.decoder_weight": (96, 64)}  # fmt: skip
    compared = 0
    for theirs, mapping in table.items():
        ours = mapping.target_name
        if ours == "lm_head.decoder_weight" and not family.hugging_face.own_head:
            assert tied and to_paddle(theirs, family) == "lm_head.weight"
            continue
        assert to_paddle(theirs, family) == ours
        if ours not in shapes:
            continue
        compared += 1
        turned = is_turned(ours, shapes[ours], family, tied=tied)
        assert turned == (mapping.action == "transpose"), ours
        assert table[to_hugging_face(ours, family)].target_name == ours
        assert is_hugging_face([theirs], family)
    assert compared >= len(weights) - tied, "every weight of the model was among them"
    assert embedding_name(family) in weights


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_joined_columns_are_those_of_paddlenlp(name, num_kv_heads):
    from paddlenlp.transformers.conversion_utils import split_or_fuse_func

    family = get_family(name)
    config = {"num_attention_heads": 4, "num_key_value_heads": num_kv_heads,
              "num_hidden_layers": 1, "hidden_size": 32}  # fmt: skip
    generator = np.random.default_rng(0)
    parts = [generator.standard_normal((6, width)) for width in (32, 8 * num_kv_heads, 8 * num_kv_heads)]
    fuse = split_or_fuse_func(is_fuse=True)
    joined = fuse(parts, is_qkv=True, num_heads=4, num_key_value_heads=num_kv_heads)
    columns = joined_columns("x.self_attn.qkv_proj", joined.shape[1], config, family)
    for part, chosen in zip(parts, columns, strict=True):
        np.testing.assert_array_equal(joined[:, chosen], part)
    gate, up = joined_columns("x.mlp.gate_up_fused_proj", 10, config, family)
    assert gate.tolist() == [0, 1, 2, 3, 4] and up.tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_identity(name, dtype, tmp_path):
    base = write_base(tmp_path / "base", name, dtype=dtype)
    adapter = tmp_path / "adapter"
    expected = write_adapter(adapter, base)
    theirs, direct, back = (tmp_path / each for each in ("theirs", "direct", "back"))
    merge(MergeOptions(base, (adapter,), theirs, save_format="hf"))
    merge(MergeOptions(base, (adapter,), direct))
    nothing = tmp_path / "nothing"
    write_adapter(nothing, base, lora_alpha=0)
    merge(MergeOptions(theirs, (nothing,), back, save_format="paddle"))
    check_same(read_whole(back), read_whole(direct))
    assert is_hugging_face(read_whole(theirs), get_family(name))
    settings = json.loads((theirs / "config.json").read_text())
    assert (
        settings["torch_dtype"] == dtype and "dtype" not in settings and "paddlenlp_version" not in settings
    )
    if dtype == "float32":
        assert np.abs(folder_logits(theirs) - expected).max() < TOLERANCE * max(1, expected.std())
        assert np.abs(folder_logits(back) - expected).max() < TOLERANCE * max(1, expected.std())


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_joined_layers_are_taken_apart(name, tmp_path):
    from finetune.models.loading import load_model
    from finetune.models.resolve import resolve_model

    base = write_base(tmp_path / "base", name)
    model = load_model(resolve_model(base), dtype="float32",
                       config_overrides={"fuse_attention_qkv": True, "fuse_attention_ffn": True})  # fmt: skip
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    assert any("qkv_proj" in key for key in weights)
    config = json.loads((base / "config.json").read_text())
    fused = config | {"fuse_attention_qkv": True, "fuse_attention_ffn": True}
    ranks = write_ranks(tmp_path / "ranks", (fused, weights), get_family(name), tensor=2)
    merge_ranks(RankOptions(ranks, tmp_path / "theirs", save_format="hf"))
    stored = read_whole(tmp_path / "theirs")
    assert not any("qkv_proj" in key or "gate_up" in key for key in stored)
    assert "fuse_attention_qkv" not in json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert np.abs(folder_logits(tmp_path / "theirs") - folder_logits(base)).max() < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_are_merged_into_hugging_faces_form(name, tmp_path):
    base = write_base(tmp_path / "base", name)
    config = json.loads((base / "config.json").read_text())
    ranks = write_ranks(
        tmp_path / "ranks", (config, read_whole(base)), get_family(name), tensor=2, pipeline=2
    )
    (ranks / "sentencepiece.bpe.model").write_bytes(b"pieces")
    (ranks / "tokenizer_config.json").write_text('{"tokenizer_class": "GPTTokenizer"}')
    merge_ranks(RankOptions(ranks, tmp_path / "theirs", save_format="hf"))
    assert np.abs(folder_logits(tmp_path / "theirs") - folder_logits(base)).max() < 1e-5
    assert (tmp_path / "theirs" / "tokenizer.model").read_bytes() == b"pieces"
    assert "GPT2Tokenizer" in (tmp_path / "theirs" / "tokenizer_config.json").read_text()


def test_adapters_of_ranks_are_sent_to_the_other_script(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    write_adapter(tmp_path / "adapter", base)
    with pytest.raises(UserError, match=r"merge_lora_params\.py --save_format peft"):
        merge_ranks(RankOptions(tmp_path / "adapter", tmp_path / "out", save_format="hf"))


@pytest.mark.parametrize("hugging_face", [False, True], ids=["paddle", "hf"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"rslora": True}, {"lora_target_modules": [".*qkv_proj", ".*o_proj"], "overrides": {"fuse_attention_qkv": True}},
     {"modules_to_save": ["embed_tokens", "lm_head"], "num_tokens": 99}],
    ids=["plain", "rslora", "joined", "whole"],
)  # fmt: skip
def test_exported_adapter_merges_alike(settings, hugging_face, tmp_path):
    """What is written for peft is read back as peft's and gives the same model."""
    base = write_base(tmp_path / "base", "llama", hugging_face=hugging_face)
    adapter, exported = tmp_path / "adapter", tmp_path / "exported"
    write_adapter(adapter, base, **settings)
    export_peft(MergeOptions(None, (adapter,), exported))
    content = json.loads((exported / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(base) and content["use_rslora"] == ("rslora" in settings)
    merge(MergeOptions(None, (adapter,), tmp_path / "ours"))
    merge(MergeOptions(None, (exported,), tmp_path / "theirs"))
    ours, theirs = read_whole(tmp_path / "ours"), read_whole(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], atol=2e-7, err_msg=name)


def test_an_exported_adapter_has_its_tokenizer_under_transformers_names(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    adapter, exported = tmp_path / "adapter", tmp_path / "exported"
    write_adapter(adapter, base)
    (adapter / "sentencepiece.bpe.model").write_bytes(b"vocabulary")
    notes = {"tokenizer_class": "LlamaTokenizer", "from_slow": True}
    (adapter / "tokenizer_config.json").write_text(json.dumps(notes))
    export_peft(MergeOptions(None, (adapter,), exported))
    assert (exported / "tokenizer.model").read_bytes() == b"vocabulary"
    assert not (exported / "sentencepiece.bpe.model").exists()
    assert json.loads((exported / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "LlamaTokenizer"
    }


def test_what_peft_has_no_place_for(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    write_adapter(tmp_path / "adapter", base, pissa=True)
    (tmp_path / "adapter" / "initial_factors.safetensors").unlink()  # as PaddleNLP leaves one
    with pytest.raises(UserError, match=r"was trained with pissa: .*Merge it"):
        export_peft(MergeOptions(None, (tmp_path / "adapter",), tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling_type": "linear", "rope_scaling_factor": 2.0}, {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}}),
        ({"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
    ],
)  # fmt: skip
def test_configuration_of_llama(changes, expected):
    config = tiny_model("llama")[0] | changes
    written = hugging_face_config(config, get_family("llama"), dtype="bfloat16")
    assert {name: written[name] for name in expected} == expected
    assert not any(name.startswith(("rope_scaling_", "alibi")) for name in written)
    with pytest.raises(UserError, match="alibi true"):
        hugging_face_config(config | {"alibi": True}, get_family("llama"), dtype="bfloat16")


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_a_configuration_of_transformers_says_one_element_type(field):
    config = {"model_type": "llama", "transformers_version": "5.0.0", field: "float32"}
    written = hugging_face_config(config, get_family("llama"), dtype="bfloat16")
    assert written == config | {field: "bfloat16"}
