"""Parameters worked out from config.json are those of the built model."""

from __future__ import annotations

import pytest

from finetune.families.family import families, get_family
from finetune.families.tiny_recipe import TinyShape
from finetune.models.layers import named_weights
from finetune.models.loading import build_config, find_model_class
from finetune.models.resolve import ResolvedModel
from finetune.models.weight_shapes import weight_shapes
from tests.models.odd_shape import SHAPE

OPTIONS = (
    ("llama", {"attention_bias": True}, {}),
    ("llama", {"mlp_bias": True, "head_dim": 8}, {}),
    ("llama", {"tie_word_embeddings": True}, {}),
    ("llama", {}, {"fuse_attention_qkv": True, "fuse_attention_ffn": True}),
    ("qwen2", {"tie_word_embeddings": True}, {"fuse_attention_qkv": True}),
    ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {}),
    ("qwen3", {"head_dim": 20, "tie_word_embeddings": True}, {}),
    ("mistral", {"head_dim": 8}, {}),
    ("mixtral", {"num_local_experts": 3}, {}),
    ("qwen2_moe", {"num_experts": 3, "mlp_only_layers": [1], "shared_expert_intermediate_size": 32}, {}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "moe_intermediate_size": 24}, {}),
    ("gemma", {"head_dim": 8}, {}),
    ("gemma2", {"head_dim": 8}, {}),
    ("gemma3", {"head_dim": 8}, {}),
    ("ernie4_5", {"tie_word_embeddings": False}, {}),
    ("glm4", {"attention_bias": False}, {}),
    ("glm4", {"model_type": "glm"}, {}),
    ("internlm", {"bias": False}, {}),
    ("falcon", {"bias": True}, {}),
    ("falcon", {"new_decoder_architecture": False, "parallel_attn": False, "num_ln_in_parallel_attn": 1}, {}),
    ("falcon", {"tie_word_embeddings": False}, {}),
    ("opt", {"word_embed_proj_dim": 16, "normalize_before": False}, {}),
    ("opt", {"tie_word_embeddings": False}, {}),
    ("qwen", {"no_bias": False}, {}),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, {}),
    ("phi3", {"tie_word_embeddings": True}, {}),
)


def built(family, config, options):
    resolved = ResolvedModel(None, family.name, config, family)
    model_class = find_model_class(resolved)
    model = model_class(build_config(resolved, model_class, dtype="float32", overrides=options))
    return {name: tuple(each.shape) for name, each in named_weights(model).items()}


def tiny_config(family):
    heads = {} if family.tiny.grouped_heads else {"num_kv_heads": SHAPE.num_heads}
    shape = TinyShape(**(vars(SHAPE) | heads))
    return family.tiny.config(shape) | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize("name", sorted(families()))
def test_every_family(name):
    family = get_family(name)
    config = tiny_config(family)
    assert weight_shapes(family, family.adapt_config(config)) == built(family, config, {})


@pytest.mark.parametrize(("name", "fields", "options"), OPTIONS)
def test_options(name, fields, options):
    family = get_family(name)
    config = tiny_config(family) | fields
    assert weight_shapes(family, family.adapt_config(config), options=options) == built(
        family, config, options
    )


def test_more_tokens_than_the_configuration_has():
    family = get_family("llama")
    shapes = weight_shapes(family, family.adapt_config(tiny_config(family)), vocab_size=100)
    assert shapes["llama.embed_tokens.weight"] == (100, 48)
    assert shapes["lm_head.weight"] == (48, 100)
