"""Merging LoRA adapters: the adapter's logits for every family, other forms, several at once, rounding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from finetune.adapters.scaling import ScalingRule, lora_scaling
from finetune.errors import UserError
from finetune.families.family import families, get_family
from finetune.merge.lora import main, parse_options
from finetune.merge.lora_adapters import leading_part
from finetune.storage.dtypes import as_float32, rounded
from tests.conftest import ROOT
from tests.families.cases import FACTS, TIED
from tests.merge.lora_writing import (
    VOCABULARY,
    add_random_lora,
    check_logits,
    edit_adapter,
    folder_logits,
    logits,
    run_merge,
    write_adapter,
    write_base,
)
from tests.merge.rank_writing import read_whole, write_ranks

SCRIPT = ROOT / "merge_lora_params.py"
FAMILIES = sorted(families())


@pytest.mark.parametrize("hugging_face", [False, True], ids=["paddle", "hf"])
@pytest.mark.parametrize("name", FAMILIES)
def test_merged_logits_are_those_of_the_adapter(name, hugging_face, tmp_path):
    base = write_base(tmp_path / "base", name, hugging_face=hugging_face)
    expected = write_adapter(tmp_path / "adapter", base)
    merged = run_merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    check_logits(folder_logits(merged), expected, folder_logits(base))
    added = set() if hugging_face else {get_family(name).hugging_face.own_head} - {""}
    assert read_whole(merged).keys() == read_whole(base).keys() | added
    assert (merged / "config.json").read_bytes() == (base / "config.json").read_bytes()


@pytest.mark.parametrize("settings", [{"rslora": True}, {"lora_alpha": 3, "lora_rank": 8}], ids=str)
def test_scaling_rules(settings, tmp_path):
    base = write_base(tmp_path / "base", "llama")
    expected = write_adapter(tmp_path / "adapter", base, **settings)
    merged = run_merge(None, tmp_path / "adapter", output=tmp_path / "merged")
    check_logits(folder_logits(merged), expected, folder_logits(base))


@pytest.mark.parametrize("settings", [{"rslora": True}, {"rslora": False}, {"pissa": True}], ids=str)
def test_scaling_is_that_of_paddlenlp(settings):
    from paddlenlp.peft import LoRAConfig
    from paddlenlp.peft.lora.lora_layers import LoRALinear

    layer = LoRALinear(6, 5, r=3, lora_alpha=7, **settings)
    assert lora_scaling(7, 3, **settings) == layer.scaling
    assert lora_scaling(7, 3, **settings) == LoRAConfig(r=3, lora_alpha=7, **settings).scaling


def test_patterns_of_peft():
    rule = ScalingRule(
        4, 8, rank_pattern={"q_proj": 2, r"layers\.1\..*v_proj": 16}, alpha_pattern={"v_proj": 32}
    )
    assert rule.factor_of("model.layers.0.self_attn.q_proj") == 4
    assert rule.factor_of("model.layers.0.self_attn.v_proj") == 8
    assert rule.factor_of("model.layers.1.self_attn.v_proj") == 2
    assert rule.rank_of("model.layers.0.self_attn.xq_proj") == 4, "a pattern begins at a dot"
    assert (lora_scaling(3, 1), lora_scaling(3, 1, rslora=True)) == (3, 3)
    with pytest.raises(ValueError, match="is 0, but must be at least 1"):
        lora_scaling(1, 0)


@pytest.mark.parametrize("hugging_face", [False, True], ids=["paddle", "hf"])
def test_pissa_is_merged_into_the_unchanged_base(hugging_face, tmp_path):
    """Without a record of what it started from: singular vectors are found in float32 and in float64."""
    base = write_base(tmp_path / "base", "llama", hugging_face=hugging_face)
    expected = write_adapter(tmp_path / "adapter", base, pissa=True)
    (tmp_path / "adapter" / "initial_factors.safetensors").unlink()
    merged = run_merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    assert np.abs(folder_logits(merged) - expected).max() < 1e-3 * expected.std()
    assert np.abs(folder_logits(base) - expected).max() > 0.1
    with pytest.raises(UserError, match=r"pissa.*cannot be --unmerge"):
        run_merge(merged, tmp_path / "adapter", output=tmp_path / "out", unmerge=True)
    other = [tmp_path / "plain", tmp_path / "adapter"]
    write_adapter(other[0], base)
    with pytest.raises(UserError, match=r"cannot be an adapter after the first. Name it first"):
        run_merge(base, *other, output=tmp_path / "out")


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_leading_part_is_that_of_the_singular_values(shape):
    weight = np.random.default_rng(0).standard_normal(shape)
    left, singular, right = np.linalg.svd(weight, full_matrices=False)
    found = leading_part(weight.astype(np.float32), 5)
    np.testing.assert_allclose(found[0] @ found[1], left[:, :5] * singular[:5] @ right[:5], atol=2e-5)


@pytest.mark.parametrize("hugging_face", [False, True], ids=["paddle", "hf"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_adapter_of_joined_layers(name, hugging_face, tmp_path):
    """A run with fuse_attention_qkv and fuse_attention_ffn on a base that keeps the layers apart."""
    base = write_base(tmp_path / "base", name, hugging_face=hugging_face)
    fused = {"fuse_attention_qkv": True, "fuse_attention_ffn": True}
    targets = [".*qkv_proj.*", ".*gate_up_fused_proj.*"]
    expected = write_adapter(tmp_path / "adapter", base, overrides=fused, lora_target_modules=targets)
    merged = run_merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    check_logits(folder_logits(merged), expected, folder_logits(base))


@pytest.mark.parametrize("hugging_face", [False, True], ids=["paddle", "hf"])
@pytest.mark.parametrize("name", ["llama", "chatglm2", "qwen"])
@pytest.mark.parametrize("saved", ["both", "none", "head"])
def test_added_tokens(name, hugging_face, saved, tmp_path):
    """Embeddings that were trained whole replace the base's; others grow as they do for training."""
    family = get_family(name)
    base = write_base(tmp_path / "base", name, hugging_face=hugging_face)
    modules = {
        "both": [family.embedding_module, family.head_module],
        "none": None,
        "head": [family.head_module],
    }
    adapter = tmp_path / "adapter"
    expected = write_adapter(adapter, base, num_tokens=VOCABULARY + 5, modules_to_save=modules[saved])
    (adapter / "tokenizer.model").write_bytes(b"theirs")
    (base / "tokenizer.model").write_bytes(b"ours")
    (base / "vocab.txt").write_bytes(b"ours")
    merged = run_merge(base, adapter, output=tmp_path / "merged")
    assert expected.shape[-1] == VOCABULARY + 5
    check_logits(folder_logits(merged), expected)
    assert (merged / "tokenizer.model").read_bytes() == b"theirs"
    assert not (merged / "vocab.txt").exists()
    with pytest.raises(UserError, match=r"holds what was merged from"):
        run_merge(base, adapter, output=merged)
    if saved != "none":
        with pytest.raises(UserError, match=r"--unmerge cannot take .* out: it replaced"):
            run_merge(merged, adapter, output=tmp_path / "out", unmerge=True)


