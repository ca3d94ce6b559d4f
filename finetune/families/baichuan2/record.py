"""Baichuan 2 7B and 13B: Baichuan with an output layer whose weights are divided by their length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.families.baichuan.config import SECOND, adapt_config, is_second, published_config
from finetune.families.baichuan.record import BAICHUAN
from finetune.families.chat_format import ChatFormat
from finetune.families.family import register
from finetune.families.gated_decoder import gated_decoder_config, gated_decoder_weights, join_input_layers
from finetune.families.tiny_recipe import LLAMA_PIECES, SentencePieceKind, TensorSpec, TinyShape


def _covers(config: Mapping[str, Any], _folder: Path | None) -> bool:
    return is_second(config) is not False


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    return adapt_config(config, normed_head=True) | {"model_type": "baichuan2"}


def _to_hugging_face(config: dict[str, Any]) -> dict[str, Any]:
    return {"z_loss_weight": 0, **published_config(config, architecture="BaichuanForCausalLM")}


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    # As the models of 13B.
    return gated_decoder_config(
        shape,
        model_type="baichuan2",
        architectures=["Baichuan2ForCausalLM"],
        has_distances=True,
        normed_head=True,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return join_input_layers(gated_decoder_weights(shape, "baichuan2"))


BAICHUAN2 = register(
    replace(
        BAICHUAN,
        name="baichuan2",
        models="Baichuan 2 7B, 13B",
        model_types=("baichuan2", "baichuan"),
        architectures=("Baichuan2ForCausalLM", "BaichuanForCausalLM"),
        model_class="finetune.families.baichuan2.layers.Baichuan2ForCausalLM",
        base_prefix="baichuan2",
        chat_template="baichuan2",
        hugging_face=replace(
            BAICHUAN.hugging_face,
            config=_to_hugging_face,
            needs_files="configuration_baichuan.py and modeling_baichuan.py of the published Baichuan 2",
        ),
        chat_formats={
            "baichuan2": ChatFormat(
                user="<reserved_106>{content}<reserved_107>",
                special_tokens=("<reserved_106>", "<reserved_107>"),
            )
        },
        tiny=replace(
            BAICHUAN.tiny,
            tokenizer=SentencePieceKind(
                pieces={
                    **LLAMA_PIECES,
                    "user_defined_symbols": ["<reserved_106>", "<reserved_107>"],
                    "add_dummy_prefix": False,
                },
                tokenizer_class="BaichuanTokenizer",
                settings={"add_bos_token": False, "pad_token": "<unk>"},
            ),
            config=_tiny_config,
            weights=_tiny_weights,
        ),
        adapt_config=_adapt_config,
        covers=_covers,
        told_by=f"vocab_size {SECOND}, or z_loss_weight",
    )
)
