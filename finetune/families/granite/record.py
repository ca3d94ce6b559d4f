"""Granite 3 (dense): Llama's layout with four factors; a tokenizer.json of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.families.chat_format import ChatFormat
from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import (
    LINEAR_LAYERS,
    TENSOR_SPLITS,
    gated_decoder_config,
    gated_decoder_weights,
    require_values,
    sized_decoder_weights,
    with_padding_field,
)
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.rotary_config import with_scaling
from finetune.families.text_patterns import GPT2_PATTERN
from finetune.families.tiny_recipe import ByteLevelKind, TensorSpec, TinyRecipe, TinyShape

_FACTORS = dict.fromkeys(
    ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"), 1.0
)
_PUBLISHED = {
    **_FACTORS,
    "attention_bias": False,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""What transformers takes for fields that a config.json leaves out."""


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Brings the rotary base to the top, adds what the file leaves out."""
    require_values(config, "Granite", hidden_act="silu")
    return _PUBLISHED | {name: value for name, value in with_scaling(config).items() if value is not None}


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return gated_decoder_config(
        shape,
        model_type="granite",
        architectures=["GraniteForCausalLM"],
        attention_bias=False,
        mlp_bias=False,
        # Published factors are further from those that change nothing.
        embedding_multiplier=4.0,
        attention_multiplier=2.0 * shape.num_heads / shape.hidden_size,
        residual_multiplier=0.5,
        logits_scaling=2.0,
        tie_word_embeddings=True,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return gated_decoder_weights(shape, "granite", tied=True)


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    has_bias = bool(config["attention_bias"])
    return sized_decoder_weights(
        config, "granite", qkv_bias=has_bias, output_bias=has_bias, inner_bias=bool(config["mlp_bias"])
    )


GRANITE = register(
    Family(
        name="granite",
        models="Granite 3.0–3.3",
        model_types=("granite",),
        architectures=("GraniteForCausalLM",),
        model_class="finetune.families.granite.layers.GraniteForCausalLM",
        base_prefix="granite",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*", ".*gate_up_fused_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=(),
            end_of_answer="eos",
            pad_fallback="eos",
            vocab_files=("tokenizer.json",),
            tokenizer_class="finetune.families.json_tokenizer.JsonTokenizer",
            own_class=True,
            opened_by_file=True,
        ),
        chat_template={"<|start_of_role|>": "granite"},
        hugging_face=HuggingFaceForm(config=with_padding_field),
        weights=_weights,
        chat_formats={
            "granite": ChatFormat(
                system="<|start_of_role|>system<|end_of_role|>{content}<|end_of_text|>\n",
                user=(
                    "<|start_of_role|>user<|end_of_role|>{content}<|end_of_text|>\n"
                    "<|start_of_role|>assistant<|end_of_role|>"
                ),
                end="<|end_of_text|>",
                after="\n",
                special_tokens=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
            )
        },
        tiny=TinyRecipe(
            tokenizer=ByteLevelKind(
                special_tokens=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
                roles=dict.fromkeys(("bos", "eos", "pad", "unk"), "<|end_of_text|>"),
                pattern=GPT2_PATTERN,
                special_first=True,
                one_file=True,
                settings={"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False},
            ),
            config=_tiny_config,
            weights=_tiny_weights,
        ),
        fields=ConfigFields(num_kv_heads="num_key_value_heads", head_dim="head_dim"),
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        argument_folder="llama",
        adapt_config=_adapt_config,
        understood=("rope_parameters", "rope_scaling"),
        tensor_splits=TENSOR_SPLITS,
    )
)
