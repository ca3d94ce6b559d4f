import numpy as np
import paddle
import pytest
from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM
from paddlenlp.transformers.llama import modeling

from finetune.families.llama import cpu_layers


@pytest.fixture
def stock_layers():
    """PaddleNLP's layers, put back afterwards."""
    names = ("apply_rotary_pos_emb", "scaled_dot_product_attention", "swiglu")
    stock = {name: getattr(modeling, name) for name in names}
    forward = modeling.LlamaRMSNorm.forward
    yield
    for name, function in stock.items():
        setattr(modeling, name, function)
    modeling.LlamaRMSNorm.forward = forward
    modeling._finetune_cpu_layers = False


def tiny_llama(num_key_value_heads: int = 4, **options) -> LlamaForCausalLM:
    paddle.seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=64,
        eos_token_id=96,
        pad_token_id=0,
        bos_token_id=1,
        **options,
    )
    return LlamaForCausalLM(config)


def loss_and_gradients(model, batch):
    model.train()
    loss = model(**batch, return_dict=True).loss
    loss.backward()
    gradients = {
        name: parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.clear_gradients()
    return float(loss), gradients


def padded_batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 96, (3, 17))
    keep = np.arange(17)[None] < np.array([17, 9, 12])[:, None]
    return {
        "input_ids": paddle.to_tensor(ids * keep),
        "attention_mask": paddle.to_tensor(keep.astype("int64")),
        "labels": paddle.to_tensor(np.where(keep, ids, -100)),
    }


def packed_batch():
    """Two samples in one row: a block-diagonal mask and positions that start again."""
    batch = padded_batch()
    segment = np.repeat([0, 1], [7, 10])
    mask = np.tril(segment[:, None] == segment[None, :])[None, None].repeat(3, 0)
    positions = np.concatenate([np.arange(7), np.arange(10)])[None].repeat(3, 0)
    ids = paddle.to_tensor(np.random.default_rng(1).integers(2, 96, (3, 17)))
    return batch | {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": paddle.to_tensor(mask),
        "position_ids": paddle.to_tensor(positions),
    }


@pytest.mark.parametrize("batch", [padded_batch, packed_batch])
@pytest.mark.parametrize("num_key_value_heads", [4, 2])
def test_loss_and_every_gradient_are_the_stock_layers(stock_layers, batch, num_key_value_heads):
    model = tiny_llama(num_key_value_heads)
    loss, gradients = loss_and_gradients(model, batch())
    cpu_layers.install_llama()
    our_loss, our_gradients = loss_and_gradients(model, batch())
    assert our_loss == pytest.approx(loss, abs=2e-6)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(our_gradients[name], gradient, atol=2e-6, err_msg=name)


def test_frozen_weights_get_no_gradient(stock_layers):
    """As under LoRA: all but one matrix frozen, the norms and the embedding among them."""
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = "layers.1.self_attn.q_proj" not in name
    loss, gradients = loss_and_gradients(model, padded_batch())
    cpu_layers.install_llama()
    our_loss, our_gradients = loss_and_gradients(model, padded_batch())
    assert our_loss == pytest.approx(loss, abs=2e-6)
    (name,) = our_gradients
    np.testing.assert_allclose(our_gradients[name], gradients[name], atol=2e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_have_every_gradient(stock_layers, reentrant):
    """Paddle's recomputation hands saved tensors back detached: the norms' weights must be trained all the same."""
    cpu_layers.install_llama()
    loss, gradients = loss_and_gradients(tiny_llama(), padded_batch())
    model = tiny_llama(recompute=True, recompute_use_reentrant=reentrant)
    model.recompute_enable()
    our_loss, our_gradients = loss_and_gradients(model, padded_batch())
    assert our_loss == loss
    assert our_gradients.keys() == gradients.keys() and any("norm" in name for name in gradients)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(our_gradients[name], gradient, atol=1e-6, err_msg=name)


def test_generation_with_cache_gives_the_same_tokens(stock_layers):
    model = tiny_llama()
    model.eval()
    prompt = paddle.to_tensor([[5, 17, 40, 3, 9]])
    mask = paddle.ones_like(prompt)
    stock, _ = model.generate(prompt, attention_mask=mask, max_new_tokens=12, decode_strategy="greedy_search")
    cpu_layers.install_llama()
    ours, _ = model.generate(prompt, attention_mask=mask, max_new_tokens=12, decode_strategy="greedy_search")
    assert ours.tolist() == stock.tolist()


def test_other_types_go_to_the_stock_layers(stock_layers):
    model = tiny_llama()
    model.to(dtype="float64")
    cpu_layers.install_llama()
    norm = model.llama.norm
    x = paddle.randn([2, 3, 64], dtype="float64")
    assert norm(x).shape == [2, 3, 64]
    assert not cpu_layers._covers(x)