@pytest.mark.parametrize("hugging_face", [False, True], ids=["paddle", "hf"])
@pytest.mark.parametrize(("name", "module"), TIED.items())
def test_tied_embeddings_are_replaced_once(name, module, hugging_face, tmp_path):
    base = write_base(tmp_path / "base", name, hugging_face=hugging_face, **FACTS[name].tied_config)
    expected = write_adapter(tmp_path / "adapter", base, num_tokens=VOCABULARY + 8, modules_to_save=[module])
    merged = run_merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    check_logits(folder_logits(merged), expected)
    stored = [key for key, value in read_whole(merged).items() if VOCABULARY + 8 in value.shape]
    copied = {get_family(name).hugging_face.own_head} - {""} if not hugging_face else set()
    assert len(stored) == 1 + len(copied) and copied <= set(stored), "once, but for PaddleNLP's sake"


def test_several_adapters_in_order_and_out_again(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    adapters = [tmp_path / "first", tmp_path / "second"]
    write_adapter(adapters[0], base)
    write_adapter(adapters[1], base, lora_rank=2, lora_target_modules=[".*q_proj", ".*up_proj"])
    once = run_merge(base, adapters[0], output=tmp_path / "once")
    twice = read_whole(run_merge(once, adapters[1], output=tmp_path / "twice"))
    together = read_whole(run_merge(base, *adapters, output=tmp_path / "together"))
    original = read_whole(base)
    out = read_whole(run_merge(tmp_path / "together", *adapters, output=tmp_path / "out", unmerge=True))
    name = "llama.layers.0.self_attn.q_proj.weight"
    assert np.abs(together[name] - original[name]).max() > 0.05
    for name in original:
        np.testing.assert_allclose(together[name], twice[name], atol=1e-6)
        np.testing.assert_allclose(out[name], original[name], atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_sum_is_rounded_once_to_the_type_of_the_base(dtype, tmp_path):
    base = write_base(tmp_path / "base", "llama", dtype=dtype)
    write_adapter(tmp_path / "adapter", base, rslora=True)
    merged = read_whole(run_merge(base, tmp_path / "adapter", output=tmp_path / "merged"))
    lora = read_whole(tmp_path / "adapter")
    for name, before in read_whole(base).items():
        layer = name.removesuffix(".weight")
        assert merged[name].dtype == before.dtype
        if f"{layer}.lora_A" not in lora:
            assert merged[name].tobytes() == before.tobytes()
            continue
        exact = (
            as_float32(before) + lora[f"{layer}.lora_A"].astype(np.float64) @ lora[f"{layer}.lora_B"] * 8 / 2
        )
        spacing = (
            np.spacing(np.abs(exact).astype(np.float32))
            * {"float32": 4, "float16": 2**13, "bfloat16": 2**16}[dtype]
        )
        error = np.abs(as_float32(merged[name]) - exact)
        assert (error <= 0.502 * spacing + 1e-6).all()
        assert (error > 0).any()


def test_rounding_to_bfloat16_equals_pytorchs_rule():
    """To nearest, ties to even, worked out from the two neighbours."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal((64, 64)).astype(np.float32)
    values[0] = 1 + np.arange(64, dtype=np.float32) * 2.0**-9  # ties among them
    values[1, :3] = np.inf, -np.inf, np.nan
    found = as_float32(np.ascontiguousarray(rounded(values, np.dtype("<u2"))))
    below = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    above = ((values.view(np.uint32) & 0xFFFF0000) + np.uint32(0x10000)).view(np.float32)
    with np.errstate(invalid="ignore"):
        nearer = np.abs(values - below) - np.abs(above - values)
    even = (below.view(np.uint32) >> 16 & 1) == 0
    expected = np.where((nearer < 0) | ((nearer == 0) & even), below, above)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(found[finite], expected[finite])
    np.testing.assert_array_equal(found[~finite], values[~finite])


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_of_paddlenlp(name, tmp_path):
    """One pickle of arrays, as PaddleNLP's LoRAModel.save_pretrained leaves it."""
    base = write_base(tmp_path / "base", name)
    adapted = add_random_lora(base)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "lora_model_state.pdparams").is_file()
    merged = run_merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    check_logits(folder_logits(merged), logits(adapted))


def test_adapter_in_files_of_ranks(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    expected = write_adapter(tmp_path / "adapter", base)
    whole = read_whole(tmp_path / "adapter")
    config = json.loads((base / "config.json").read_text())
    ranks = write_ranks(
        tmp_path / "ranks",
        (config, whole),
        get_family("llama"),
        tensor=2,
        pipeline=2,
        stem="lora_model_state",
    )
    settings = json.loads((tmp_path / "adapter" / "lora_config.json").read_text())
    (ranks / "lora_config.json").write_text(json.dumps(settings | {"tensor_parallel_degree": 2}))
    merged = run_merge(base, ranks, output=tmp_path / "merged")
    check_logits(folder_logits(merged), expected)


def test_base_in_files_of_ranks(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    expected = write_adapter(tmp_path / "adapter", base)
    config = json.loads((base / "config.json").read_text())
    ranks = write_ranks(
        tmp_path / "ranks", (config, read_whole(base)), get_family("llama"), tensor=2, pipeline=2
    )
    merged = run_merge(ranks, tmp_path / "adapter", output=tmp_path / "merged")
    check_logits(folder_logits(merged), expected)
    assert json.loads((merged / "config.json").read_text())["tensor_parallel_degree"] == 1


def test_base_in_several_files_stays_so_when_asked(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    expected = write_adapter(tmp_path / "adapter", base)
    merged = run_merge(base, tmp_path / "adapter", output=tmp_path / "merged", max_shard_bytes=100_000)
    assert len(list(merged.glob("model-*.safetensors"))) > 2
    check_logits(folder_logits(merged), expected)


def test_options():
    words = ["--lora_path", "a,b", "--lora_path", "c", "d", "--merge_lora_model_path", "out", "--unmerge"]
    options = parse_options([*words, "--max_shard_size", "2MB"])
    assert options.adapters == tuple(map(Path, "abcd"))
    assert (options.base, options.output, options.unmerge) == (None, Path("out"), True)
    assert options.max_shard_bytes == 2_000_000 and options.save_format is None


def test_command_needs_no_framework(tmp_path):
    base = write_base(tmp_path / "base", "qwen2")
    expected = write_adapter(tmp_path / "adapter", base)
    program = (
        "import sys; from finetune.merge.lora import main; main(sys.argv[1:]); "
        "print([m for m in ('paddle', 'paddlenlp', 'torch', 'transformers', 'safetensors') if m in sys.modules])"
    )
    words = ["--lora_path", tmp_path / "adapter", "--merge_model_path", tmp_path / "merged"]
    run = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"
    assert "14 low-rank updates" in run.stdout
    check_logits(folder_logits(tmp_path / "merged"), expected)


def test_relative_base_is_found_from_another_folder(tmp_path, monkeypatch):
    run = tmp_path / "run"
    base, adapter = write_base(run / "models" / "base", "llama"), run / "checkpoints" / "lora"
    write_adapter(adapter, base)
    edit_adapter(adapter, base_model_name_or_path="models/base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_merge(None, adapter, output=tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["source"] == str(base)


def test_peft_form_names_what_to_load(tmp_path, capsys):
    for form in ("paddle", "hf"):
        base = write_base(tmp_path / form, "llama", hugging_face=form == "hf")
        write_adapter(tmp_path / f"adapter-{form}", base)
        words = ["--lora_path", str(tmp_path / f"adapter-{form}"), "--save_format", "peft"]
        main([*words, "--merge_model_path", str(tmp_path / f"peft-{form}")])
        told = "set base_model_name_or_path in" in capsys.readouterr().out
        assert told == (form == "paddle")
    with pytest.raises(UserError, match="--save_format peft writes none"):
        main([*words, "--merge_model_path", str(tmp_path / "more"), "--verify"])
