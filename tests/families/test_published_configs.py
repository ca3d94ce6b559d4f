"""Configurations with the fields of published folders: whose they are, and that nothing in them is refused."""

from __future__ import annotations

import pytest

from finetune.families.config_fields import unknown_fields
from finetune.families.config_file import find_wrong_fields
from finetune.families.family import find_family

LLAMA_SHAPE = {
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "num_attention_heads": 32, "num_hidden_layers": 32, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.29.2", "use_cache": True, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BAICHUAN = LLAMA_SHAPE | {
    "model_type": "baichuan",
    "_from_model_config": True,
    "gradient_checkpointing": [False],
}
INTERNLM = LLAMA_SHAPE | {"model_type": "internlm", "vocab_size": 103168}
DYNAMIC = {"base": 10000, "type": "dynamic"}
GPT2_SHAPE = {
    "activation_function": "gelu_fast", "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    "layer_norm_epsilon": 1e-5, "n_ctx": 2048, "n_embd": 2048, "n_head": 16, "n_inner": 8192, "n_layer": 24,
    "n_positions": 2048, "reorder_and_upcast_attn": False, "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True, "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 256000,
}  # fmt: skip
FALCON_SHAPE = {
    "alibi": False, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "bias": False, "bos_token_id": 11, "eos_token_id": 11, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5,
    "parallel_attn": True, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 65024,
}  # fmt: skip

# name: (family, most tokens of a text, configuration)
PUBLISHED = {
    "baichuan 7b": ("baichuan", 4096, BAICHUAN | {
        "architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 4096, "vocab_size": 64000,
    }),
    "baichuan 13b": ("baichuan", 4096, BAICHUAN | {"model_max_length": 4096, "vocab_size": 64000}),
    "baichuan2 7b": ("baichuan2", 4096, BAICHUAN | {
        "model_max_length": 4096, "max_position_embeddings": 4096, "vocab_size": 125696, "z_loss_weight": 0,
    }),
    "baichuan2 13b": ("baichuan2", 4096, BAICHUAN | {
        "model_max_length": 4096, "vocab_size": 125696, "z_loss_weight": 0, "tokenizer_class": "BaichuanTokenizer",
    }),
    "internlm 7b": ("internlm", 2048, INTERNLM | {
        "architectures": ["InternLMForCausalLM"], "bias": True, "max_position_embeddings": 2048, "rotary": DYNAMIC,
    }),
    "internlm 20b": ("internlm", 4096, INTERNLM | {
        "architectures": ["InternLMForCausalLM"], "bias": False, "max_position_embeddings": 4096, "rotary": DYNAMIC,
    }),
    "internlm2, early": ("internlm2", 32768, INTERNLM | {
        "architectures": ["InternLM2ForCausalLM"], "bias": False, "max_position_embeddings": 32768,
        "num_key_value_heads": 8, "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 1.0},
    }),
    "internlm2.5": ("internlm2", 32768, LLAMA_SHAPE | {
        "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "attn_implementation": "eager",
        "bias": False, "max_position_embeddings": 32768, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rope_theta": 1000000, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "vocab_size": 92544,
    }),
    "xverse": ("xverse", 8192, LLAMA_SHAPE | {
        "model_type": "xverse", "max_position_embeddings": 8192, "max_tokenizer_truncation": 6144, "vocab_size": 100534,
        "rope_theta": 500000,
    }),
    "skywork": ("llama", 4096, LLAMA_SHAPE | {
        "model_type": "skywork", "architectures": ["SkyworkForCausalLM"], "max_position_embeddings": 4096,
        "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 65519,
    }),
    "yi": ("llama", 4096, LLAMA_SHAPE | {
        "model_type": "llama", "max_position_embeddings": 4096, "num_key_value_heads": 4, "rope_theta": 5000000.0,
    }),
    "polylm": ("gpt2", 2048, GPT2_SHAPE | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}),
    "falcon 7b": ("falcon", 2048, FALCON_SHAPE | {
        "model_type": "falcon", "architectures": ["FalconForCausalLM"], "hidden_size": 4544, "multi_query": True,
        "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32,
    }),
    "falcon 7b, early": ("falcon", 2048, FALCON_SHAPE | {
        "model_type": "RefinedWebModel", "architectures": ["RWForCausalLM"], "hidden_size": 4544, "multi_query": True,
        "n_head": 71, "n_layer": 32,
    }),
    "falcon 40b, early": ("falcon", 2048, FALCON_SHAPE | {
        "model_type": "RefinedWeb", "architectures": ["RWForCausalLM"], "hidden_size": 8192, "n_head": 128,
        "n_head_kv": 8, "n_layer": 60,
    }),
    "falcon 11b": ("falcon", 8192, FALCON_SHAPE | {
        "model_type": "falcon", "architectures": ["FalconForCausalLM"], "activation": "gelu", "ff_factor": 4,
        "ffn_hidden_size": 16384, "hidden_size": 4096, "max_position_embeddings": 8192, "multi_query": True,
        "new_decoder_architecture": True, "num_attention_heads": 32, "num_hidden_layers": 60, "num_kv_heads": 8,
        "num_ln_in_parallel_attn": 1, "rope_scaling": None, "rope_theta": 500042.0, "tie_word_embeddings": False,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_read_whole(name):
    expected, limit, config = PUBLISHED[name]
    family = find_family(config)
    assert family.name == expected
    assert list(find_wrong_fields(config)) == list(unknown_fields(config, family)) == []
    assert family.position_limit(config) == limit
    adapted = family.adapt_config(config)
    assert family.adapt_config(adapted) == adapted, "as a run leaves it behind"
