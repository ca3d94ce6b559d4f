"""Qwen3 (dense): Qwen2's layout with heads of a size of their own, normed before they are turned, and no biases."""

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
    require_values,
    sized_decoder_weights,
)
from finetune.families.gguf_form import GgufForm
from finetune.families.layer_memory import LayerMemory
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.rotary_config import with_scaling
from finetune.families.tiny_recipe import TensorSpec, TinyRecipe, TinyShape


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Brings the rotary base to the top; refuses windows, biases and activations that the layers do not compute."""
    adapted = with_scaling(config)
    windowed = "sliding_attention" in (config.get("layer_types") or ())
    if windowed or config.get("use_sliding_window"):
        raise UserError(
            "config.json asks for sliding-window attention, which this Qwen3 does not compute; set "
            "use_sliding_window to false if your texts are shorter than sliding_window "
            f"({config.get('sliding_window')}), or use other weights"
        )
    require_values(config, "Qwen3", attention_bias=False, hidden_act="silu")
    return adapted


def _head_dim(shape: TinyShape) -> int:
    # Published models have heads wider than hidden size / heads: the tiny one, too.
    return 2 * shape.hidden_size // shape.num_heads


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return gated_decoder_config(
        shape,
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        head_dim=_head_dim(shape),
        rope_theta=1000000.0,
        use_sliding_window=False,
        attention_bias=False,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return gated_decoder_weights(shape, "qwen3", head_dim=_head_dim(shape), head_norms=True)


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return sized_decoder_weights(config, "qwen3", head_norms=True)


QWEN3 = register(
    Family(
        name="qwen3",
        model_types=("qwen3",),
        architectures=("Qwen3ForCausalLM", "Qwen3ForCausalLMPipe"),
        model_class="finetune.families.qwen3.layers.Qwen3ForCausalLM",
        base_prefix="qwen3",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*", ".*gate_up_fused_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.qwen_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=(),
            # "<|endoftext|>" in base models, "<|im_end|>" in the others: the folder says which.
            end_of_answer="eos",
            pad_fallback="<|endoftext|>",
            chat_ends=("<|im_end|>",),
            vocab_files=("vocab.json",),
            tokenizer_class="paddlenlp.transformers.Qwen2Tokenizer",
        ),
        weights=_weights,
        memory=LayerMemory(query=6, key_value=2),
        tiny=TinyRecipe(tokenizer="byte_level_qwen2", config=_tiny_config, weights=_tiny_weights),
        fields=ConfigFields(num_kv_heads="num_key_value_heads", head_dim="head_dim"),
        # Embeddings are kept whole on every rank when the degree does not divide the vocabulary.
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        argument_folder="qwen",
        adapt_config=_adapt_config,
        understood=("layer_types", "rope_parameters", "rope_scaling"),
        gguf=GgufForm("qwen3"),
        tensor_splits=TENSOR_SPLITS,
    )
)
