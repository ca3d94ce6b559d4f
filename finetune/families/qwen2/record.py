"""Qwen2 and Qwen2.5: Llama's architecture with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError
from finetune.families.family import ConfigFields, Family, TokenizerFacts, register
from finetune.families.gated_decoder import (
    LINEAR_LAYERS,
    TENSOR_SPLITS,
    gated_decoder_config,
    gated_decoder_weights,
)
from finetune.families.gguf_form import GgufForm
from finetune.families.layer_memory import LayerMemory
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.rotary_config import check_head_dim, kind_of_scaling, with_scaling
from finetune.families.tiny_recipe import TensorSpec, TinyRecipe, TinyShape


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Brings the rotary base to the top and refuses sliding windows, which PaddleNLP would ignore."""
    adapted = with_scaling(config)
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


def _variant(config: Mapping[str, Any]) -> str | None:
    """The class for stretched rotary positions, which PaddleNLP's Qwen2 has not."""
    scaled = kind_of_scaling(dict(config)) is not None
    return "finetune.families.qwen2.own_layers.Qwen2ForCausalLM" if scaled else None


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return gated_decoder_config(
        shape,
        model_type="qwen2",
        architectures=["Qwen2ForCausalLM"],
        rope_theta=1000000.0,
        use_sliding_window=False,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return gated_decoder_weights(shape, "qwen2", qkv_bias=True)


QWEN2 = register(
    Family(
        name="qwen2",
        model_types=("qwen2",),
        architectures=("Qwen2ForCausalLM", "Qwen2ForCausalLMPipe"),
        model_class="finetune.families.qwen2.layers.Qwen2ForCausalLM",
        base_prefix="qwen2",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*", ".*gate_up_fused_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
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
        memory=LayerMemory(query=6.7, key_value=1.9, tables=2),
        tiny=TinyRecipe(tokenizer="byte_level_qwen2", config=_tiny_config, weights=_tiny_weights),
        fields=ConfigFields(num_kv_heads="num_key_value_heads"),
        # Embeddings are kept whole on every rank when the degree does not divide the vocabulary.
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        argument_folder="qwen",
        adapt_config=_adapt_config,
        variants=_variant,
        understood=(
            "head_dim",
            "layer_types",
            "partial_rotary_factor",
            "rope_parameters",
            "rope_scaling",
            "sliding_window",
        ),
        gguf=GgufForm("qwen2"),
        tensor_splits=TENSOR_SPLITS,
    )
)
