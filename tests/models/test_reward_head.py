"""Reward models of every family: values behind the final norm, alike in rows of every kind, saved and loaded."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import paddle
import pytest

from finetune.checkpoints.model_weights import save_model_weights
from finetune.checkpoints.writers import WholeTensorWriter
from finetune.data.batches.reward_rows import RewardRows
from finetune.data.packing.packing import pack
from finetune.data.preference.sample import PreferenceSample
from finetune.errors import UserError
from finetune.families.family import families, get_family
from finetune.models.layers import find_layer
from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.models.reward_head import (
    REWARD_WEIGHT,
    is_reward_config,
    is_reward_model,
    reward_architecture,
    reward_config,
)
from finetune.models.tiny.checkpoint import build_tiny
from finetune.storage.checkpoints import Checkpoint
from finetune.training.loss import LabelPositions, logits_of
from finetune.training.preference.reward_objective import answer_rewards
from tests.families.cases import CASES as FAMILY_CASES

# Of a family with two rows the last one: keys and values in fewer heads.
OPTIONS = {row.name: row.options for row in FAMILY_CASES}
SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 400, "max_length": 96}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny causal model of a family, built once."""
    root, found = tmp_path_factory.mktemp("rewards"), {}

    def build(family: str):
        if family not in found:
            found[family] = build_tiny(family, root / family, **SHAPE | OPTIONS.get(family, {}))
        return found[family]

    return build


def resolve_reward(folder):
    resolved = resolve_model(folder)
    return replace(resolved, config=reward_config(resolved.config, resolved.family))


def make_samples(num: int = 5) -> list[PreferenceSample]:
    random = np.random.default_rng(3)
    draw = lambda low, high: random.integers(5, 300, random.integers(low, high)).astype(np.int32)  # noqa: E731
    return [PreferenceSample(draw(2, 9), (draw(1, 8), draw(1, 8))) for _ in range(num)]


def rewards_of(model, family, rows) -> np.ndarray:
    """Values of all answers [samples, 2], in their order."""
    positions = LabelPositions(find_layer(model, "score"), length_first=family.hidden_length_first)
    table = np.zeros((len(rows.samples), 2), np.float32)
    batch = rows.batch(np.arange(len(rows)))
    with paddle.no_grad(), positions.only(batch.labels):
        values = logits_of(model(**batch.tensors()))
    table[batch.sample_indices] = answer_rewards(batch, values).numpy().reshape([-1, 2])
    return table


@pytest.mark.parametrize("name", sorted(families()))
def test_rows_of_every_kind_give_what_single_texts_give(folders, name):
    family, resolved = get_family(name), resolve_reward(folders(name))
    samples = make_samples()
    made = {
        "separate": {"mask": None},
        "shared": {"mask": "block"},
        "packed": {"mask": "block", "packing": pack(RewardRows(samples, pad_token_id=0).lengths, 60, seed=2)},
    }
    assert len(made["packed"]["packing"]) < len(samples)
    found = {}
    for kind, options in made.items():
        model = load_model(resolved, dtype="float32", head_seed=5)  # hooks of one kind each
        found[kind] = rewards_of(model, family, RewardRows(samples, pad_token_id=0, **options))
    model = load_model(resolved, dtype="float32", head_seed=5)
    axis = 0 if family.hidden_length_first else 1
    for number, sample in enumerate(samples):
        for place, answer in enumerate(sample.answers):
            ids = paddle.to_tensor(np.concatenate([sample.prompt_ids, answer]).astype(np.int64)[None])
            with paddle.no_grad():
                values = logits_of(model(input_ids=ids))
            assert values.shape[axis] == ids.shape[1] and values.shape[-1] == 1
            alone = float(values.numpy().take(-1, axis=axis).item())
            for kind in made:
                assert found[kind][number, place] == pytest.approx(alone, abs=2e-5), kind
    assert found["shared"].std() > 1e-3, "all values are alike, so equality says nothing"


@pytest.mark.parametrize("name", sorted(families()))
def test_a_saved_reward_model_is_loaded_again(folders, name, tmp_path):
    family, resolved = get_family(name), resolve_reward(folders(name))
    model = load_model(resolved, dtype="float32", head_seed=5)
    save_model_weights(model, tmp_path, WholeTensorWriter())
    names = Checkpoint(tmp_path).names
    assert names[REWARD_WEIGHT][1] == 1
    assert not [each for each in names if family.head_module in each.split(".")]
    config = json.loads((tmp_path / "config.json").read_text())
    assert is_reward_config(config) and config["id2label"] == {"0": "LABEL_0"}
    again = load_model(resolve_model(tmp_path), dtype="float32", head_seed=6)
    assert is_reward_model(again)
    ids = paddle.to_tensor(np.arange(5, 25).reshape(2, 10))
    np.testing.assert_array_equal(
        logits_of(again(input_ids=ids)).numpy(), logits_of(model(input_ids=ids)).numpy()
    )


def test_the_head_reads_the_states_behind_the_final_norm(folders):
    model = load_model(resolve_reward(folders("llama")), dtype="float32", head_seed=5)
    ids = paddle.to_tensor(np.arange(5, 15)[None])
    hidden = model.llama(ids)[0]
    expected = hidden.numpy() @ model.score.weight.numpy()
    np.testing.assert_allclose(logits_of(model(input_ids=ids)).numpy(), expected, atol=1e-6)


def test_the_draw_depends_on_the_seed_alone(folders):
    resolved = resolve_reward(folders("qwen2"))
    one, same, other = (
        load_model(resolved, dtype="float32", head_seed=seed).score.weight.numpy() for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    assert one.std() == pytest.approx(0.02, rel=0.5)


def test_the_class_is_named_as_transformers_names_it():
    assert {name: reward_architecture(get_family(name)) for name in ("llama", "qwen2", "opt", "bloom")} == {
        "llama": "LlamaForSequenceClassification",
        "qwen2": "Qwen2ForSequenceClassification",
        "opt": "OPTForSequenceClassification",
        "bloom": "BloomForSequenceClassification",
    }


def test_a_classifier_of_several_labels_is_refused():
    config = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    with pytest.raises(UserError, match="with 2 labels, but a reward model has one"):
        reward_config(config, get_family("llama"))


@pytest.mark.parametrize("name", sorted(families()))
def test_the_configuration_survives_both_forms(folders, name):
    from finetune.merge.hf_out import hugging_face_config
    from finetune.models.hf_names import is_tied, paddle_config

    family, config = get_family(name), json.loads((folders(name) / "config.json").read_text())
    theirs = hugging_face_config(reward_config(config, family), family, dtype="float32")
    ours = paddle_config(theirs, family, dtype="float32")  # raises for what the family does not have
    for each in (theirs, ours):
        assert each["architectures"] == [reward_architecture(family)]
        assert reward_config(each, family) == each and not is_tied(each, family)
