"""Training and generation see the same model: masks, positions, caches, prefixes, adapters, end tokens."""

import numpy as np
import paddle
import pytest

from finetune.adapters.files import save_adapter
from finetune.adapters.prefix import load_prefix
from finetune.models.layers import find_layer
from finetune.models.tiny.checkpoint import build_tiny
from finetune.tokenizers.encoder import FamilyEncoder
from finetune.tokenizers.loading import load_tokenizer
from finetune.training.evaluation import GenerationEvaluation, GenerationSettings
from finetune.training.loss import LabelPositions, logits_of, token_loss_sum
from tests.families import decoding
from tests.families.cases import FACTS

NUM_LAYERS = 2
NO_TOKEN = 10**6
"""An end that never comes."""


@pytest.fixture(scope="module")
def folder(family, corpus, tmp_path_factory):
    return build_tiny(
        family.name, tmp_path_factory.mktemp("behaviour") / family.name,
        **{"corpus": corpus, "vocab_size": 330, "num_layers": NUM_LAYERS, "hidden_size": 32} | FACTS[family.name].small,
    )  # fmt: skip


@pytest.fixture
def model(folder):
    return decoding.load_sharp(folder)


ADAPTED = {
    "plain": lambda model, family: model,
    "prefix": decoding.with_prefix,
    "lora": decoding.with_moved_lora,
}


@pytest.fixture(params=["plain", "prefix"])
def tuned(request, model, family):
    """The model as it is, and with a prefix."""
    return ADAPTED[request.param](model, family)


def with_every_adapter(test):
    """Runs a test with LoRA, too."""
    return pytest.mark.parametrize("tuned", ADAPTED, indirect=True)(test)


def test_padding_on_the_right_needs_no_mask(tuned, family):
    rows = decoding.family_rows(family, [9, 5, 2])
    ids, mask = decoding.right_padded(rows)
    plain, masked = decoding.logits(tuned, ids), decoding.logits(tuned, ids, attention_mask=mask)
    for place, row in enumerate(rows):
        alone = decoding.logits(tuned, row[None])[0]
        np.testing.assert_allclose(plain[place, : len(row)], alone, atol=2e-5)
        np.testing.assert_allclose(masked[place, : len(row)], alone, atol=2e-5)
    assert np.abs(plain[0, :2] - plain[2, :2]).max() > 0.1


@with_every_adapter
def test_packed_rows_equal_separate_rows(tuned, family):
    rows = decoding.family_rows(family, [6, 3, 5])
    batch = decoding.packed(rows)
    together = decoding.logits(tuned, batch.pop("ids"), **batch)[0]
    separate = np.concatenate([decoding.logits(tuned, row[None])[0] for row in rows])
    np.testing.assert_allclose(together, separate, atol=2e-5)


def loss_and_gradients(model, ids, labels, **inputs):
    labels = paddle.to_tensor(labels)
    tensors = {name: paddle.to_tensor(array) for name, array in inputs.items()}
    loss = token_loss_sum(logits_of(model(input_ids=paddle.to_tensor(ids), **tensors)), labels)
    loss.backward()
    found = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    return float(loss), found


@with_every_adapter
def test_packed_rows_have_the_loss_and_gradients_of_separate_rows(tuned, family):
    rows = decoding.family_rows(family, [6, 3, 5])
    targets = decoding.family_rows(family, [6, 3, 5], seed=1)
    batch = decoding.packed(rows)
    packed_loss, packed = loss_and_gradients(tuned, batch.pop("ids"), np.concatenate(targets)[None], **batch)
    parts = [
        loss_and_gradients(tuned, row[None], target[None]) for row, target in zip(rows, targets, strict=True)
    ]
    assert packed_loss == pytest.approx(sum(loss for loss, _ in parts), rel=1e-5)
    assert packed
    for name, gradient in packed.items():
        expected = sum(gradients[name] for _, gradients in parts)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-5 * max(1, np.abs(expected).max()))


def test_changing_one_packed_sample_changes_no_other(tuned, family):
    rows = decoding.family_rows(family, [6, 3, 5])
    changed = [rows[0], rows[1][::-1].copy() + 1, rows[2]]
    before, after = (
        decoding.logits(tuned, batch.pop("ids"), **batch)[0]
        for batch in (decoding.packed(rows), decoding.packed(changed))
    )
    difference = np.abs(before - after).max(axis=-1)
    assert difference[6:9].min() > 1e-3
    assert difference[:6].max() < 1e-6
    assert difference[9:].max() < 1e-6


def test_label_positions_leave_loss_and_gradients_as_they_are(tuned, family):
    ids, mask = decoding.right_padded(decoding.family_rows(family, [7, 4]))
    labels = decoding.some_labels(ids, mask)
    base = getattr(tuned, "model", tuned)
    positions = LabelPositions(find_layer(base, family.head_module), length_first=family.hidden_length_first)
    trained = [parameter for parameter in tuned.parameters() if not parameter.stop_gradient]

    def gradients(loss):
        loss.backward()
        found = [parameter.grad.numpy().copy() for parameter in trained if parameter.grad is not None]
        for parameter in trained:
            parameter.clear_gradient()
        return float(loss), found

    tuned.train()
    plain_loss, plain = gradients(
        token_loss_sum(logits_of(tuned(input_ids=paddle.to_tensor(ids))), paddle.to_tensor(labels))
    )
    with positions.only(labels) as kept:
        output = logits_of(tuned(input_ids=paddle.to_tensor(ids)))
        assert output.shape[:-1] == kept.shape == [7]
        loss, gathered = gradients(token_loss_sum(output, kept))
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert len(plain) == len(gathered) > 0
    for one, other in zip(plain, gathered, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * np.abs(one).max() + 1e-6)


