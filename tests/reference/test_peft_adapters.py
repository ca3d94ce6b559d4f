"""Adapters that peft trained and saved, used here without a merge: the same logits, and trained further."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.merge.lora_writing import folder_logits, logits, write_base
from tests.reference.exchange import (
    FAMILIES,
    NEEDS_PEFT,
    check_close,
    load_theirs,
    their_logits,
    train_peft,
    write_their_config,
)

pytestmark = NEEDS_PEFT

SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.down_proj": 7},
        "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 3},
    },
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms": {"modules_to_save": ["input_layernorm"]},
    "one layer": {"layers_to_transform": [1]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 3}},
    "dora": {"use_dora": True, "rank_pattern": {"q_proj": 2}},
}


def load_here(base, adapter):
    from finetune.adapters.lora import load_lora
    from finetune.models.loading import load_model
    from finetune.models.resolve import resolve_model

    return load_lora(load_model(resolve_model(base), dtype="float32"), adapter)


def check_both_ways(base, adapter, expected, tmp_path):
    """The loaded adapter's logits are peft's; so are they when it has been saved and loaded again."""
    from finetune.adapters.files import save_adapter

    adapted = load_here(base, adapter)
    check_close(logits(adapted), expected)
    assert np.abs(folder_logits(base) - expected).max() > 0.01, "worth comparing"
    (tmp_path / "again").mkdir()
    save_adapter(adapted, tmp_path / "again")
    check_close(logits(load_here(base, tmp_path / "again")), expected)


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_are_those_of_peft(settings, tmp_path):
    base = write_base(tmp_path / "base", "llama", hugging_face=True)
    expected = their_logits(train_peft(base, tmp_path / "adapter", **SETTINGS[settings]))
    check_both_ways(base, tmp_path / "adapter", expected, tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_on_a_base_in_paddlenlps_form(name, tmp_path):
    base = write_base(tmp_path / "base", name)
    theirs = write_base(tmp_path / "theirs", name, hugging_face=True)
    write_their_config(theirs, name, json.loads((theirs / "config.json").read_text()))
    expected = their_logits(train_peft(theirs, tmp_path / "adapter", target_modules="all-linear"))
    check_both_ways(base, tmp_path / "adapter", expected, tmp_path)


def test_pickled_weights(tmp_path):
    base = write_base(tmp_path / "base", "llama", hugging_face=True)
    model = train_peft(base, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert (tmp_path / "pickled" / "adapter_model.bin").is_file()
    check_close(logits(load_here(base, tmp_path / "pickled")), their_logits(model))


CURVES = {
    "plain": {},
    "alphas": {"alpha_pattern": {"q_proj": 24, r"layers\.1\.mlp\.up_proj": 1}},
    "ranks": {"rank_pattern": {"q_proj": 2, "down_proj": 9}, "alpha_pattern": {"q_proj": 3}, "modules_to_save": ["lm_head"]},
    "rslora": SETTINGS["patterns"],
    "embedding": {"target_modules": ["up_proj", "embed_tokens"]},
}  # fmt: skip
NUM_STEPS = 20


def batches():
    generator = np.random.default_rng(5)
    return [generator.integers(3, 90, (2, 12)) for _ in range(NUM_STEPS)]


def their_curve(model):
    import torch

    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    losses = []
    for ids in batches():
        loss = model(input_ids=torch.tensor(ids), labels=torch.tensor(ids)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def our_curve(model):
    import paddle

    trained = [each for each in model.parameters() if not each.stop_gradient]
    optimizer = paddle.optimizer.AdamW(0.01, parameters=trained, weight_decay=0.1)
    losses = []
    for ids in batches():
        scores = model(input_ids=paddle.to_tensor(ids))
        scores = scores[0] if isinstance(scores, tuple) else scores
        loss = paddle.nn.functional.cross_entropy(
            scores[:, :-1].reshape([-1, scores.shape[-1]]), paddle.to_tensor(ids[:, 1:].reshape(-1))
        )
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("settings", CURVES)
def test_training_goes_on_as_that_of_peft(settings, tmp_path):
    """Also with ranks and factors of single layers; what is saved then is the same adapter here and in peft."""
    import peft

    from finetune.adapters.files import save_adapter
    from finetune.merge.lora import MergeOptions, export_peft

    base = write_base(tmp_path / "base", "llama", hugging_face=True)
    theirs = train_peft(base, tmp_path / "adapter", **CURVES[settings])
    ours = load_here(base, tmp_path / "adapter")
    found, expected = our_curve(ours), their_curve(theirs)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected[0] - min(expected) > 0.1, "it learned"
    expected_logits = logits(ours)
    np.testing.assert_allclose(expected_logits, their_logits(theirs), atol=1e-3)  # Adam enlarges rounding
    (tmp_path / "again").mkdir()
    save_adapter(ours, tmp_path / "again")
    check_close(logits(load_here(base, tmp_path / "again")), expected_logits)
    export_peft(MergeOptions(base, (tmp_path / "again",), tmp_path / "exported", save_format="peft"))
    exported = peft.PeftModel.from_pretrained(load_theirs(base), tmp_path / "exported").eval()
    check_close(their_logits(exported), expected_logits)
    config = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert bool(config["alpha_pattern"]) == ("alpha_pattern" in CURVES[settings])


def test_parted_tied_layers_are_refused(tmp_path):
    from finetune.errors import UserError

    base = write_base(tmp_path / "base", "qwen2", hugging_face=True, tie_word_embeddings=True)
    train_peft(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    with pytest.raises(UserError, match="embedding and output layer of this base are one tensor"):
        load_here(base, tmp_path / "adapter")
