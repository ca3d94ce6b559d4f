"""What a merge of LoRA adapters refuses, and what it says then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune.errors import UserError
from tests.merge.lora_writing import (
    VOCABULARY,
    edit_adapter,
    run_merge,
    write_adapter,
    write_base,
)
from tests.merge.rank_writing import read_whole


def test_sum_beyond_float16_is_refused(tmp_path):
    base = write_base(tmp_path / "base", "llama", dtype="float16")
    write_adapter(tmp_path / "adapter", base, lora_alpha=10_000_000)
    with pytest.raises(UserError, match=r"peft_model-00001-of-00001.safetensors: .*beyond what float16"):
        run_merge(base, tmp_path / "adapter", output=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_adapter_of_a_diverged_run(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    write_adapter(tmp_path / "adapter", base)
    path = next((tmp_path / "adapter").glob("*.safetensors"))
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, path)
    with pytest.raises(UserError, match="holds values that are not finite: the training diverged"):
        run_merge(base, tmp_path / "adapter", output=tmp_path / "merged")


@pytest.mark.parametrize("num_missing", [1, 5])
def test_an_embedding_with_fewer_tokens_than_the_base_is_refused(num_missing, tmp_path):
    base = write_base(tmp_path / "base", "llama")
    write_adapter(tmp_path / "adapter", base, modules_to_save=["embed_tokens"])
    path = next((tmp_path / "adapter").glob("*.safetensors"))
    tensors = load_file(path)
    (name,) = [name for name in tensors if "embed_tokens" in name]
    tensors[name] = np.ascontiguousarray(tensors[name][:-num_missing])
    save_file(tensors, path)
    with pytest.raises(
        UserError, match=rf"embed_tokens.weight is \[{VOCABULARY - num_missing}, 64\], in the base"
    ):
        run_merge(base, tmp_path / "adapter", output=tmp_path / "merged")


def _narrower(base: Path) -> None:
    config = json.loads((base / "config.json").read_text()) | {"hidden_size": 32, "intermediate_size": 128}
    tensors = {
        name: np.ascontiguousarray(value[:32] if value.shape[0] == 64 else value)
        for name, value in read_whole(base).items()
    }
    (base / "config.json").write_text(json.dumps(config))
    save_file(tensors, base / "model.safetensors", metadata={"format": "np"})


def _fewer_layers(base: Path) -> None:
    tensors = {name: value for name, value in read_whole(base).items() if ".layers.1." not in name}
    save_file(tensors, base / "model.safetensors", metadata={"format": "np"})


def _only_half(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    save_file(
        {name: value for name, value in tensors.items() if not name.endswith("0.mlp.up_proj.lora_B")}, path
    )


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda base, adapter: _narrower(base), r"safetensors does not fit the base .*base: the update of llama\.layers\.0\S+ is \[64, 128\], its weight in the base \[32, 128\].*--model_name_or_path"),
        (lambda base, adapter: _fewer_layers(base), r"the base has no llama.layers.1.mlp.down_proj.weight; .*and 1 more"),
        (lambda base, adapter: edit_adapter(adapter, r=8), r"safetensors: .* has lora_A \[128, 4\], lora_B \[4, 64\], but the adapter's configuration tells of rank 8"),
        (lambda base, adapter: edit_adapter(adapter, use_mora=True), "use_mora true: MoRA"),
        (lambda base, adapter: edit_adapter(adapter, lora_alpha=None), "has lora_alpha None"),
        (lambda base, adapter: _only_half(adapter), r"lacks lora_B of llama.layers.0.mlp.up_proj"),
        (lambda base, adapter: next(adapter.glob("*.safetensors")).unlink(), "names 1 files that are not in the folder .peft_model-00001-of-00001.safetensors"),
        (lambda base, adapter: (adapter / "lora_config.json").rename(adapter / "prefix_config.json"), r"predict_generation.py .*--prefix_path"),
        (lambda base, adapter: (adapter / "lora_config.json").unlink(), "holds no adapter: expected lora_config.json or adapter_config.json"),
        (lambda base, adapter: (base / "config.json").unlink(), "is no model folder: it has no config.json"),
        (lambda base, adapter: shutil.rmtree(base), r"the base that .* names, .* is no folder"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(harm, message, tmp_path):
    base = write_base(tmp_path / "base", "llama")
    write_adapter(tmp_path / "adapter", base)
    harm(base, tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        run_merge(None, tmp_path / "adapter", output=tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_inputs_are_never_overwritten(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    write_adapter(tmp_path / "adapter", base)
    for folder in ("base", "adapter"):
        with pytest.raises(UserError, match=f"--merge_model_path .*{folder} is an input"):
            run_merge(base, tmp_path / "adapter", output=tmp_path / folder, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("")
    with pytest.raises(UserError, match=r"--merge_model_path .* is not empty"):
        run_merge(base, tmp_path / "adapter", output=tmp_path / "mine", overwrite=True)


def test_index_of_the_base_is_missed_by_name(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    write_adapter(tmp_path / "adapter", base)
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    with pytest.raises(
        UserError, match=r"00001-of-00002.safetensors is here, model-00002-of-00002.safetensors and"
    ):
        run_merge(base, tmp_path / "adapter", output=tmp_path / "merged")


def test_pissa_of_joined_layers_needs_them_joined(tmp_path):
    base = write_base(tmp_path / "base", "llama")
    overrides = {"fuse_attention_qkv": True}
    write_adapter(
        tmp_path / "adapter", base, pissa=True, overrides=overrides, lora_target_modules=[".*qkv_proj"]
    )
    (tmp_path / "adapter" / "initial_factors.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"singular vectors of the joined llama\.layers\.0\.self_attn\.qkv_proj"
    ):
        run_merge(base, tmp_path / "adapter", output=tmp_path / "merged")
