"""Gemma 1: tied embeddings, wide heads, tanh-GELU, norm weights stored as differences from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError
from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import (
    LINEAR_LAYERS,
    TENSOR_SPLITS,
    gated_decoder_config,
    gated_decoder_weights,
    require_values,
    sized_decoder_weights,
)
from finetune.families.gemma.chat_formats import GEMMA_FORMAT
from finetune.families.gemma.tokenizer_pieces import GEMMA_PIECES
from finetune.families.layer_memory import LayerMemory
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.rotary_config import without_scaling
from finetune.families.tiny_recipe import SentencePieceKind, TensorSpec, TinyRecipe, TinyShape

_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Refuses what is computed in one way here: another activation, biases, an output layer of its own.

    `hidden_act` "gelu", which the first published configs have, means the tanh approximation that the
    weights were trained with. `hidden_activation` "gelu" asks some releases of transformers for the exact
    function and is ignored by others, so no one result would be right.
    """
    adapted = without_scaling(config)
    require_values(config, "Gemma", alibi=False)
    for name, allowed in (("hidden_activation", _TANH_GELU), ("hidden_act", (*_TANH_GELU, "gelu"))):
        if config.get(name) is not None and config[name] not in allowed:
            raise UserError(
                f"config.json has {name} {config[name]!r}; allowed for Gemma: {', '.join(allowed)}. "
                "Use other weights, or gelu_pytorch_tanh if these were trained with it"
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


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return sized_decoder_weights(config, "gemma", tied=True)


GEMMA = register(
    Family(
        name="gemma",
        models="Gemma 2B, 7B",
        model_types=("gemma",),
        architectures=("GemmaForCausalLM",),
        model_class="finetune.families.gemma.layers.GemmaForCausalLM",
        base_prefix="gemma",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*", ".*gate_up_fused_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=("bos",),
            end_of_answer="eos",
            pad_fallback="<pad>",
            chat_ends=("<end_of_turn>",),
            vocab_files=("tokenizer.model",),
            tokenizer_class="paddlenlp.transformers.GemmaTokenizer",
            reads_add_bos=True,
        ),
        chat_template={"<start_of_turn>": "gemma"},
        hugging_face=HuggingFaceForm(always_tied=True),
        weights=_weights,
        memory=LayerMemory(inner=4),
        chat_formats={"gemma": GEMMA_FORMAT},
        tiny=TinyRecipe(
            tokenizer=SentencePieceKind(pieces=GEMMA_PIECES, tokenizer_class="GemmaTokenizer"),
            config=_tiny_config,
            weights=_tiny_weights,
        ),
        fields=ConfigFields(num_kv_heads="num_key_value_heads", head_dim="head_dim"),
        # Whole embeddings and key and value heads: see llama.py.
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        adapt_config=_adapt_config,
        understood=("alibi", "attention_bias", "rope_parameters", "rope_scaling"),
        # Always tied, also where the config leaves that out.
        tensor_splits={**TENSOR_SPLITS, "lm_head": "vocabulary"},
        argument_folder="llama",
    )
)
