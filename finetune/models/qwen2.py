"""Qwen2 and Qwen2.5: Llama's architecture with biases on queries, keys and values."""

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
    """Brings the rotary base to the top and refuses sliding windows, which PaddleNLP would ignore."""
    adapted = without_scaling(config)
    check_head_dim(config)
    windowed = "sliding_attention" in (config.get("layer_types") or ())
    first_windowed = config.get("max_window_layers", 28)
    if config.get("use_sliding_window") and first_windowed < config.get("num_hidden_layers", 32):
        windowed = True
    if windowed:
        raise UserError(
            f"config.json asks for sliding-window attention from layer {first_windowed} on, which PaddleNLP's "
            "Qwen2 does not compute; set use_sliding_window to false if your texts are shorter than "
            f"sliding_window ({config.get('sliding_window')}), or use other weights"
        )
    return adapted


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": shape.max_length,
        "seq_length": shape.max_length,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "use_cache": True,
    }


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    kv_size = hidden // shape.num_heads * shape.num_kv_heads
    weights = {"qwen2.embed_tokens.weight": TensorSpec((shape.vocab_size, hidden))}
    for layer in range(shape.num_layers):
        prefix = f"qwen2.layers.{layer}."
        for name, size in (("q", hidden), ("k", kv_size), ("v", kv_size)):
            weights[f"{prefix}self_attn.{name}_proj.weight"] = TensorSpec((hidden, size))
            weights[f"{prefix}self_attn.{name}_proj.bias"] = TensorSpec((size,), "zeros")
        weights |= {
            prefix + "self_attn.o_proj.weight": TensorSpec((hidden, hidden)),
            prefix + "mlp.gate_proj.weight": TensorSpec((hidden, inner)),
            prefix + "mlp.up_proj.weight": TensorSpec((hidden, inner)),
            prefix + "mlp.down_proj.weight": TensorSpec((inner, hidden)),
            prefix + "input_layernorm.weight": TensorSpec((hidden,), "ones"),
            prefix + "post_attention_layernorm.weight": TensorSpec((hidden,), "ones"),
        }
    weights["qwen2.norm.weight"] = TensorSpec((hidden,), "ones")
    weights["lm_head.weight"] = TensorSpec((hidden, shape.vocab_size))
    return weights


QWEN2 = register(
    Family(
        name="qwen2",
        model_types=("qwen2",),
        architectures=("Qwen2ForCausalLM", "Qwen2ForCausalLMPipe"),
        model_class="paddlenlp.transformers.Qwen2ForCausalLM",
        pipeline_class="paddlenlp.transformers.Qwen2ForCausalLMPipe",
        base_prefix="qwen2",
        lora_target_modules=(
            ".*q_proj.*",
            ".*k_proj.*",
            ".*v_proj.*",
            ".*o_proj.*",
            ".*qkv_proj.*",
            ".*gate_proj.*",
            ".*up_proj.*",
            ".*gate_up_fused_proj.*",
            ".*down_proj.*",
        ),
        embedding_module="embed_tokens",
        flash_mask=True,
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.qwen_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=(),
            # "<|endoftext|>" in base models, "<|im_end|>" in chat models: the folder says which.
            end_of_answer="eos",
            pad_fallback="<|endoftext|>",
            chat_ends=("<|im_end|>",),
            vocab_files=("vocab.json",),
            tokenizer_class="paddlenlp.transformers.Qwen2Tokenizer",
        ),
        tiny=TinyRecipe(tokenizer="byte_level_qwen2", config=_tiny_config, weights=_tiny_weights),
        fields=ConfigFields(num_kv_heads="num_key_value_heads"),
        parallel=ParallelLimits(tensor_divides=("num_attention_heads", "intermediate_size")),
        argument_folder="qwen",
        adapt_config=_adapt_config,
    )
)
