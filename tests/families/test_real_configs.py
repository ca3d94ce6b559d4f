"""config.json of models that people own: read right, or refused by name before any weight is read."""

from __future__ import annotations

import json

import pytest

from finetune.errors import UserError
from finetune.models.resolve import resolve_model

_SIZES = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_hidden_layers": 24,
    "num_key_value_heads": 8, "max_position_embeddings": 4096, "vocab_size": 49152, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2, "use_cache": True,
}  # fmt: skip
_GRANITE = {
    "attention_bias": False, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
    "residual_multiplier": 0.22, "mlp_bias": False,
}  # fmt: skip
_MINICPM = {"dim_model_base": 256, "scale_depth": 1.4, "scale_emb": 12}
_DEEPSEEK = {
    "first_k_dense_replace": 1, "kv_lora_rank": 512, "n_routed_experts": 64, "n_shared_experts": 2,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "moe_intermediate_size": 1408, "num_experts_per_tok": 6, "routed_scaling_factor": 1.0,
    "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
_NEXT = {"linear_num_key_heads": 16, "full_attention_interval": 4, "num_experts": 512, "head_dim": 256}
_TOWER = {"vision_config": {"hidden_size": 1024, "model_type": "pixtral"}}


def named(model_type: str, architecture: str, **fields: object) -> dict[str, object]:
    return {"model_type": model_type, "architectures": [architecture], **_SIZES, **fields}


# Model: (config.json, what the refusal says)
REFUSED = {
    "Granite 3 renamed to Llama": (named("llama", "LlamaForCausalLM", **_GRANITE), "embedding_multiplier 12.0"),
    "Granite 3 MoE": (named("granitemoe", "GraniteMoeForCausalLM", **_GRANITE, num_local_experts=32), "granitemoe"),
    "Granite 4": (named("granitemoehybrid", "GraniteMoeHybridForCausalLM", **_GRANITE), "granitemoehybrid"),
    "Command R": (named("cohere", "CohereForCausalLM", logit_scale=0.0625, use_qk_norm=False), "cohere"),
    "Command R7B": (named("cohere2", "Cohere2ForCausalLM", sliding_window_pattern=4), "cohere2"),
    "Aya Vision": (named("aya_vision", "AyaVisionForConditionalGeneration", **_TOWER), "aya_vision"),
    "StableLM 2": (named("stablelm", "StableLmForCausalLM", partial_rotary_factor=0.25), "stablelm"),
    "StableLM Epoch": (named("stablelm_epoch", "StableLMEpochForCausalLM", rope_pct=0.25), "stablelm_epoch"),
    "Phi-1.5": (named("phi", "PhiForCausalLM", partial_rotary_factor=0.5, layer_norm_eps=1e-5), "phi"),
    "Phi-1, first files": (named("mixformer-sequential", "MixFormerSequentialForCausalLM"), "mixformer-sequential"),
    "Phi-3.5 MoE": (named("phimoe", "PhiMoEForCausalLM", num_local_experts=16), "phimoe"),
    "Phi-3 small": (named("phi3small", "Phi3SmallForCausalLM", mup_attn_multiplier=1.0), "phi3small"),
    "Phi-3.5 vision": (named("phi3_v", "Phi3VForCausalLM", img_processor={"name": "clip"}), "Phi-3 vision"),
    "Phi-4 multimodal": (named("phi4mm", "Phi4MMForCausalLM", vision_lora={"r": 256}), "Phi-4 multimodal"),
    "MiniCPM 2B": (named("minicpm", "MiniCPMForCausalLM", **_MINICPM), "minicpm"),
    "MiniCPM renamed to Llama": (named("llama", "LlamaForCausalLM", **_MINICPM), "scale_emb 12"),
    "MiniCPM3": (named("minicpm3", "MiniCPM3ForCausalLM", **_MINICPM, kv_lora_rank=256), "minicpm3"),
    "MiniCPM-V": (named("minicpmv", "MiniCPMV", vision_config={"hidden_size": 1152}), "MiniCPM-V"),
    "DeepSeek MoE": (named("deepseek", "DeepseekForCausalLM", n_routed_experts=64), "deepseek"),
    "DeepSeek-V2 Lite": (named("deepseek_v2", "DeepseekV2ForCausalLM", **_DEEPSEEK), "deepseek_v2"),
    "DeepSeek-V3": (named("deepseek_v3", "DeepseekV3ForCausalLM", **_DEEPSEEK), "deepseek_v3"),
    "Kimi K2": (named("kimi_k2", "DeepseekV3ForCausalLM", **_DEEPSEEK), "kimi_k2"),
    "OLMo": (named("olmo", "OlmoForCausalLM", clip_qkv=8.0), "olmo"),
    "OLMo 2": (named("olmo2", "Olmo2ForCausalLM"), "olmo2"),
    "OLMoE": (named("olmoe", "OlmoeForCausalLM", num_experts=64), "olmoe"),
    "StarCoder": (named("gpt_bigcode", "GPTBigCodeForCausalLM", multi_query=True), "gpt_bigcode"),
    "StarCoder2": (named("starcoder2", "Starcoder2ForCausalLM", sliding_window=4096), "starcoder2"),
    "Llama 4": (
        {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "text_config": _SIZES},
        "Llama 4.*llama4",
    ),
    "Llama 3.2 Vision": (
        {"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"],
         "text_config": _SIZES | {"model_type": "mllama_text_model", "cross_attention_layers": [3, 8]}},
        "Llama 3.2 Vision.*cross attention",
    ),
    "Qwen3-Next": (named("qwen3_next", "Qwen3NextForCausalLM", **_NEXT), "qwen3_next"),
    "Qwen3-VL MoE": (
        {"model_type": "qwen3_vl_moe", "text_config": _SIZES | {"model_type": "qwen3_vl_moe_text"}},
        "Qwen3-VL with experts",
    ),
    "Qwen2.5 Omni": ({"model_type": "qwen2_5_omni", "thinker_config": {"text_config": _SIZES}}, "Qwen Omni"),
    "Qwen2.5 Math, reward by steps": (named("qwen2", "Qwen2ForProcessRewardModel", is_causal=False), "is_causal"),
    "GLM-4.1V": ({"model_type": "glm4v", "text_config": _SIZES | {"model_type": "glm4v_text"}}, "GLM-4.1V"),
    "GLM-4.5": (named("glm4_moe", "Glm4MoeForCausalLM", n_routed_experts=128), "glm4_moe"),
    "Jamba": (named("jamba", "JambaForCausalLM", mamba_d_state=16), "jamba"),
    "Mamba": ({"model_type": "mamba", "architectures": ["MambaForCausalLM"], "state_size": 16}, "mamba"),
    "ChatGLM-6B int4": (
        {"model_type": "chatglm", "hidden_size": 4096, "inner_hidden_size": 16384, "num_layers": 28,
         "quantization_bit": 4, "quantization_embeddings": False}, "quantization_bit 4",
    ),
    "ChatGLM2-6B int4": (
        {"model_type": "chatglm", "hidden_size": 4096, "ffn_hidden_size": 13696, "quantization_bit": 4},
        "quantization_bit 4",
    ),
    "ERNIE 4.5 with norms of another kind": (
        named("ernie4_5", "Ernie4_5ForCausalLM", use_rmsnorm=False), "use_rmsnorm False",
    ),
    "Falcon Mamba": ({"model_type": "falcon_mamba", "architectures": ["FalconMambaForCausalLM"]}, "falcon_mamba"),
    "Falcon H1": (named("falcon_h1", "FalconH1ForCausalLM", mamba_d_ssm=1536), "falcon_h1"),
    "Pythia": (named("gpt_neox", "GPTNeoXForCausalLM", rotary_pct=0.25), "gpt_neox"),
    "GPT-Neo": (named("gpt_neo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 12]]), "gpt_neo"),
    "GPT-J": ({"model_type": "gptj", "architectures": ["GPTJForCausalLM"], "rotary_dim": 64}, "gptj"),
    "MPT": ({"model_type": "mpt", "architectures": ["MPTForCausalLM"], "d_model": 4096}, "mpt"),
    "T5": ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 512}, "t5"),
    "BERT": ({"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 768}, "bert"),
    "Whisper": ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, "whisper"),
    "SmolLM3 renamed to Llama": (named("llama", "LlamaForCausalLM", no_rope_layer_interval=4), "no_rope_layer_interval"),
    "EXAONE 3": (named("exaone", "ExaoneForCausalLM", num_layers=32), "exaone"),
    "EXAONE 4": (named("exaone4", "Exaone4ForCausalLM", sliding_window_pattern="LLLG"), "exaone4"),
    "Nemotron": (named("nemotron", "NemotronForCausalLM", partial_rotary_factor=0.5), "nemotron"),
    "Nemotron Super": (named("nemotron-nas", "DeciLMForCausalLM", block_configs=[]), "nemotron-nas"),
    "Hunyuan dense": (named("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM"), "hunyuan_v1_dense"),
    "Hunyuan MoE": (named("hunyuan", "HunYuanForCausalLM", use_cla=True, cla_share_factor=2), "hunyuan"),
    "ERNIE 4.5 MoE": (named("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", moe_num_experts=64), "ernie4_5_moe"),
    "ERNIE 4.5 dense with experts": (
        named("ernie4_5", "Ernie4_5ForCausalLM", moe_num_experts=64, use_bias=False), "moe_num_experts",
    ),
    "gpt-oss": (named("gpt_oss", "GptOssForCausalLM", num_local_experts=32), "gpt_oss"),
    "Seed-OSS": (named("seed_oss", "SeedOssForCausalLM", attention_bias=True), "seed_oss"),
    "EmbeddingGemma": (
        named("gemma3_text", "Gemma3TextModel", use_bidirectional_attention=True,
              hidden_act="gelu_pytorch_tanh"), "use_bidirectional_attention",
    ),
    "Gemma 3n": ({"model_type": "gemma3n", "text_config": _SIZES | {"model_type": "gemma3n_text"}}, "Gemma 3n"),
    "RecurrentGemma": (named("recurrent_gemma", "RecurrentGemmaForCausalLM", lru_width=2560), "recurrent_gemma"),
    "PaliGemma": ({"model_type": "paligemma", "text_config": {"model_type": "gemma", **_SIZES}}, "PaliGemma"),
    "DBRX": ({"model_type": "dbrx", "architectures": ["DbrxForCausalLM"], "d_model": 6144}, "dbrx"),
    "Grok": (named("grok-1", "Grok1ModelForCausalLM", attn_output_multiplier=0.08), "grok-1"),
    "InternLM3": (named("internlm3", "InternLM3ForCausalLM", qkv_bias=False), "internlm3"),
    "XComposer": (named("internlmxcomposer2", "InternLMXComposer2ForCausalLM"), "internlmxcomposer2"),
    "Persimmon": (named("persimmon", "PersimmonForCausalLM", qk_layernorm=True), "persimmon"),
    "Qwen3-MoE without norms of heads": (
        named("qwen3_moe", "Qwen3MoeForCausalLM", use_qk_norm=False), "use_qk_norm False",
    ),
    "Mistral with layers beside its window": (
        named("mistral", "MistralForCausalLM", sliding_window=4096, layer_types=["full_attention"] * 24), "layer_types",
    ),
    "Dream": (named("Dream", "DreamModel", mask_token_id=151666), "Dream"),
}  # fmt: skip
# Model: (family, whether it is multimodal, config.json)
READ = {
    "BLOOMZ": ("bloom", False, {
        "model_type": "bloom", "architectures": ["BloomForCausalLM"], "n_embed": 1024, "n_layer": 24, "offset_alibi": 100,
        "num_attention_heads": 16, "apply_residual_connection_post_layernorm": False, "vocab_size": 250880,
        "attention_softmax_in_fp32": True, "masked_softmax_fusion": True, "layer_norm_epsilon": 1e-5,
    }),
    "SmolLM2": ("llama", False, named("llama", "LlamaForCausalLM", rope_interleaved=False, rope_scaling=None)),
    "Nemotron 70B": ("llama", False, named("llama", "LlamaForCausalLM", attention_bias=False, mlp_bias=False)),
    "Qwen3-Coder 30B": ("qwen3_moe", False, named(
        "qwen3_moe", "Qwen3MoeForCausalLM", decoder_sparse_step=1, head_dim=128, max_window_layers=28, mlp_only_layers=[],
        moe_intermediate_size=768, norm_topk_prob=True, num_experts=128, num_experts_per_tok=8, qkv_bias=False,
        output_router_logits=False, router_aux_loss_coef=0.0, shared_expert_intermediate_size=0, sliding_window=None,
        use_qk_norm=True, use_sliding_window=False,
    )),
    "Llama 2 with YaRN": ("llama", False, named("llama", "LlamaForCausalLM", rope_scaling={
        "factor": 32.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True,
    })),
    "Ministral": ("mistral", False, named("mistral", "MistralForCausalLM", sliding_window=32768, head_dim=128)),
    "Yi-VL": ("llama", True, named(
        "llava", "LlavaLlamaForCausalLM", mm_vision_tower="./vit", mm_hidden_size=1280, image_aspect_ratio="pad",
        mm_projector_type="mlp2x_gelu_Norm", mm_vision_select_layer=-2, mm_use_im_start_end=False,
        use_mm_proj=True, tune_mm_mlp_adapter=False, freeze_vision_tower=False,
    )),
    "LLaVA 1.5 7B": ("llama", True, {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_token_index": 32000,
        "pad_token_id": 32001, "projector_hidden_act": "gelu", "vision_feature_layer": -2, "ignore_index": -100,
        "tie_word_embeddings": False, "torch_dtype": "float16", "vision_feature_select_strategy": "default",
        "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"],
                        "max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-5,
                        "torch_dtype": "float16", "vocab_size": 32064},
        "vision_config": {"hidden_size": 1024, "model_type": "clip_vision_model"},
    }),
    "Mistral Small 3.1": ("mistral", True, {
        "model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10,
        "multimodal_projector_bias": False, "spatial_merge_size": 2, "vision_feature_layer": -1, **_TOWER,
        "text_config": {"attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
                        "intermediate_size": 32768, "max_position_embeddings": 131072, "model_type": "mistral",
                        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
                        "rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None, "vocab_size": 131072},
    }),
    "Pixtral 12B": ("mistral", True, {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "image_seq_length": 1,
        "image_token_index": 10, "vision_feature_layer": -1, "vision_feature_select_strategy": "full", **_TOWER,
        "text_config": {"head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336, "is_composition": True,
                        "max_position_embeddings": 1024000, "model_type": "mistral", "num_hidden_layers": 40,
                        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e9, "sliding_window": None,
                        "vocab_size": 131072},
    }),
    "LLaVA 1.6, first files": ("mistral", True, named(
        "llava_mistral", "LlavaMistralForCausalLM", freeze_mm_mlp_adapter=False, freeze_mm_vision_resampler=False,
        image_crop_resolution=224, image_grid_pinpoints=[[336, 672]], image_aspect_ratio="anyres", mm_hidden_size=1024,
        mm_patch_merge_type="spatial_unpad", mm_projector_lr=None, mm_resampler_type=None, mm_vision_tower_lr=2e-6,
        mm_vision_tower="openai/clip-vit-large-patch14-336", tokenizer_model_max_length=4096, sliding_window=None,
        tokenizer_padding_side="right", tune_mm_vision_resampler=False, unfreeze_mm_vision_tower=True, use_mm_proj=True,
    )),
    "SmolVLM": ("llama", True, {
        "model_type": "smolvlm", "architectures": ["SmolVLMForConditionalGeneration"], "scale_factor": 4,
        "tie_word_embeddings": False, "image_token_id": 49190, "vision_config": {"hidden_size": 768},
        "text_config": {"_attn_implementation_autoset": False, "architectures": ["VLlama3ForCausalLM"], "head_dim": 64,
                        "hidden_size": 960, "intermediate_size": 2560, "is_llama_config": True, "model_type": "llama",
                        "max_position_embeddings": 8192, "neftune_noise_alpha": 0.0, "num_attention_heads": 15,
                        "num_hidden_layers": 32, "num_key_value_heads": 5, "perceiver_config": {"hidden_act": "silu"},
                        "pixel_shuffle_factor": 4, "qk_layer_norms": False, "rms_norm_eps": 1e-5,
                        "rope_interleaved": False, "rope_theta": 100000, "transformers.js_config": {"dtype": "q4"},
                        "use_resampler": False, "vocab_size": 49280},
    }),
    "Gemma 3 4B": ("gemma3", True, {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144, "mm_tokens_per_image": 256,
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                        "sliding_window": 1024},
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }),
    "Qwen2.5-VL 7B": ("qwen2", True, named(
        "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", attention_dropout=0.0, vision_start_token_id=151652,
        image_token_id=151655, max_window_layers=28, sliding_window=32768, use_sliding_window=False,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}, vision_config={"depth": 32},
    )),
    "InternVL2 8B": ("internlm2", True, {
        "model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "downsample_ratio": 0.5,
        "dynamic_image_size": True, "ps_version": "v2", "use_backbone_lora": 0, "vision_config": {"hidden_size": 1024},
        "llm_config": named("internlm2", "InternLM2ForCausalLM", bias=False, add_cross_attention=False,
                            attn_implementation="flash_attention_2", pruned_heads={},
                            rope_scaling={"factor": 2.0, "type": "dynamic"}),
    }),
    "GLM-4V 9B, first files": ("chatglm4", True, {
        "_name_or_path": "THUDM/glm-4v-9b", "model_type": "chatglm", "architectures": ["ChatGLMModel"],
        "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True, "ffn_hidden_size": 13696,
        "fp32_residual_connection": False, "hidden_size": 4096, "kv_channels": 128, "layernorm_epsilon": 1.5625e-07,
        "multi_query_attention": True, "multi_query_group_num": 2, "num_attention_heads": 32, "num_layers": 40,
        "original_rope": True, "padded_vocab_size": 151552, "post_layer_norm": True, "rmsnorm": True, "seq_length": 8192,
        "boi_token_id": 151339, "eoi_token_id": 151340, "tie_word_embeddings": False, "vocab_size": 151552,
        "vision_config": {"hidden_size": 1792, "image_size": 1120},
    }),
    "Qwen-VL": ("qwen", True, {
        "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "attn_dropout_prob": 0.0, "bf16": False,
        "emb_dropout_prob": 0.0, "hidden_size": 4096, "intermediate_size": 22016, "kv_channels": 128,
        "layer_norm_epsilon": 1e-6, "no_bias": True, "num_attention_heads": 32, "num_hidden_layers": 32,
        "rotary_emb_base": 10000, "rotary_pct": 1.0, "scale_attn_weights": True, "seq_length": 2048,
        "use_dynamic_ntk": True, "use_logn_attn": True, "vocab_size": 151936,
        "visual": {"heads": 16, "image_size": 448, "layers": 48, "output_dim": 4096, "width": 1664},
    }),
}  # fmt: skip


