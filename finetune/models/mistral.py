"""Mistral 7B and what shares its architecture."""

from __future__ import annotations

from typing import Any

from finetune.errors import UserError
from finetune.models.family import (
    ConfigFields,
    Family,
    ParallelLimits,
    TensorSpec,
    TinyRecipe,
    TinyShape,
    TokenizerFacts,
    register,
)
from finetune.models.rotary_config import check_head_dim, without_scaling


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    adapted = without_scaling(config)
    check_head_dim(config)
    if config.get("tie_word_embeddings"):
        raise UserError(
            "config.json has tie_word_embeddings true, but PaddleNLP's Mistral has an output layer of its own: "
            "these weights cannot be used"
        )
    # A missing field would become PaddleNLP's default of 4096; null means no window.
    adapted.setdefault("sliding_window", None)
    return adapted


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": shape.max_length,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    kv_size = hidden // shape.num_heads * shape.num_kv_heads
    weights = {"mistral.embed_tokens.weight": TensorSpec((shape.vocab_size, hidden))}
    for layer in range(shape.num_layers):
        prefix = f"mistral.layers.{layer}."
        weights |= {
            prefix + "self_attn.q_proj.weight": TensorSpec((hidden, hidden)),
            prefix + "self_attn.k_proj.weight": TensorSpec((hidden, kv_size)),
            prefix + "self_attn.v_proj.weight": TensorSpec((hidden, kv_size)),
            prefix + "self_attn.o_proj.weight": TensorSpec((hidden, hidden)),
            prefix + "mlp.gate_proj.weight": TensorSpec((hidden, inner)),
            prefix + "mlp.up_proj.weight": TensorSpec((hidden, inner)),
            prefix + "mlp.down_proj.weight": TensorSpec((inner, hidden)),
            prefix + "input_layernorm.weight": TensorSpec((hidden,), "ones"),
            prefix + "post_attention_layernorm.weight": TensorSpec((hidden,), "ones"),
        }
    weights["mistral.norm.weight"] = TensorSpec((hidden,), "ones")
    weights["lm_head.weight"] = TensorSpec((hidden, shape.vocab_size))
    return weights


MISTRAL = register(
    Family(
        name="mistral",
        model_types=("mistral",),
        architectures=("MistralForCausalLM",),
        model_class="finetune.models.mistral_layers.MistralForCausalLM",
        pipeline_class=None,
        base_prefix="mistral",
        lora_target_modules=(
            ".*q_proj.*",
            ".*k_proj.*",
            ".*v_proj.*",
            ".*o_proj.*",
            ".*gate_proj.*",
            ".*up_proj.*",
            ".*down_proj.*",
        ),
        embedding_module="embed_tokens",
        prefix_postprocess="finetune.models.mistral_layers.prefix_key_values",
        tokenizer=TokenizerFacts(
            prefix=("bos",),
            end_of_answer="eos",
            pad_fallback="eos",
            vocab_files=("sentencepiece.bpe.model", "tokenizer.model"),
            tokenizer_class="paddlenlp.transformers.LlamaTokenizer",
        ),
        tiny=TinyRecipe(tokenizer="sentencepiece", config=_tiny_config, weights=_tiny_weights),
        fields=ConfigFields(num_kv_heads="num_key_value_heads"),
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size")
        ),
        adapt_config=_adapt_config,
        argument_folder="llama",
    )
)
