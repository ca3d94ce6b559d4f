"""Layers of experts: which get gradients, and the loss that spreads tokens over them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from finetune.errors import UserError
from finetune.families.expert_config import expert_facts
from finetune.families.expert_facts import ExpertFacts
from finetune.families.experts import ExpertFeedForward
from finetune.families.family import get_family
from finetune.families.head_facts import HeadFacts
from finetune.processes.groups import ProcessGroups
from finetune.run.experts import check_balance
from finetune.training.expert_balance import ExpertBalance

HIDDEN, EXPERTS, CHOSEN = 8, 5, 2
CONFIG = SimpleNamespace(
    hidden_size=HIDDEN,
    intermediate_size=12,
    sequence_parallel=False,
    fuse_attention_ffn=False,
    tensor_parallel_degree=1,
)


def build_layer(**more) -> ExpertFeedForward:
    paddle.seed(3)
    facts = ExpertFacts(num_routed=EXPERTS, num_chosen=CHOSEN, inner_size=6, normalised=True, **more)
    return ExpertFeedForward(CONFIG, HeadFacts(experts=facts))


def tokens(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, HIDDEN)).astype(np.float32)


@pytest.mark.parametrize("shared_size", [None, 10])
def test_each_token_gets_the_shares_of_its_experts(shared_size):
    layer = build_layer(shared_size=shared_size)
    x = paddle.to_tensor(tokens(7))
    found = layer(x.unsqueeze(0))[0].numpy()
    probabilities = paddle.nn.functional.softmax(layer.gate(x), axis=-1).numpy()
    for row, token in enumerate(x):
        best = np.argsort(-probabilities[row])[:CHOSEN]
        shares = probabilities[row][best] / probabilities[row][best].sum()
        expected = sum(
            share * layer.experts[int(each)](token[None])[0].numpy()
            for share, each in zip(shares, best, strict=True)
        )
        if shared_size:
            open_share = paddle.nn.functional.sigmoid(layer.shared_expert_gate(token[None])).numpy()[0]
            expected = expected + open_share * layer.shared_expert(token[None])[0].numpy()
        np.testing.assert_allclose(found[row], expected, atol=1e-6)


def test_experts_without_tokens_get_a_gradient_of_zero():
    layer = build_layer()
    gate = np.zeros((HIDDEN, EXPERTS), np.float32)
    gate[0] = [4, 3, 2, 1, 0]
    layer.gate.weight.set_value(gate)
    x = tokens(6)
    x[:, 0] = np.abs(x[:, 0])  # all prefer the first two
    layer(paddle.to_tensor(x)).square().sum().backward()
    for number, expert in enumerate(layer.experts):
        for weight in expert.parameters():
            assert weight.grad is not None
            assert (np.abs(weight.grad.numpy()).max() > 0) == (number < CHOSEN)


def balance_and_gradient(layers: list, rows: list, micro_batches: list) -> tuple[float, list[np.ndarray]]:
    """The loss, and the gradients of the routers, of rows cut into micro-batches."""
    model = paddle.nn.LayerList(layers)
    balance = ExpertBalance(model, EXPERTS, 0.3, ProcessGroups())
    length = max(map(len, rows)) + 2

    def run(numbers, weight) -> list:
        padded = np.stack([np.concatenate([rows[n], tokens(length - len(rows[n]))]) for n in numbers])
        x = paddle.to_tensor(padded)
        with balance.active([[(len(rows[n]), n)] for n in numbers], length, weight):
            return [layer(x) for layer in layers]

    with balance.counting(), paddle.no_grad():
        for numbers, weight in micro_batches:
            run(numbers, weight)
    for numbers, weight in micro_batches:
        sum(each.sum() for each in run(numbers, weight)).multiply(paddle.zeros([])).backward()
    gradients = [layer.gate.weight.grad.numpy() for layer in layers]
    model.clear_gradients()
    return float(balance.loss), gradients


def test_the_balancing_loss_is_that_of_the_global_batch_however_it_is_cut():
    """Against the formula, with autograd: padding and micro-batches that only keep ranks in step count nothing."""
    layers = [build_layer(), build_layer()]
    layers[1].gate.weight.set_value(layers[0].gate.weight.flip(0) * 2)
    rows = [tokens(size) for size in (3, 7, 5)]
    real = paddle.to_tensor(np.concatenate(rows))
    probabilities = paddle.concat(
        [paddle.nn.functional.softmax(layer.gate(real), axis=-1) for layer in layers]
    )
    choices = paddle.nn.functional.one_hot(probabilities.topk(CHOSEN)[1], EXPERTS).sum(1)
    expected = 0.3 * EXPERTS * (choices.mean(0) * probabilities.mean(0)).sum()
    expected.backward()
    gradients = [layer.gate.weight.grad.numpy() for layer in layers]
    paddle.nn.LayerList(layers).clear_gradients()
    for cut in (
        [([0, 1, 2], 1.0)],
        [([2], 1.0), ([0, 1], 1.0)],
        [([1], 1.0), ([0], 1.0), ([2], 1.0), ([0], 0.0)],
    ):
        loss, found = balance_and_gradient(layers, rows, cut)
        assert loss == pytest.approx(float(expected), rel=1e-6)
        for mine, theirs in zip(found, gradients, strict=True):
            np.testing.assert_allclose(mine, theirs, atol=1e-7 + 1e-5 * np.abs(theirs).max())


def test_which_layers_have_experts():
    facts = ExpertFacts(num_routed=4, num_chosen=2, inner_size=8, sparse_step=2, dense_layers=(3,))
    assert [facts.has_experts(number) for number in range(6)] == [False, True, False, False, False, True]


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9, but a layer has 4 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok 0"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step 0"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be(name, changes, message, tiny_config):
    with pytest.raises(UserError, match=message):
        get_family(name).adapt_config(tiny_config(name) | changes)


@pytest.mark.parametrize(("name", "num_routed"), [("qwen2_moe", 60), ("qwen3_moe", 128)])
def test_missing_fields_are_transformers_own(name, num_routed, tiny_config):
    """A null is what is missing, too."""
    config = tiny_config(name) | {"num_experts": None, "mlp_only_layers": None}
    del config["norm_topk_prob"]
    facts = expert_facts(SimpleNamespace(**get_family(name).adapt_config(config)))
    assert facts.num_routed == num_routed and facts.dense_layers == () and not facts.normalised


@pytest.fixture
def tiny_config():
    from finetune.families.tiny_recipe import TinyShape

    shape = TinyShape(
        hidden_size=8,
        intermediate_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        vocab_size=8,
        max_length=8,
    )
    return lambda name: get_family(name).tiny.config(shape)


def asked(coefficient: float | None, method: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        model=SimpleNamespace(router_aux_loss_coef=coefficient), alignment=SimpleNamespace(method=method)
    )


def test_a_model_without_experts_has_nothing_to_balance(tiny_config, monkeypatch):
    monkeypatch.setattr("finetune.run.experts.comparison_of", lambda args: args.alignment.method)
    llama = SimpleNamespace(family=get_family("llama"), config=tiny_config("llama"))
    check_balance(asked(None), llama)
    check_balance(asked(0.0), llama)
    with pytest.raises(
        UserError, match=r"router_aux_loss_coef is 0\.1, but a model of family llama has no experts"
    ):
        check_balance(asked(0.1), llama)


def test_methods_that_compare_answers_balance_nothing(tiny_config, monkeypatch):
    monkeypatch.setattr("finetune.run.experts.comparison_of", lambda args: args.alignment.method)
    config = tiny_config("mixtral") | {"output_router_logits": True}
    mixtral = SimpleNamespace(family=get_family("mixtral"), config=config)
    check_balance(asked(None), mixtral)
    check_balance(asked(0.0, "dpo"), mixtral)
    for coefficient, value in ((0.1, "0.1"), (None, "0.02")):
        with pytest.raises(UserError, match=f"router_aux_loss_coef is {value}.*answers are compared"):
            check_balance(asked(coefficient, "dpo"), mixtral)
