"""Gemma 2: windows in every second layer, caps on scores and logits, four norms in a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import LINEAR_LAYERS, TENSOR_SPLITS
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
from finetune.families.rotary_config import without_scaling
from finetune.families.tiny_recipe import SentencePieceKind, TensorSpec, TinyRecipe, TinyShape

_PUBLISHED = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
}
"""What transformers takes for fields that a config.json leaves out."""


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Adds what the file leaves out: the first layer has a window, the second none, and so on."""
    adapted = without_scaling(config)
    return complete_gemma(adapted, "Gemma 2", defaults=_PUBLISHED, has_window=lambda number: number % 2 == 0)


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return tiny_gemma_config(
        shape,
        model_type="gemma2",
        architectures=["Gemma2ForCausalLM"],
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return tiny_gemma_weights(shape, "gemma2")


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return sized_gemma_weights(config, "gemma2")


GEMMA2 = register(
    Family(
        name="gemma2",
        models="Gemma 2 2B, 9B, 27B",
        model_types=("gemma2",),
        architectures=("Gemma2ForCausalLM",),
        model_class="finetune.families.gemma2.layers.Gemma2ForCausalLM",
        base_prefix="gemma2",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*", ".*gate_up_fused_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="block",
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
        chat_template={"<start_of_turn>": "gemma2"},
        hugging_face=HuggingFaceForm(always_tied=True),
        weights=_weights,
        memory=LayerMemory(hidden=10, inner=4, scores=2, norms=4),
        chat_formats={"gemma2": GEMMA_FORMAT},
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
        understood=("rope_parameters", "rope_scaling", "use_bidirectional_attention"),
        # Always tied, also where the config leaves that out.
        tensor_splits={**TENSOR_SPLITS, "lm_head": "vocabulary"},
        argument_folder="llama",
    )
)
