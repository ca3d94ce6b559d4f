"""LoRA on the embedding of the tokens: what it computes, how it starts, and where there is none."""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from safetensors.numpy import save_file

from finetune.adapters.lora import add_lora, load_lora
from finetune.errors import UserError


def add(load, settings, family="llama", **more):
    vars(settings).update(more)
    model, record = load(family)
    return add_lora(model, settings, family=record, dtype="float32", seed=4)


def test_it_is_the_update_of_peft_and_starts_at_nothing(load, settings):
    ids = paddle.arange(4, 10).reshape([2, 3])
    before = load()[0].get_sublayer("llama.embed_tokens")(ids).numpy()
    adapted = add(
        load, settings, lora_target_modules=["embed_tokens", "q_proj"], rank_pattern={"embed_tokens": 5}
    )
    table = adapted.model.get_sublayer("llama.embed_tokens")
    assert table.lora_A.shape == [table.weight.shape[0], 5] and table.weight.stop_gradient
    np.testing.assert_array_equal(table(ids).numpy(), before)
    assert 0.8 < table.lora_B.numpy().std() < 1.2
    table.lora_A.set_value(paddle.rand(table.lora_A.shape))
    table(ids).sum().backward()
    assert table.lora_A.grad is not None and table.lora_B.grad is not None
    expected = before + 4 / 5 * table.lora_A.numpy()[ids.numpy()] @ table.lora_B.numpy()
    np.testing.assert_allclose(table(ids).numpy(), expected, rtol=1e-5, atol=1e-5)
    adapted.disable_lora()
    np.testing.assert_array_equal(table(ids).numpy(), before)
    adapted.enable_lora()
    adapted.merge()
    np.testing.assert_allclose(table(ids).numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(table.weight.numpy()[ids.numpy()], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "more", "fault"),
    [
        ("bloom", {"lora_target_modules": ["word_embeddings"]}, "is the output layer of this model as well"),
        ("llama", {"use_dora": True}, "is an embedding, and use_dora is for linear layers"),
        ("llama", {"init_lora_weights": "olora"}, "init_lora_weights olora is for linear layers"),
        ("llama", {"modules_to_save": ["embed_tokens"]}, "embed_tokens gets a low-rank update as well"),
        (
            "opt",
            {"lora_target_modules": ["position_embeddings"]},
            "only linear layers can get a low-rank update",
        ),
    ],
)
def test_where_there_is_none(family, more, fault, load, settings):
    with pytest.raises(UserError, match=fault):
        add(load, settings, family, **{"lora_target_modules": ["embed_tokens"]} | more)


def test_the_copy_of_the_embedding_that_peft_writes_beside_is_not_trained(load, tmp_path):
    model, _ = load()
    own = model.get_sublayer("llama.embed_tokens").weight.numpy()
    prefix, random = "base_model.model.model.embed_tokens", np.random.default_rng(0)
    tensors = {
        f"{prefix}.base_layer.weight": own,
        f"{prefix}.lora_embedding_A": random.random((2, len(own)), np.float32),
        f"{prefix}.lora_embedding_B": random.random((own.shape[1], 2), np.float32),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    adapted = load_lora(model, tmp_path)
    trained = [name for name, each in adapted.model.state_dict().items() if not each.stop_gradient]
    assert trained == ["llama.embed_tokens.lora_A", "llama.embed_tokens.lora_B"]
    save_file(tensors | {f"{prefix}.base_layer.weight": own + 1}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="has an embedding of its own beside the update"):
        load_lora(load()[0], tmp_path)


def test_an_adapter_of_peft_with_lengths_of_it(load, tmp_path):
    """Which a merge takes up, so that is what the message says."""
    model, _ = load("llama")
    num_tokens, width = model.get_sublayer("llama.embed_tokens").weight.shape
    name = "base_model.model.model.embed_tokens.lora_"
    shapes = {"embedding_A": (4, num_tokens), "embedding_B": (width, 4), "magnitude_vector": (width,)}
    save_file(
        {f"{name}{end}": np.ones(shape, np.float32) for end, shape in shapes.items()},
        tmp_path / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "use_dora": True,
        "target_modules": ["embed_tokens"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="DoRA of an embedding is not computed here: merge it"):
        load_lora(model, tmp_path)