def folder_of(config: dict[str, object], folder):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_by_name(name, tmp_path):
    config, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        resolved = resolve_model(folder_of(config, tmp_path), needs_weights=False)
        resolved.family.adapt_config(resolved.config)  # asked before weights are read, too


@pytest.mark.parametrize("name", READ)
def test_what_is_computed_is_read_by_its_family(name, tmp_path):
    family, is_multimodal, config = READ[name]
    resolved = resolve_model(folder_of(config, tmp_path), needs_weights=False)
    assert resolved.family.name == family
    assert (resolved.kind is not None) == is_multimodal
    adapted = resolved.family.adapt_config(resolved.config)
    assert adapted["hidden_size"] if "hidden_size" in adapted else adapted["n_embed"]


# What transformers takes for what the text part leaves out, and null where that says something.
ADAPTED = {
    "LLaVA 1.5 7B": {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "vocab_size": 32064,
        "tie_word_embeddings": False,
    },
    "Gemma 3 4B": {"vocab_size": 262208, "num_attention_heads": 8, "head_dim": 256, "sliding_window": 1024},
    "Mistral Small 3.1": {"sliding_window": None, "head_dim": 128},
    "Pixtral 12B": {"sliding_window": None, "num_attention_heads": 32},
    "Qwen2.5-VL 7B": {"sliding_window": None, "rope_scaling": None, "tie_word_embeddings": True},
    "InternVL2 8B": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
}


@pytest.mark.parametrize("name", ADAPTED)
def test_text_parts_are_complete(name, tmp_path):
    resolved = resolve_model(folder_of(READ[name][2], tmp_path), needs_weights=False)
    adapted = resolved.family.adapt_config(resolved.config)
    assert {field: adapted.get(field) for field in ADAPTED[name]} == ADAPTED[name]
