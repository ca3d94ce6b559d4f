"""Gemma 3, the text model: normed heads, windows in five of six layers, two rotary bases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError
from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import LINEAR_LAYERS, TENSOR_SPLITS, require_values
from finetune.families.gemma.chat_formats import GEMMA_FORMAT
from finetune.families.gemma.tokenizer_pieces import GEMMA_PIECES
from finetune.families.gemma2.published import (
    complete_gemma,
    sized_gemma_weights,
    tiny_gemma_config,
    tiny_gemma_weights,
)
from finetune.families.layer_memory import LayerMemory
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.rotary_config import with_scaling, without_scaling
from finetune.families.tiny_recipe import SentencePieceKind, TensorSpec, TinyRecipe, TinyShape

_PUBLISHED = {
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
"""What transformers takes for fields that a config.json leaves out."""


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Adds what the file leaves out: of `sliding_window_pattern` layers all but the last have a window."""
    # In transformers the field is there and has no effect: no one result would be right.
    require_values(config, "Gemma 3", attn_logit_softcapping=None)
    adapted = with_scaling(_one_base(config))
    pattern = adapted.get("sliding_window_pattern") or _PUBLISHED["sliding_window_pattern"]
    if not isinstance(pattern, int) or pattern < 1:
        raise UserError(f"sliding_window_pattern is {pattern!r}, but must be a whole number of 1 or more")
    return complete_gemma(
        adapted, "Gemma 3", defaults=_PUBLISHED, has_window=lambda number: (number + 1) % pattern > 0
    )


def _one_base(config: dict[str, Any]) -> dict[str, Any]:
    """Brings the settings of layers with a window, which transformers 5 keeps apart, to where version 4 has them."""
    by_kind = config.get("rope_parameters") or {}
    if "full_attention" not in by_kind:
        return config
    local = without_scaling({"rope_parameters": by_kind.get("sliding_attention")})
    moved = {**config, "rope_parameters": by_kind["full_attention"]}
    return moved | ({"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {})


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return tiny_gemma_config(
        shape,
        model_type="gemma3_text",
        architectures=["Gemma3ForCausalLM"],
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        sliding_window_pattern=2,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return tiny_gemma_weights(shape, "gemma3", head_norms=True)


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return sized_gemma_weights(config, "gemma3", head_norms=True)


GEMMA3 = register(
    Family(
        name="gemma3",
        models="Gemma 3 1B; 4B–27B (`text_only`)",
        model_types=("gemma3_text",),
        architectures=("Gemma3ForCausalLM",),
        model_class="finetune.families.gemma3.layers.Gemma3ForCausalLM",
        base_prefix="gemma3",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*", ".*gate_up_fused_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
        window_option="sliding_window",
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
        chat_template={"<start_of_turn>": "gemma3"},
        hugging_face=HuggingFaceForm(always_tied=True),
        weights=_weights,
        memory=LayerMemory(hidden=10, query=6, key_value=2, inner=4, norms=4),
        chat_formats={"gemma3": GEMMA_FORMAT},
        tiny=TinyRecipe(
            tokenizer=SentencePieceKind(pieces=GEMMA_PIECES, tokenizer_class="GemmaTokenizer"),
            config=_tiny_config,
            weights=_tiny_weights,
        ),
        fields=ConfigFields(num_kv_heads="num_key_value_heads", head_dim="head_dim"),
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        adapt_config=_adapt_config,
        understood=(
            *("attn_logit_softcapping", "final_logit_softcapping", "rope_parameters", "rope_scaling"),
            "use_bidirectional_attention",
        ),
        # Always tied, also where the config leaves that out.
        tensor_splits={**TENSOR_SPLITS, "lm_head": "vocabulary"},
        argument_folder="llama",
        left_out=_PUBLISHED | {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216},
    )
)
