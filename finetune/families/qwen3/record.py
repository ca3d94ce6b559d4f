"""Qwen3 (dense): Qwen2's layout with heads of a size of their own, normed before they are turned, and no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
from finetune.families.layer_windows import with_layer_windows
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.qwen2.tiny_tokenizer import QWEN2_TOKENIZER
from finetune.families.rotary_config import with_scaling
from finetune.families.tiny_recipe import TensorSpec, TinyRecipe, TinyShape

_NUM_LAYERS = 32  # where a config.json does not say

_PUBLISHED = {
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
}
"""What transformers takes for fields that a config.json leaves out."""


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Brings the rotary base to the top, and the window to null where no layer has it; refuses biases and activations."""
    require_values(config, "Qwen3", attention_bias=False, hidden_act="silu", use_qk_norm=True, qkv_bias=False)
    return with_layer_windows(_PUBLISHED | with_scaling(config), num_layers=_NUM_LAYERS)


_LEFT_OUT = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    **_PUBLISHED,
}
"""The same for fields that the configuration of a larger model leaves out of its text part."""


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
        models="Qwen3 0.6B–32B",
        model_types=("qwen3",),
        architectures=("Qwen3ForCausalLM", "Qwen3ForCausalLMPipe"),
        model_class="finetune.families.qwen3.layers.Qwen3ForCausalLM",
        base_prefix="qwen3",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*", ".*gate_up_fused_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
        window_option="sliding_window",
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
        chat_template={"<｜Assistant｜>": "deepseek_r1", "<|im_start|>": "qwen3"},
        tiny=TinyRecipe(tokenizer=QWEN2_TOKENIZER, config=_tiny_config, weights=_tiny_weights),
        fields=ConfigFields(num_kv_heads="num_key_value_heads", head_dim="head_dim"),
        # Embeddings are kept whole on every rank when the degree does not divide the vocabulary.
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        argument_folder="qwen",
        adapt_config=_adapt_config,
        understood=(
            "layer_types",
            "max_window_layers",
            "qkv_bias",
            "rope_parameters",
            "rope_scaling",
            "use_qk_norm",
            "sliding_window",
        ),
        gguf=GgufForm("qwen3"),
        left_out=_LEFT_OUT,
        tensor_splits=TENSOR_SPLITS,
    )
)
