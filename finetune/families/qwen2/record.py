"""Qwen2 and Qwen2.5: Llama's architecture with biases on queries, keys and values."""

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
)
from finetune.families.gguf_form import GgufForm
from finetune.families.layer_memory import LayerMemory
from finetune.families.layer_windows import windowed_layers, with_layer_windows
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.qwen.chat_formats import QWEN_FORMAT
from finetune.families.qwen2.tiny_tokenizer import QWEN2_TOKENIZER
from finetune.families.rotary_config import check_head_dim, kind_of_scaling, with_scaling
from finetune.families.tiny_recipe import TensorSpec, TinyRecipe, TinyShape

_NUM_LAYERS = 32  # where a config.json does not say


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Brings the rotary base to the top, and the window to null where no layer has it; refuses activations."""
    require_values(config, "Qwen2", hidden_act="silu")
    adapted = with_layer_windows(with_scaling(config), num_layers=_NUM_LAYERS)
    check_head_dim(config)
    return adapted


def _variant(config: Mapping[str, Any]) -> str | None:
    """The class for stretched rotary positions and for windows, which PaddleNLP's Qwen2 has not."""
    num_layers = config.get("num_hidden_layers", _NUM_LAYERS)
    is_own = kind_of_scaling(dict(config)) is not None or any(windowed_layers(config, num_layers))
    return "finetune.families.qwen2.own_layers.Qwen2ForCausalLM" if is_own else None


_LEFT_OUT = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
}
"""What transformers takes for fields that the configuration of a larger model leaves out of its text part."""


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
        models="Qwen1.5, Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen",
        model_types=("qwen2",),
        architectures=("Qwen2ForCausalLM", "Qwen2ForCausalLMPipe"),
        model_class="finetune.families.qwen2.layers.Qwen2ForCausalLM",
        base_prefix="qwen2",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*", ".*gate_up_fused_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
        window_option="sliding_window",
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
        chat_template={"<｜Assistant｜>": "deepseek_r1", "<tool_call>": "qwen2.5", "<|im_start|>": "qwen2"},
        chat_formats={"qwen2": QWEN_FORMAT},
        tiny=TinyRecipe(tokenizer=QWEN2_TOKENIZER, config=_tiny_config, weights=_tiny_weights),
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
            "max_window_layers",
            "partial_rotary_factor",
            "rope_parameters",
            "rope_scaling",
            "sliding_window",
        ),
        gguf=GgufForm("qwen2"),
        left_out=_LEFT_OUT,
        tensor_splits=TENSOR_SPLITS,
    )
)
