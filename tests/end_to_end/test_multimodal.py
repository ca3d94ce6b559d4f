"""Multimodal folders from the first step to the merged whole: the text part is trained, other parts stay as they are."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.merge.lora import MergeOptions, export_peft, merge
from finetune.merge.tensor_parallel import MergeOptions as RankOptions
from finetune.merge.tensor_parallel import merge as merge_ranks
from finetune.models.other_parts import take_text_part, write_other_parts
from finetune.models.resolve import resolve_model
from finetune.models.reward_head import reward_config
from finetune.models.tiny.checkpoint import build_tiny
from finetune.storage.checkpoints import Checkpoint
from finetune.storage.writer import write_tensors
from tests.conftest import losses, run_entry, write_arguments
from tests.merge.lora_writing import folder_logits
from tests.multimodal_folders import FOLDERS, SIZES, build_multimodal, other_tensors
from tests.quantised_folders import write_quantised

FILES_OF_OTHERS = ("preprocessor_config.json", "processing_own.py")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Builds the folder of a kind, once."""
    built = {}

    def build(name):
        if name not in built:
            built[name] = build_multimodal(name, tmp_path_factory.mktemp("multimodal") / name)
        return built[name]

    return build


def train(folder, data, output, **settings):
    arguments = write_arguments(
        output.with_suffix(".json"),
        model_name_or_path=str(folder),
        dataset_name_or_path=str(data),
        output_dir=str(output),
        **{"device": "cpu", "max_steps": 3, "warmup_steps": 0, "learning_rate": 1e-2, "src_length": 64,
           "max_length": 128, "do_train": True, "disable_tqdm": True, "text_only": True, "logging_steps": 1,
           "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_strategy": "no", "do_eval": False} | settings,
    )  # fmt: skip
    return run_entry(arguments)


def names_of(folder):
    return {name for file in folder.glob("model*.safetensors") for name in load_file(file)}


