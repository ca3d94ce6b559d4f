"""Llama 1, 2 and 3, with grouped-query attention, and the models that share its architecture."""

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
from finetune.models.rotary_config import check_head_dim, split_rotary

_LINEAR_SCALING = ("linear",)
_UNSCALED = (None, "default")


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Moves rotary settings to where PaddleNLP's LlamaConfig reads them.

    Newer Hugging Face folders keep `rope_theta` and the scaling inside `rope_parameters`, older ones
    keep the scaling in `rope_scaling`. PaddleNLP reads a top-level `rope_theta`, the Llama 3 scaling
    from `rope_scaling`, and linear scaling from two fields of its own; what it does not find there it
    silently replaces by its default.
    """
    adapted, rope = split_rotary(config)
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "llama3":
        adapted["rope_scaling"] = {**rope, "rope_type": "llama3"}
    elif kind in _LINEAR_SCALING:
        adapted["rope_scaling_type"] = "linear"
        adapted["rope_scaling_factor"] = rope["factor"]
    elif kind not in _UNSCALED:
        raise UserError(
            f"config.json asks for rotary scaling {kind!r}, which this stack cannot reproduce; allowed: "
            "none, linear, llama3. Use weights without that scaling"
        )
    check_head_dim(config)
    return adapted


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    kv_size = hidden // shape.num_heads * shape.num_kv_heads
    weights = {"llama.embed_tokens.weight": TensorSpec((shape.vocab_size, hidden))}
    for layer in range(shape.num_layers):
        prefix = f"llama.layers.{layer}."
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
    weights["llama.norm.weight"] = TensorSpec((hidden,), "ones")
    weights["lm_head.weight"] = TensorSpec((hidden, shape.vocab_size))
    return weights


LLAMA = register(
    Family(
        name="llama",
        model_types=("llama",),
        architectures=("LlamaForCausalLM", "LlamaForCausalLMPipe"),
        model_class="paddlenlp.transformers.LlamaForCausalLM",
        pipeline_class="paddlenlp.transformers.LlamaForCausalLMPipe",
        base_prefix="llama",
        lora_target_modules=(
            ".*q_proj.*",
            ".*v_proj.*",
            ".*k_proj.*",
            ".*o_proj.*",
            ".*qkv_proj.*",
            ".*gate_proj.*",
            ".*down_proj.*",
            ".*up_proj.*",
            ".*gate_up_fused_proj.*",
        ),
        embedding_module="embed_tokens",
        flash_mask=True,
        cpu_layers="finetune.models.cpu_layers.install_llama",
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=("bos",),
            end_of_answer="eos",
            pad_fallback="eos",
            chat_ends=("<|eot_id|>",),  # of Llama 3
            vocab_files=("sentencepiece.bpe.model", "tokenizer.model"),
            tokenizer_class="paddlenlp.transformers.LlamaTokenizer",
        ),
        tiny=TinyRecipe(tokenizer="sentencepiece", config=_tiny_config, weights=_tiny_weights),
        fields=ConfigFields(num_kv_heads="num_key_value_heads"),
        # Key and value heads that the degree does not divide are kept whole on every card, and so are
        # the embeddings when it does not divide the vocabulary: neither is a limit.
        parallel=ParallelLimits(tensor_divides=("num_attention_heads", "intermediate_size")),
        adapt_config=_adapt_config,
    )
)
