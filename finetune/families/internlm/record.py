"""InternLM 7B and 20B of the first generation: Llama's architecture, with biases in the models of 7B."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.families.chat_format import ChatFormat
from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import (
    LINEAR_LAYERS,
    TENSOR_SPLITS,
    gated_decoder_config,
    gated_decoder_weights,
    require_values,
    sized_decoder_weights,
)
from finetune.families.internlm.generations import FIRST, names_generation
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.rotary_config import check_head_dim, without_scaling
from finetune.families.tiny_recipe import LLAMA_PIECES, SentencePieceKind, TensorSpec, TinyRecipe, TinyShape

# "dynamic" stretches positions in texts longer than the model's positions, which are refused.
_ROTARY_KINDS = (None, "origin", "dynamic")


def _covers(config: Mapping[str, Any], _folder: Path | None) -> bool:
    """Early folders of InternLM2 have the same `model_type`."""
    return names_generation(config) in (FIRST, None)


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Brings the rotary base to the top; refuses what the layers do not compute."""
    require_values(config, "InternLM", hidden_act="silu")
    check_head_dim(config)
    adapted = without_scaling(config)
    rotary = adapted.pop("rotary", None) or {}
    if rotary.get("type") not in _ROTARY_KINDS:
        raise UserError(
            f"config.json asks for rotary positions of type {rotary['type']!r}, which this stack cannot reproduce; "
            "allowed: origin, dynamic. Use other weights"
        )
    return adapted | ({"rope_theta": rotary["base"]} if "base" in rotary else {})


def _to_hugging_face(config: dict[str, Any]) -> dict[str, Any]:
    rotary = {"base": config.get("rope_theta", 10000), "type": "dynamic"}
    return {**config, "rotary": rotary, "architectures": ["InternLMForCausalLM"]}


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return gated_decoder_config(
        shape,
        model_type="internlm",
        architectures=["InternLMForCausalLM"],
        bias=True,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return gated_decoder_weights(shape, "internlm", qkv_bias=True, output_bias=True)


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    has_bias = bool(config.get("bias", True))
    return sized_decoder_weights(config, "internlm", qkv_bias=has_bias, output_bias=has_bias)


INTERNLM = register(
    Family(
        name="internlm",
        models="InternLM 7B, 20B",
        model_types=("internlm",),
        architectures=("InternLMForCausalLM",),
        model_class="finetune.families.internlm.layers.InternLMForCausalLM",
        base_prefix="internlm",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*", ".*gate_up_fused_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=("bos",),
            end_of_answer="eos",
            pad_fallback="eos",
            chat_ends=("<eoa>",),
            vocab_files=("tokenizer.model",),
            tokenizer_class="finetune.families.internlm.tokenizer.InternLMTokenizer",
            own_class=True,
            reads_add_bos=True,
        ),
        chat_template="internlm",
        hugging_face=HuggingFaceForm(
            config=_to_hugging_face,
            needs_files="configuration_internlm.py and modeling_internlm.py of the published InternLM",
        ),
        weights=_weights,
        chat_formats={
            "internlm": ChatFormat(
                system="<|System|>:{content}\n",
                user="<|User|>:{content}\n<|Bot|>:",
                end="<eoa>",
                after="\n",
                special_tokens=("<eoa>",),
            ),
            "internlm_eoh": ChatFormat(  # of the first InternLM-chat-7B
                system="<|System|>:{content}\n",
                user="<|User|>:{content}<eoh>\n<|Bot|>:",
                end="<eoa>",
                after="\n",
                special_tokens=("<eoh>", "<eoa>"),
            ),
        },
        tiny=TinyRecipe(
            tokenizer=SentencePieceKind(
                pieces={**LLAMA_PIECES, "user_defined_symbols": ["<eoh>", "<eoa>"]},
                tokenizer_class="InternLMTokenizer",
            ),
            config=_tiny_config,
            weights=_tiny_weights,
            grouped_heads=False,
        ),
        fields=ConfigFields(num_kv_heads="num_key_value_heads"),
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        argument_folder="llama",
        adapt_config=_adapt_config,
        understood=("bias", "rope_scaling", "rope_theta", "rotary"),
        covers=_covers,
        told_by=f"architectures or auto_map name {FIRST}...",
        tensor_splits=TENSOR_SPLITS,
    )
)
