"""Mistral 7B and what shares its architecture."""

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
from finetune.families.layer_windows import with_layer_windows
from finetune.families.mistral.chat_formats import CHAT_FORMATS
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.rotary_config import with_scaling
from finetune.families.tiny_recipe import SentencePieceKind, TensorSpec, TinyRecipe, TinyShape

_LEFT_OUT_HERE = {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
"""What transformers takes for fields that a config.json leaves out and no weight tells; a window of null is none."""


_MINISTRAL = "ministral"
_ALL_LAYERS = {"use_sliding_window": True, "max_window_layers": 0}


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Adds what the file leaves out; Ministral's says which layers have the window, else all have it."""
    require_values(config, "Mistral", hidden_act="silu")
    adapted = {**_LEFT_OUT_HERE, **with_scaling(config)}
    if config.get("model_type") != _MINISTRAL:
        _check_layers(adapted)
        return adapted
    narrow = with_layer_windows(adapted | _ALL_LAYERS, num_layers=int(_LEFT_OUT["num_hidden_layers"]))
    return {name: value for name, value in narrow.items() if name not in _ALL_LAYERS}


def _check_layers(config: Mapping[str, Any]) -> None:
    """Mistral has its window in all layers or in none, whatever their list says."""
    kinds = set(config.get("layer_types") or ())
    if kinds and kinds != {"sliding_attention" if config["sliding_window"] else "full_attention"}:
        raise UserError(
            f"config.json has layer_types of {', '.join(sorted(map(str, kinds)))}, but model_type mistral with sliding_window "
            f"{config['sliding_window']!r}: set model_type to ministral if some layers have the window"
        )


def _variant(config: Mapping[str, Any]) -> str | None:
    is_ministral = config.get("model_type") == _MINISTRAL
    return "finetune.families.mistral.layers.MinistralForCausalLM" if is_ministral else None


_LEFT_OUT = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    **_LEFT_OUT_HERE,
}
"""The same for fields that the configuration of a larger model leaves out of its text part."""


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return gated_decoder_config(
        shape,
        model_type="mistral",
        architectures=["MistralForCausalLM"],
        rms_norm_eps=1e-5,
        sliding_window=None,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return gated_decoder_weights(shape, "mistral")


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return sized_decoder_weights(config, "mistral")


MISTRAL = register(
    Family(
        name="mistral",
        models="Mistral 7B, Nemo, Small, Ministral",
        model_types=("mistral", _MINISTRAL),
        architectures=("MistralForCausalLM", "MinistralForCausalLM"),
        model_class="finetune.families.mistral.layers.MistralForCausalLM",
        variants=_variant,
        base_prefix="mistral",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*", ".*gate_up_fused_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
        window_option="sliding_window",
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=("bos",),
            end_of_answer="eos",
            pad_fallback="eos",
            vocab_files=("sentencepiece.bpe.model", "tokenizer.model"),
            tokenizer_class="paddlenlp.transformers.LlamaTokenizer",
            reads_add_bos=True,
        ),
        weights=_weights,
        chat_template={
            "[SYSTEM_PROMPT]": "mistral_small",
            "<SPECIAL_20>": "mistral_nemo",
            "[TOOL_CALLS]": "mistral_v3",
            "<s>": "mistral",
        },
        chat_formats=CHAT_FORMATS,
        tiny=TinyRecipe(tokenizer=SentencePieceKind(), config=_tiny_config, weights=_tiny_weights),
        fields=ConfigFields(num_kv_heads="num_key_value_heads", head_dim="head_dim"),
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        adapt_config=_adapt_config,
        understood=("head_dim", "layer_types", "partial_rotary_factor", "rope_parameters", "rope_scaling"),
        gguf=GgufForm("llama", interleaved=True),
        left_out=_LEFT_OUT,
        tensor_splits=TENSOR_SPLITS,
        argument_folder="llama",
    )
)
