"""What PaddleNLP's OPT gets wrong, and that the layers in front of it put it right."""

import numpy as np
import paddle
import pytest
from paddlenlp.transformers.opt import modeling

from finetune.errors import UserError
from finetune.families.family import get_family
from finetune.families.opt.layers import OPTForCausalLM
from finetune.models.loading import build_config, load_model
from finetune.models.resolve import resolve_model
from finetune.models.tiny.checkpoint import build_tiny
from tests.families.decoding import (
    WEIGHT_SCALE,
    load_sharp,
    logits,
    packed,
    random_rows,
    right_padded,
    with_prefix,
)


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory):
    target = tmp_path_factory.mktemp("opt") / "model"
    return build_tiny("opt", target, corpus=corpus, vocab_size=330, num_layers=2, hidden_size=32)


def test_only_the_random_output_layer_of_paddlenlp_differs(folder):
    ours = load_model(resolve_model(folder), dtype="float32")
    theirs = modeling.OPTForCausalLM(
        build_config(resolve_model(folder), modeling.OPTForCausalLM, dtype="float32")
    )
    missing, unexpected = theirs.set_state_dict(
        {name: value for name, value in ours.state_dict().items() if not name.startswith("lm_head")}
    )
    assert (missing, unexpected) == (["lm_head.decoder_weight"], [])
    ids = np.stack(random_rows([8, 8]))
    expected = logits(ours, ids)
    assert np.abs(logits(theirs, ids) - expected).max() > expected.std()
    theirs.lm_head.decoder_weight.set_value(theirs.opt.embeddings.word_embeddings.weight)
    np.testing.assert_allclose(logits(theirs, ids), expected, atol=1e-6)


def test_paddlenlp_refuses_a_block_mask(folder):
    theirs = modeling.OPTForCausalLM(
        build_config(resolve_model(folder), modeling.OPTForCausalLM, dtype="float32")
    )
    batch = packed(random_rows([3, 4]))
    batch.pop("position_ids")
    with pytest.raises(Exception, match=r"shape|rank|dimension|Broadcast"):
        logits(theirs, batch.pop("ids"), **batch)


def test_padding_on_the_left_moves_no_position(folder):
    model = load_sharp(folder)
    rows = random_rows([7, 4])
    ids, mask = right_padded(rows)
    shift = [row.size - ids.shape[1] for row in rows]
    left_ids = np.stack([np.roll(row, -places) for row, places in zip(ids, shift, strict=True)])
    left_mask = np.stack([np.roll(row, -places) for row, places in zip(mask, shift, strict=True)])
    found = logits(model, left_ids, attention_mask=left_mask)
    for place, row in enumerate(rows):
        np.testing.assert_allclose(found[place, -len(row) :], logits(model, row[None])[0], atol=2e-5)


def test_a_prefix_takes_no_position_away(folder):
    """The longest text the position table allows fits behind a prefix."""
    model = load_sharp(folder)
    longest = np.stack(random_rows([model.config.max_position_embeddings]))
    assert np.isfinite(logits(with_prefix(model, get_family("opt")), longest)).all()


def test_a_text_longer_than_the_position_table_is_an_error(folder):
    model = load_sharp(folder)
    longest = model.config.max_position_embeddings
    with pytest.raises(
        UserError, match=rf"has {longest + 1} tokens but this model has only {longest} positions"
    ):
        logits(model, np.stack(random_rows([longest + 1])))


def test_cached_steps_without_positions_continue_behind_the_cache(folder):
    model = load_sharp(folder)
    ids = np.stack(random_rows([6]))
    with paddle.no_grad():
        _, cache = model(input_ids=paddle.to_tensor(ids[:, :4]), use_cache=True)
        rest, _ = model(input_ids=paddle.to_tensor(ids[:, 4:]), cache=cache, use_cache=True)
    np.testing.assert_allclose(rest.numpy(), logits(model, ids)[:, 4:], atol=2e-5)


def test_recomputation_changes_no_gradient_and_runs_layers_twice(folder):
    model = load_sharp(folder)
    model.train()
    calls = []
    model.opt.decoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    weight = model.opt.decoder.layers[0].linear1.weight
    found = []
    for model.opt.enable_recompute in (False, True):
        calls.clear()
        model(input_ids=paddle.to_tensor(np.stack(random_rows([6])))).square().mean().backward()
        found.append(weight.grad.numpy().copy())
        model.clear_gradients()
        assert len(calls) == (2 if model.opt.enable_recompute else 1)
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    assert np.abs(found[0]).max() > 1e-6 * WEIGHT_SCALE


def test_a_saved_model_is_the_same_model(folder, tmp_path):
    model = load_sharp(folder)
    ids = np.stack(random_rows([6]))
    model.save_pretrained(str(tmp_path), safe_serialization=True)
    loaded = load_model(resolve_model(tmp_path), dtype="float32")
    assert isinstance(loaded, OPTForCausalLM)
    np.testing.assert_array_equal(logits(loaded, ids), logits(model, ids))
