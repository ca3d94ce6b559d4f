"""Configurations with the fields of published folders: whose they are, and that nothing in them is refused."""

from __future__ import annotations

import json

import pytest

from finetune.families.config_fields import unknown_fields
from finetune.families.config_file import find_wrong_fields
from finetune.families.family import find_family, get_family, import_object

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
FALCON_RW = {
    "alibi": True, "apply_residual_connection_post_layernorm": False, "bias": True, "bos_token_id": 1, "eos_token_id": 2,
    "multi_query": False, "parallel_attn": False,
}  # fmt: skip
GEMMA_SHAPE = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2, "cache_implementation": "hybrid",
    "eos_token_id": 1, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "initializer_range": 0.02, "intermediate_size": 6912, "num_attention_heads": 4, "num_hidden_layers": 6,
    "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-6, "transformers_version": "4.50.0.dev0",
    "use_cache": True, "vocab_size": 262144,
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
    "ministral 8b": ("mistral", 32768, LLAMA_SHAPE | {
        "model_type": "ministral", "architectures": ["MinistralForCausalLM"], "attention_dropout": 0.0, "head_dim": 128,
        "layer_types": ["full_attention", *["sliding_attention"] * 3] * 9, "max_position_embeddings": 32768,
        "num_hidden_layers": 36, "num_key_value_heads": 8, "rope_theta": 100000000.0, "sliding_window": 32768,
        "vocab_size": 131072,
    }),
    "granite 3.3 2b": ("granite", 131072, LLAMA_SHAPE | {
        "model_type": "granite", "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
        "hidden_size": 2048, "intermediate_size": 8192, "logits_scaling": 8.0, "max_position_embeddings": 131072,
        "mlp_bias": False, "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0,
        "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000000.0,
        "tie_word_embeddings": True, "vocab_size": 49159,
    }),
    "smollm3 3b": ("smollm3", 65536, LLAMA_SHAPE | {
        "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": 128012, "hidden_size": 2048, "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "max_window_layers": 28,
        "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 4, "pad_token_id": 128004, "pretraining_tp": 2,
        "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 128256,
    }),
    "falcon 7b": ("falcon", 2048, FALCON_SHAPE | {
        "model_type": "falcon", "architectures": ["FalconForCausalLM"], "hidden_size": 4544, "multi_query": True,
        "new_decoder_architecture": False, "num_attention_heads": 71, "num_hidden_layers": 32,
    }),
    "falcon 7b, early": ("falcon", 2048, FALCON_SHAPE | {
        "model_type": "RefinedWebModel", "architectures": ["RWForCausalLM"], "hidden_size": 4544, "multi_query": True,
        "n_head": 71, "n_layer": 32,
    }),
    "falcon rw 1b": ("falcon", 2048, FALCON_SHAPE | FALCON_RW | {
        "model_type": "falcon", "architectures": ["FalconForCausalLM"], "hidden_size": 2048,
        "new_decoder_architecture": False, "num_attention_heads": 32, "num_hidden_layers": 24, "vocab_size": 50304,
    }),
    "falcon rw 7b, early": ("falcon", 2048, FALCON_SHAPE | FALCON_RW | {
        "model_type": "RefinedWebModel", "architectures": ["RWForCausalLM"], "hidden_size": 4096, "n_head": 64,
        "n_layer": 36,
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
    "gemma2": ("gemma2", 8192, GEMMA_SHAPE | {
        "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
        "query_pre_attn_scalar": 224, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
    }),
    "gemma3 1b": ("gemma3", 32768, GEMMA_SHAPE | {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": None,
        "eos_token_id": [1, 106], "final_logit_softcapping": None, "max_position_embeddings": 32768,
        "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6,
    }),
    "gemma3 1b, by transformers 5": ("gemma3", 32768, GEMMA_SHAPE | {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "_sliding_window_pattern": 6,
        "max_position_embeddings": 32768, "query_pre_attn_scalar": 256, "sliding_window": 512, "dtype": "bfloat16",
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"], "use_bidirectional_attention": False,
        "rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}},
    }),
    "glm4 0414": ("glm4", 32768, LLAMA_SHAPE | {
        "model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338], "head_dim": 128, "max_position_embeddings": 32768,
        "num_key_value_heads": 2, "pad_token_id": 151329, "partial_rotary_factor": 0.5, "vocab_size": 151552,
    }),
    "ernie 4.5": ("ernie4_5", 131072, LLAMA_SHAPE | {
        "model_type": "ernie4_5", "architectures": ["Ernie4_5ForCausalLM"], "head_dim": 128, "pad_token_id": 0,
        "max_position_embeddings": 131072, "num_key_value_heads": 2, "rope_theta": 500000, "use_bias": False,
        "tie_word_embeddings": True, "vocab_size": 103424,
    }),
    "ernie 4.5, by its own programs": ("ernie4_5", 131072, LLAMA_SHAPE | {
        "model_type": "ernie4_5", "architectures": ["Ernie4_5_ForCausalLM"], "attention_probs_dropout_prob": 0.0,
        "compression_ratio": 1.0, "dtype": "bfloat16", "fuse_rms_norm": True, "fuse_swiglu": False, "head_dim": 128,
        "hidden_dropout_prob": 0.0, "max_position_embeddings": 131072, "max_sequence_length": None,
        "num_key_value_heads": 2, "rope_reorder": False, "rope_theta": 500000, "scale_qk_coeff": 1.0, "use_bias": False,
        "use_rmsnorm": True, "weight_share_add_bias": True, "tie_word_embeddings": True, "vocab_size": 103424,
    }),
    "phi3 mini": ("phi3", 4096, LLAMA_SHAPE | {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "_name_or_path": "Phi-3-mini-4k-instruct",
        "attention_bias": False, "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0, "resid_pdrop": 0.0, "max_position_embeddings": 4096, "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047,
        "vocab_size": 32064,
    }),
    "phi4 mini": ("phi3", 4096, LLAMA_SHAPE | {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        "attention_bias": False, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "original_max_position_embeddings": 4096,
        "pad_token_id": 199999, "partial_rotary_factor": 0.75, "sliding_window": 262144, "tie_word_embeddings": True,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        "vocab_size": 200064,
    }),
    "qwen3 0.6b": ("qwen3", 40960, LLAMA_SHAPE | {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128,
        "max_position_embeddings": 40960, "max_window_layers": 28, "num_key_value_heads": 8, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
        "vocab_size": 151936,
    }),
    "qwen1.5 moe": ("qwen2_moe", 8192, LLAMA_SHAPE | {
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "decoder_sparse_step": 1,
        "max_position_embeddings": 8192, "max_window_layers": 21, "moe_intermediate_size": 1408, "norm_topk_prob": False,
        "num_experts": 60, "num_experts_per_tok": 4, "num_key_value_heads": 16, "output_router_logits": False,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
        "use_sliding_window": False, "vocab_size": 151936,
    }),
    "qwen3 moe": ("qwen3_moe", 40960, LLAMA_SHAPE | {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "head_dim": 128,
        "decoder_sparse_step": 1, "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8,
        "num_key_value_heads": 4, "output_router_logits": False, "rope_theta": 1000000.0, "sliding_window": None,
        "use_sliding_window": False, "vocab_size": 151936,
    }),
    "mixtral 8x22b": ("mixtral", 65536, LLAMA_SHAPE | {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "max_position_embeddings": 65536,
        "num_experts_per_tok": 2, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
        "rope_theta": 1000000, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "sliding_window": None,
        "vocab_size": 32768,
    }),
    "falcon3": ("llama", 32768, LLAMA_SHAPE | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "activation": "swiglu", "head_dim": 256,
        "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 32768, "num_key_value_heads": 4,
        "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 1000042, "vocab_size": 131072,
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


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_folder_of_a_run_is_read_like_the_published_one(name):
    """PaddleNLP's object adds the defaults of its class to what a run saves."""
    expected, limit, config = PUBLISHED[name]
    family = get_family(expected)
    config_class = import_object(family.class_path(config)).config_class
    built = config_class.from_dict(family.adapt_config(config))
    for uses_diff in (True, False):
        saved = json.loads(built.to_json_string(use_diff=uses_diff))
        assert find_family(saved).name == expected
        assert list(find_wrong_fields(saved)) == list(unknown_fields(saved, family)) == []
        assert family.position_limit(saved) == limit
        assert config_class.from_dict(family.adapt_config(saved)).to_dict() == built.to_dict()
        assert family.class_path(saved) == family.class_path(config)
