"""ERNIE 4.5 (dense): Llama's layout with wide heads, neighbouring places turned together, embeddings mostly tied."""

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
)
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.rotary_config import without_scaling
from finetune.families.tiny_recipe import SentencePieceKind, TensorSpec, TinyRecipe, TinyShape

_TINY_HEADS = 2  # times hidden size / heads: published models have heads wider than that

_PUBLISHED = {
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
"""What transformers takes for fields that a config.json leaves out."""


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Brings the rotary base to the top, adds what the file leaves out."""
    require_values(
        config, "ERNIE 4.5", use_bias=False, hidden_act="silu", use_rmsnorm=True, scale_qk_coeff=1.0
    )
    return _PUBLISHED | without_scaling(config)


def _head_dim(shape: TinyShape) -> int:
    return _TINY_HEADS * shape.hidden_size // shape.num_heads


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    return gated_decoder_config(
        shape,
        model_type="ernie4_5",
        architectures=["Ernie4_5ForCausalLM"],
        head_dim=_head_dim(shape),
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        use_bias=False,
        tie_word_embeddings=True,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return gated_decoder_weights(shape, "ernie4_5", head_dim=_head_dim(shape), tied=True)


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return sized_decoder_weights(config, "ernie4_5")


ERNIE4_5 = register(
    Family(
        name="ernie4_5",
        models="ERNIE 4.5 0.3B",
        model_types=("ernie4_5",),
        architectures=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
        model_class="finetune.families.ernie4_5.layers.Ernie4_5ForCausalLM",
        base_prefix="ernie4_5",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*", ".*gate_up_fused_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.llama_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=(),
            end_of_answer="eos",
            pad_fallback="<unk>",
            chat_ends=("<|end_of_sentence|>",),
            vocab_files=("sentencepiece.bpe.model", "tokenizer.model"),
            tokenizer_class="paddlenlp.transformers.LlamaTokenizer",
            own_class=True,
        ),
        chat_template={"<|begin_of_sentence|>": "ernie4_5"},
        hugging_face=HuggingFaceForm(always_tied=True),
        weights=_weights,
        chat_formats={
            "ernie4_5": ChatFormat(
                opening="<|begin_of_sentence|>",
                system="{content}\n",
                user="User: {content}\nAssistant: ",
                end="<|end_of_sentence|>",
                special_tokens=("<|begin_of_sentence|>", "<|end_of_sentence|>"),
            )
        },
        tiny=TinyRecipe(tokenizer=SentencePieceKind(), config=_tiny_config, weights=_tiny_weights),
        fields=ConfigFields(num_kv_heads="num_key_value_heads", head_dim="head_dim"),
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        argument_folder="llama",
        adapt_config=_adapt_config,
        # A bias that the output layer shares with the embedding: of models with biases only.
        understood=(
            "rope_parameters",
            "rope_scaling",
            "scale_qk_coeff",
            "use_rmsnorm",
            "weight_share_add_bias",
        ),
        tensor_splits=TENSOR_SPLITS,
    )
)
