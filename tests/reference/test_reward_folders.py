"""Reward models in the hands of transformers and peft, and theirs here: the same values.

transformers reads a value at the last token of a row that is no padding.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune.adapters.adapter_folder import has_reward_head
from finetune.merge.lora import MergeOptions, export_peft, merge
from finetune.merge.tensor_parallel import MergeOptions as RankOptions
from finetune.merge.tensor_parallel import merge as merge_ranks
from tests.reference.exchange import HAS_PEFT, REQUIRED, check_close

pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not HAS_PEFT and not REQUIRED, reason="PyTorch is not installed; make parity installs it"
    ),
]

FAMILIES = ("llama", "qwen2", "qwen3", "phi3", "bloom", "opt", "mistral", "gemma")
PADDING = 1
LENGTHS = (12, 7)


def rows() -> np.ndarray:
    """Token ids [2, 12], the second row padded on its right."""
    ids = np.random.default_rng(1).integers(5, 90, (2, max(LENGTHS)))
    ids[1, LENGTHS[1] :] = PADDING
    return ids


def load_here(folder: Path, *, with_head: bool = False):
    from finetune.models.loading import load_model
    from finetune.models.resolve import resolve_model
    from finetune.models.reward_head import reward_config

    resolved = resolve_model(folder)
    if with_head:
        resolved = replace(resolved, config=reward_config(resolved.config, resolved.family))
    return load_model(resolved, dtype="float32", head_seed=4)


def our_values(model) -> np.ndarray:
    import paddle

    from finetune.training.loss import logits_of

    model.eval()
    with paddle.no_grad():
        values = logits_of(model(input_ids=paddle.to_tensor(rows()))).numpy()
    return np.array([values[row, length - 1, 0] for row, length in enumerate(LENGTHS)])


def load_theirs(folder: Path):
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, torch_dtype=torch.float32)
    assert model.config.num_labels == 1 and type(model).__name__.endswith("ForSequenceClassification")
    return model.eval()


def their_values(model) -> np.ndarray:
    import torch

    mask = torch.tensor([[column < length for column in range(max(LENGTHS))] for length in LENGTHS]).long()
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(rows()), attention_mask=mask).logits[:, 0].numpy()


def write_reward_model(name: str, folder: Path) -> Path:
    """A reward model as a run leaves it: a tiny base with a head that is drawn."""
    from finetune.checkpoints.model_weights import save_model_weights
    from finetune.checkpoints.writers import WholeTensorWriter
    from tests.merge.lora_writing import write_base

    model = load_here(write_base(folder.parent / f"{name}_base", name), with_head=True)
    model.config.pad_token_id = PADDING
    folder.mkdir()
    save_model_weights(model, folder, WholeTensorWriter())
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_the_values_of_a_converted_folder(name, tmp_path):
    trained = write_reward_model(name, tmp_path / "trained")
    merge_ranks(RankOptions(trained, tmp_path / "theirs", save_format="hf"))
    expected = our_values(load_here(trained))
    assert abs(expected[0] - expected[1]) > 1e-3, "worth comparing"
    model = load_theirs(tmp_path / "theirs")
    check_close(their_values(model), expected)
    model.save_pretrained(tmp_path / "again")  # and theirs is read here
    check_close(our_values(load_here(tmp_path / "again")), expected)


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_an_adapter_of_peft_is_read_merged_and_written(name, tmp_path):
    import peft
    import torch

    from finetune.adapters.lora import load_lora
    from tests.merge.lora_writing import write_base

    write_base(tmp_path / "ours", name)
    merge_ranks(RankOptions(tmp_path / "ours", tmp_path / "base", save_format="hf"))
    (base_config := tmp_path / "base" / "config.json").write_text(
        json.dumps(json.loads(base_config.read_text()) | {"pad_token_id": PADDING, "num_labels": 1})
    )
    torch.manual_seed(0)
    settings = {"task_type": "SEQ_CLS", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj"]}
    theirs = peft.get_peft_model(load_theirs(tmp_path / "base"), peft.LoraConfig(**settings))
    for parameter in (each for each in theirs.parameters() if each.requires_grad):
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    expected = their_values(theirs)

    assert has_reward_head(tmp_path / "adapter")
    check_close(
        our_values(load_lora(load_here(tmp_path / "base", with_head=True), tmp_path / "adapter")), expected
    )
    merge(MergeOptions(tmp_path / "base", (tmp_path / "adapter",), tmp_path / "merged", verify=True))
    check_close(their_values(load_theirs(tmp_path / "merged")), expected)
    check_close(our_values(load_here(tmp_path / "merged")), expected)

    # Read, written in our own form, and exported for peft again.
    from finetune.adapters.files import save_adapter

    ours = load_lora(load_here(tmp_path / "base", with_head=True), tmp_path / "adapter")
    (tmp_path / "saved").mkdir()
    save_adapter(ours, tmp_path / "saved")
    export_peft(MergeOptions(tmp_path / "base", (tmp_path / "saved",), tmp_path / "exported"))
    again = peft.PeftModel.from_pretrained(load_theirs(tmp_path / "base"), tmp_path / "exported").eval()
    check_close(their_values(again), expected)
