"""Gemma 1: tied embeddings, wide heads, tanh-GELU, norm weights stored as differences from one."""

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
from finetune.models.rotary_config import without_scaling


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Says which GELU is meant, and refuses what PaddleNLP's Gemma has no place for.

    `hidden_act` of the first published configs says "gelu" although the weights were trained with the
    tanh approximation, so only an explicit `hidden_activation` asks for the exact function.
    """
    adapted = without_scaling(config)
    adapted["hidden_activation"] = config.get("hidden_activation") or "gelu_pytorch_tanh"
    allowed = ("gelu_pytorch_tanh", "gelu_new", "gelu")
    if adapted["hidden_activation"] not in allowed:
        raise UserError(
            f"config.json has hidden_activation {adapted['hidden_activation']!r}; allowed for Gemma: "
            f"{', '.join(allowed)}. Use other weights"
        )
    for name, only in (("attention_bias", False), ("tie_word_embeddings", True)):
        if config.get(name, only) != only:
            raise UserError(f"config.json has {name} {config[name]}, but Gemma is run with {only} only")
    return adapted


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.hidden_size // shape.num_heads,
        "max_position_embeddings": shape.max_length,
        "seq_length": shape.max_length,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    kv_size = hidden // shape.num_heads * shape.num_kv_heads
    weights = {"gemma.embed_tokens.weight": TensorSpec((shape.vocab_size, hidden))}
    for layer in range(shape.num_layers):
        prefix = f"gemma.layers.{layer}."
        weights |= {
            prefix + "self_attn.q_proj.weight": TensorSpec((hidden, hidden)),
            prefix + "self_attn.k_proj.weight": TensorSpec((hidden, kv_size)),
            prefix + "self_attn.v_proj.weight": TensorSpec((hidden, kv_size)),
            prefix + "self_attn.o_proj.weight": TensorSpec((hidden, hidden)),
            prefix + "mlp.gate_proj.weight": TensorSpec((hidden, inner)),
            prefix + "mlp.up_proj.weight": TensorSpec((hidden, inner)),
            prefix + "mlp.down_proj.weight": TensorSpec((inner, hidden)),
            prefix + "input_layernorm.weight": TensorSpec((hidden,), "zeros"),
            prefix + "post_attention_layernorm.weight": TensorSpec((hidden,), "zeros"),
        }
    weights["gemma.norm.weight"] = TensorSpec((hidden,), "zeros")
    return weights


GEMMA = register(
    Family(
        name="gemma",
        model_types=("gemma",),
        architectures=("GemmaForCausalLM",),
        model_class="finetune.models.gemma_layers.GemmaForCausalLM",
        # PaddleNLP's pipeline model computes the exact GELU, which Gemma was not trained with.
        pipeline_class=None,
        base_prefix="gemma",
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
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=("bos",),
            end_of_answer="eos",
            pad_fallback="<pad>",
            chat_ends=("<end_of_turn>",),
            vocab_files=("tokenizer.model",),
            tokenizer_class="paddlenlp.transformers.GemmaTokenizer",
        ),
        tiny=TinyRecipe(tokenizer="sentencepiece_gemma", config=_tiny_config, weights=_tiny_weights),
        fields=ConfigFields(num_kv_heads="num_key_value_heads", head_dim="head_dim"),
        parallel=ParallelLimits(tensor_divides=("num_attention_heads", "intermediate_size")),
        adapt_config=_adapt_config,
        argument_folder="llama",
    )
)
