"""Baichuan 7B and 13B: Llama's architecture with joined projections; distances (ALiBi) in the models of 13B."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.families.baichuan.config import DISTANCES, FIRST, adapt_config, is_second, published_config
from finetune.families.chat_format import ChatFormat
from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import (
    TENSOR_SPLITS,
    gated_decoder_config,
    gated_decoder_weights,
    join_input_layers,
)
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.tiny_recipe import LLAMA_PIECES, SentencePieceKind, TensorSpec, TinyRecipe, TinyShape


def _covers(config: Mapping[str, Any], _folder: Path | None) -> bool:
    return is_second(config) is not True


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    return adapt_config(config, normed_head=False)


def _to_hugging_face(config: dict[str, Any]) -> dict[str, Any]:
    has_distances = config.get(DISTANCES)
    return published_config(
        config, architecture="BaichuanForCausalLM" if has_distances else "BaiChuanForCausalLM"
    )


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return gated_decoder_config(
        shape,
        model_type="baichuan",
        architectures=["BaichuanForCausalLM"],
        has_distances=False,
        normed_head=False,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return join_input_layers(gated_decoder_weights(shape, "baichuan"))


BAICHUAN = register(
    Family(
        name="baichuan",
        models="Baichuan 7B, 13B",
        model_types=("baichuan",),
        architectures=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
        model_class="finetune.families.baichuan.layers.BaichuanForCausalLM",
        base_prefix="baichuan",
        lora_target_modules=(
            *(".*query_key_value_proj.*", ".*o_proj.*", ".*gate_proj.*", ".*up_proj.*", ".*down_proj.*"),
            ".*gate_up_fused_proj.*",
        ),
        embedding_module="embed_tokens",
        fused_packing="rows",
        distance_option=DISTANCES,
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=(),
            end_of_answer="eos",
            pad_fallback="<unk>",
            vocab_files=("tokenizer.model",),
            tokenizer_class="finetune.families.baichuan.tokenizer.BaichuanTokenizer",
            own_class=True,
            reads_add_bos=True,
        ),
        chat_template="baichuan",
        hugging_face=HuggingFaceForm(
            pairs=(("layers.{}.self_attn.W_pack", "layers.{}.self_attn.query_key_value_proj"),),
            config=_to_hugging_face,
            needs_files="configuration_baichuan.py and modeling_baichuan.py of the published Baichuan",
        ),
        chat_formats={
            "baichuan": ChatFormat(
                user="<reserved_102>{content}<reserved_103>",
                special_tokens=("<reserved_102>", "<reserved_103>"),
            )
        },
        tiny=TinyRecipe(
            tokenizer=SentencePieceKind(
                pieces={**LLAMA_PIECES, "user_defined_symbols": ["<reserved_102>", "<reserved_103>"]},
                tokenizer_class="BaichuanTokenizer",
                settings={"add_bos_token": False, "pad_token": "<unk>"},
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
        covers=_covers,
        told_by=f"vocab_size {FIRST}",
        tensor_splits=TENSOR_SPLITS | {"query_key_value_proj": "query_key_value"},
    )
)