def check_whole(merged, folder):
    """All that the folder had is there, and what is not text to the last bit."""
    computed = {name for name in names_of(merged) if name.endswith(".inv_freq")}  # as published, of ChatGLM
    assert names_of(merged) - computed == names_of(folder)
    kept, wanted = other_tensors(merged), other_tensors(folder)
    assert kept.keys() == wanted.keys() and len(kept) > 1
    assert all(np.array_equal(kept[name], array) for name, array in wanted.items())
    assert json.loads((merged / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    for name in FILES_OF_OTHERS:
        assert (merged / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("name", FOLDERS)
def test_trained_weights_go_back_into_the_whole(name, folder_of, small_data, tmp_path):
    folder, trained, merged = folder_of(name), tmp_path / "trained", tmp_path / "merged"
    assert train(folder, small_data, trained) == 0
    assert losses(trained)[-1] < losses(trained)[0]
    assert resolve_model(trained).kind is None, "the result is a model of text alone"
    merge_ranks(RankOptions(trained, merged, save_format="hf"))
    check_whole(merged, folder)
    logits, before = folder_logits(merged), folder_logits(folder)
    np.testing.assert_array_equal(logits, folder_logits(trained))
    assert np.abs(logits - before).max() > 1e-3


@pytest.mark.parametrize("name", FOLDERS)
def test_adapters_go_into_the_whole(name, folder_of, small_data, tmp_path):
    folder, adapter = folder_of(name), tmp_path / "adapter"
    assert train(folder, small_data, adapter, lora=True, lora_rank=2) == 0
    merged, plain, back = (tmp_path / each for each in ("merged", "plain", "back"))
    merge(MergeOptions(folder, (adapter,), merged))
    check_whole(merged, folder)
    merge(MergeOptions(folder, (adapter,), plain, save_format="paddle"))
    assert resolve_model(plain).kind is None
    merge_ranks(RankOptions(plain, back, save_format="hf"))
    check_whole(back, folder)
    np.testing.assert_array_equal(folder_logits(back), folder_logits(merged))
    assert np.abs(folder_logits(merged) - folder_logits(folder)).max() > 1e-4
    peft = tmp_path / "peft"
    export_peft(MergeOptions(folder, (adapter,), peft, save_format="peft"))
    names = load_file(peft / "adapter_model.safetensors")
    assert all(
        name.startswith(f"base_model.model.{FOLDERS[name_of].layer}.") for name_of in [name] for name in names
    )
    again = tmp_path / "again"
    merge(MergeOptions(folder, (peft,), again))
    check_whole(again, folder)
    np.testing.assert_allclose(folder_logits(again), folder_logits(merged), atol=1e-6)


def test_without_text_only_the_kind_is_named_before_weights_are_read(folder_of, small_data, tmp_path, capfd):
    folder = folder_of("qwen2_vl")
    assert train(folder, small_data, tmp_path / "out", text_only=False) == 2
    told = capfd.readouterr().err
    assert "Qwen2-VL" in told and "text_only" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lora", [False, True])
def test_the_whole_grows_with_its_text_part(lora, folder_of, small_data, tmp_path):
    folder, trained, merged = folder_of("llava"), tmp_path / "trained", tmp_path / "merged"
    larger = tmp_path / "larger"
    build_tiny("llama", larger, **SIZES | {"vocab_size": 350})
    method = {"lora": True, "lora_rank": 2, "modules_to_save": ["embed_tokens", "lm_head"]} if lora else {}
    assert train(folder, small_data, trained, tokenizer_name_or_path=str(larger), **method) == 0
    if lora:
        merge(MergeOptions(folder, (trained,), merged))
    else:
        merge_ranks(RankOptions(trained, merged, save_format="hf"))
    config, before = (json.loads((each / "config.json").read_text()) for each in (merged, folder))
    assert config["text_config"].pop("vocab_size") == 350 and before["text_config"].pop("vocab_size") == 330
    assert config == before
    assert load_file(merged / "model.safetensors")["language_model.lm_head.weight"].shape == (350, 32)
    assert other_tensors(merged).keys() == other_tensors(folder).keys()


def test_a_reward_model_on_a_text_part_is_written_in_one_form_alone(folder_of, small_data, tmp_path):
    config = reward_config(resolve_model(folder_of("qwen2_vl")).config, get_family("qwen2"))
    folder = folder_of("qwen2_vl")
    text, parts = take_text_part(folder, Checkpoint(folder).tensors)
    head = replace(text["model.norm.weight"], name="score.weight")
    source = tmp_path / "source"
    source.mkdir()
    write_tensors(source, [*text.values(), head])
    write_other_parts(parts, source)
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"reward model on the text part.*--save_format paddle"):
        merge_ranks(RankOptions(source, tmp_path / "out", save_format="hf"))


def test_what_is_missing_beside_a_text_part_is_named(folder_of, small_data, tmp_path):
    folder, trained = folder_of("qwen2_vl"), tmp_path / "trained"
    assert train(folder, small_data, trained, max_steps=1) == 0
    (trained / "other_parts.safetensors").unlink()
    with pytest.raises(UserError, match=r"other_parts.safetensors is missing.*remove whole_config.json"):
        merge_ranks(RankOptions(trained, tmp_path / "out", save_format="hf"))
    (trained / "whole_config.json").unlink()
    merge_ranks(RankOptions(trained, tmp_path / "plain", save_format="hf"))
    assert resolve_model(tmp_path / "plain").kind is None


def test_a_checkpoint_finds_the_other_parts_beside_the_result(folder_of, small_data, tmp_path):
    folder, trained = folder_of("qwen2_vl"), tmp_path / "trained"
    assert train(folder, small_data, trained, max_steps=2, save_strategy="steps", save_steps=1) == 0
    merge_ranks(RankOptions(trained / "checkpoint-1", tmp_path / "merged", save_format="hf"))
    check_whole(tmp_path / "merged", folder)


def test_a_second_training_keeps_the_other_parts(folder_of, small_data, tmp_path):
    folder, first, second = folder_of("qwen2_vl"), tmp_path / "first", tmp_path / "second"
    assert train(folder, small_data, first, max_steps=1) == 0
    assert train(first, small_data, second, max_steps=1, text_only=False) == 0
    merge_ranks(RankOptions(second, tmp_path / "merged", save_format="hf"))
    check_whole(tmp_path / "merged", folder)


TEXT_LAYERS = re.compile(r"language_model\..*(q|k|v|o|gate|up)_proj\.weight$")


@pytest.mark.parametrize("kind", ["nf4", "awq"])
def test_a_quantised_text_part_is_trained_over_and_merged_into_what_it_stands_for(
    kind, folder_of, small_data, tmp_path
):
    folder, adapter = (
        write_quantised(folder_of("llava"), tmp_path / "packed", kind, TEXT_LAYERS),
        tmp_path / "adapter",
    )
    assert train(folder, small_data, adapter, lora=True, lora_rank=2) == 0
    merge(MergeOptions(folder, (adapter,), tmp_path / "merged", into="dequantised"))
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert written.keys() == names_of(folder_of("llava"))
    for name, array in other_tensors(folder_of("llava")).items():
        np.testing.assert_array_equal(written[name], array)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merge(MergeOptions(tmp_path / "packed-values", (adapter,), tmp_path / "wanted"))
    wanted = folder_logits(tmp_path / "wanted")
    assert np.abs(wanted - folder_logits(tmp_path / "packed-values")).max() > 5e-3
    # The result is rounded to float16, as the values of the packed weights are.
    np.testing.assert_allclose(folder_logits(tmp_path / "merged"), wanted, atol=3e-4)


def test_other_parts_that_are_quantised_too_are_named_before_a_merge(folder_of, small_data, tmp_path):
    every = re.compile(r"(language_model\..*(q|k|v|o)_proj|multi_modal_projector.*)\.weight$")
    folder, adapter = (
        write_quantised(folder_of("llava"), tmp_path / "packed", "int8", every),
        tmp_path / "adapter",
    )
    assert train(folder, small_data, adapter, lora=True, lora_rank=2, max_steps=1) == 0
    with pytest.raises(UserError, match=r"multi_modal_projector.*is quantised.*model that it was made from"):
        merge(MergeOptions(folder, (adapter,), tmp_path / "merged", into="dequantised"))
