"""GLM-4 (`glm`) and GLM-4-0414 (`glm4`), in Hugging Face's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import (
    TENSOR_SPLITS,
    gated_decoder_config,
    gated_decoder_weights,
    join_inner_layers,
    require_values,
    sized_decoder_weights,
    with_padding_field,
)
from finetune.families.layer_memory import LayerMemory
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.rotary_config import with_scaling
from finetune.families.text_patterns import LLAMA3_PATTERN
from finetune.families.tiny_recipe import ByteLevelKind, TensorSpec, TinyRecipe, TinyShape

_TINY_HEADS = 2  # times hidden size / heads: published models have heads wider than that
_PUBLISHED = {
    "attention_bias": True,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1.5625e-7,
    "rope_theta": 10000.0,
}
"""What transformers takes for fields that a config.json leaves out."""


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Brings the rotary settings to the top, adds what the file leaves out."""
    require_values(config, "GLM-4", hidden_act="silu")
    return _PUBLISHED | with_scaling(config, may_turn_parts=True)


def _variant(config: Mapping[str, Any]) -> str | None:
    return "finetune.families.glm4.layers.GlmForCausalLM" if config.get("model_type") == "glm" else None


def _head_dim(shape: TinyShape) -> int:
    return _TINY_HEADS * shape.hidden_size // shape.num_heads


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return gated_decoder_config(
        shape,
        model_type="glm4",
        architectures=["Glm4ForCausalLM"],
        head_dim=_head_dim(shape),
        rms_norm_eps=1e-5,
        attention_bias=True,
        partial_rotary_factor=0.5,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    norms = ("post_self_attn_layernorm", "post_mlp_layernorm")
    apart = gated_decoder_weights(shape, "glm4", qkv_bias=True, head_dim=_head_dim(shape), more_norms=norms)
    return join_inner_layers(apart)


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    norms = () if _variant(config) else ("post_self_attn_layernorm", "post_mlp_layernorm")
    has_bias = bool(config.get("attention_bias"))
    return join_inner_layers(sized_decoder_weights(config, "glm4", qkv_bias=has_bias, more_norms=norms))


GLM4 = register(
    Family(
        name="glm4",
        models="GLM-4-9B-hf, GLM-4-0414 9B, 32B",
        model_types=("glm4", "glm"),
        architectures=("Glm4ForCausalLM", "GlmForCausalLM"),
        model_class="finetune.families.glm4.layers.Glm4ForCausalLM",
        variants=_variant,
        base_prefix="glm4",
        lora_target_modules=tuple(
            f".*{name}_proj.*" for name in ("q", "k", "v", "qkv", "o", "gate_up", "down")
        ),
        embedding_module="embed_tokens",
        fused_packing="rows",
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=("[gMASK]", "<sop>"),
            end_of_answer="eos",
            pad_fallback="<|endoftext|>",
            chat_ends=("<|user|>", "<|observation|>"),
            vocab_files=("tokenizer.json",),
            tokenizer_class="finetune.families.json_tokenizer.JsonTokenizer",
            own_class=True,
        ),
        chat_template="glm4",
        hugging_face=HuggingFaceForm(config=with_padding_field),
        weights=_weights,
        memory=LayerMemory(hidden=10, norms=4),
        tiny=TinyRecipe(
            tokenizer=ByteLevelKind(
                special_tokens=(
                    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
                    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
                ),
                roles={"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"},
                pattern=LLAMA3_PATTERN,
                special_first=False,
                one_file=True,
                settings={
                    "tokenizer_class": "PreTrainedTokenizerFast",
                    "model_input_names": ["input_ids", "attention_mask"],
                    "additional_special_tokens": [
                        "[gMASK]",
                        "<sop>",
                        "<|system|>",
                        "<|user|>",
                        "<|assistant|>",
                        "<|observation|>",
                    ],
                },
            ),
            config=_tiny_config,
            weights=_tiny_weights,
            head_dim_multiple=2,
        ),
        fields=ConfigFields(num_kv_heads="num_key_value_heads", head_dim="head_dim"),
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        argument_folder="llama",
        adapt_config=_adapt_config,
        understood=("rope_parameters", "rope_scaling"),
        tensor_splits={**TENSOR_SPLITS, "gate_up_proj": "halves"},
    )
)
