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
from finetune.models.gated_decoder import LINEAR_LAYERS, gated_decoder_config, gated_decoder_weights
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
    return gated_decoder_config(
        shape,
        model_type="gemma",
        architectures=["GemmaForCausalLM"],
        head_dim=shape.hidden_size // shape.num_heads,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return gated_decoder_weights(shape, "gemma", norm_fill="zeros", tied=True)


GEMMA = register(
    Family(
        name="gemma",
        model_types=("gemma",),
        architectures=("GemmaForCausalLM",),
        model_class="finetune.models.gemma_layers.GemmaForCausalLM",
        # PaddleNLP's pipeline model computes the exact GELU, which Gemma was not trained with.
        pipeline_class=None,
        base_prefix="gemma",
        lora_target_modules=LINEAR_LAYERS,
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