def test_lora_adapts_the_linear_layers_and_nothing_else(model, family):
    adapted = decoding.with_lora(model, family)
    names = {
        name.removesuffix(".lora_A") for name, _ in adapted.named_parameters() if name.endswith("lora_A")
    }
    layers = {name.split(".", 4)[-1] for name in names}
    facts = FACTS[family.name]
    assert len(names) == NUM_LAYERS * (len(facts.lora_layers) + 3 * (facts.feed_forwards - 1))
    assert all(any(layer.endswith(known) for known in facts.lora_layers) for layer in layers)
    trained = [name for name, parameter in adapted.named_parameters() if not parameter.stop_gradient]
    assert trained and all("lora_" in name for name in trained)


def test_neftune_and_the_head_find_their_layers(model, family):
    embedding = find_layer(model, family.embedding_module)
    ids = paddle.to_tensor(decoding.family_rows(family, [4])[0][None])
    assert embedding(ids).shape == [1, 4, 32]
    seen = []
    find_layer(model, family.head_module).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape)
    )
    model(input_ids=ids)
    assert len(seen) == 1 and seen[0][-1] == 32


@with_every_adapter
def test_cached_steps_give_the_logits_of_one_pass(tuned, family):
    ids = np.stack(decoding.family_rows(family, [11, 11]))
    steps = decoding.stepwise_logits(tuned, ids, prompt_length=4)
    np.testing.assert_allclose(steps, decoding.logits(tuned, ids)[:, 3:], atol=2e-5)


def _evaluate(tuned, folder, family, rows, *, batch_size, eos=None, max_new_tokens=6):
    encoder = FamilyEncoder(load_tokenizer(folder), family)
    encoder.eos_token_id = encoder.eos_token_id if eos is None else eos
    settings = GenerationSettings(max_new_tokens=max_new_tokens)
    evaluation = GenerationEvaluation(
        decoding.as_prompts(rows), batch_size=batch_size, encoder=encoder, settings=settings, seed=0
    )
    answers = {}
    for indices, batch in evaluation._generate(tuned):
        answers |= dict(zip(indices.tolist(), batch, strict=True))
    return [answers[place] for place in range(len(rows))]


def test_a_padded_batch_gives_each_row_its_own_answer(tuned, folder, family):
    rows = decoding.family_rows(family, [8, 3, 5])
    expected = [decoding.greedy_without_cache(tuned, row, 6) for row in rows]
    found = _evaluate(tuned, folder, family, rows, batch_size=3, eos=NO_TOKEN)
    assert found == expected
    assert len({tuple(answer) for answer in found}) == 3


def test_an_answer_stops_at_the_end_token(tuned, folder, family):
    rows = decoding.family_rows(family, [8, 3])
    free = _evaluate(tuned, folder, family, rows, batch_size=2, eos=NO_TOKEN, max_new_tokens=8)
    end = free[0][3]
    found = _evaluate(tuned, folder, family, rows, batch_size=2, eos=end, max_new_tokens=8)
    for answer, whole in zip(found, free, strict=True):
        assert answer == (whole[: whole.index(end)] if end in whole else whole)
    assert len(found[0]) <= 3


def _prefix_gradient(tuned, ids):
    tuned.train()
    weights = next(iter(tuned.prefix_encoder.parameters()))
    logits_of(tuned(input_ids=paddle.to_tensor(ids))).square().mean().backward()
    gradient = weights.grad.numpy().copy()
    weights.clear_gradient()
    return gradient


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
def test_gradients_reach_the_prefix_only(folder, family, recompute):
    ids = np.stack(decoding.family_rows(family, [6, 6]))
    tuned = decoding.with_prefix(decoding.load_sharp(folder), family)
    expected = _prefix_gradient(tuned, ids)
    assert expected.shape == (decoding.NUM_PREFIX_TOKENS, expected.size // decoding.NUM_PREFIX_TOKENS)
    # Each layer's keys and each layer's values, of every group and prefix token, are learned.
    geometry = family.prefix_geometry(tuned.model.config)
    parts = expected.reshape(len(expected), 2 * NUM_LAYERS, geometry.num_kv_heads, geometry.head_dim)
    assert (np.abs(parts).max(axis=-1) > 0).all()
    assert all(parameter.stop_gradient and parameter.grad is None for parameter in tuned.model.parameters())
    if recompute:
        tuned.model.config.recompute = True
        for layer in tuned.model.sublayers():
            if hasattr(layer, "enable_recompute"):
                layer.enable_recompute = True
        np.testing.assert_allclose(_prefix_gradient(tuned, ids), expected, atol=1e-6)


def test_a_saved_prefix_gives_the_same_logits(folder, family, model, tmp_path):
    ids = np.stack(decoding.family_rows(family, [6, 6]))
    tuned = decoding.with_prefix(model, family)
    without = decoding.logits(decoding.load_sharp(folder), ids)
    expected = decoding.logits(tuned, ids)
    assert np.abs(expected - without).max() > 0.1
    save_adapter(tuned, tmp_path)
    loaded = load_prefix(decoding.load_sharp(folder), tmp_path, family=family)
    np.testing.assert_array_equal(decoding.logits(loaded, ids), expected)
