"""Mixtral 8x7B and 8x22B: Mistral's attention, and experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.families.expert_config import JOINED_INNER_REFUSAL, check_chosen_experts, with_experts
from finetune.families.expert_facts import ExpertFacts
from finetune.families.family import ConfigFields, Family, HuggingFaceForm, TokenizerFacts, register
from finetune.families.gated_decoder import (
    LINEAR_LAYERS,
    TENSOR_SPLITS,
    gated_decoder_config,
    gated_decoder_weights,
    require_values,
    sized_decoder_weights,
)
from finetune.families.mistral.chat_formats import CHAT_FORMATS
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.rotary_config import with_scaling
from finetune.families.tiny_recipe import SentencePieceKind, TensorSpec, TinyRecipe, TinyShape

_PUBLISHED = {
    "max_position_embeddings": 131072,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "router_aux_loss_coef": 0.001,
}
"""What transformers takes for fields that a config.json leaves out."""

_EXPERT = "layers.{}.block_sparse_moe.experts.{}"
_NAMES = (
    ("layers.{}.block_sparse_moe.gate", "layers.{}.mlp.gate"),
    (f"{_EXPERT}.w1", "layers.{}.mlp.experts.{}.gate_proj"),
    (f"{_EXPERT}.w2", "layers.{}.mlp.experts.{}.down_proj"),
    (f"{_EXPERT}.w3", "layers.{}.mlp.experts.{}.up_proj"),
)


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Adds what the file leaves out; null means no window."""
    require_values(config, "Mixtral", hidden_act="silu")
    given = {field: value for field, value in with_scaling(config).items() if value is not None}
    adapted = {**_PUBLISHED, **given, "sliding_window": config.get("sliding_window")}
    check_chosen_experts(adapted, "num_local_experts")
    return adapted


def _tiny_experts(shape: TinyShape) -> ExpertFacts:
    return ExpertFacts(num_routed=4, num_chosen=2, inner_size=shape.intermediate_size, normalised=True)


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    experts = _tiny_experts(shape)
    return gated_decoder_config(
        shape,
        model_type="mixtral",
        architectures=["MixtralForCausalLM"],
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        num_local_experts=experts.num_routed,
        num_experts_per_tok=experts.num_chosen,
        output_router_logits=False,
        router_aux_loss_coef=0.02,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    return with_experts(gated_decoder_weights(shape, "mixtral"), "mixtral", _tiny_experts(shape))


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    experts = ExpertFacts(
        num_routed=int(config["num_local_experts"]),
        num_chosen=int(config["num_experts_per_tok"]),
        inner_size=int(config["intermediate_size"]),
    )
    return with_experts(sized_decoder_weights(config, "mixtral"), "mixtral", experts)


MIXTRAL = register(
    Family(
        name="mixtral",
        models="Mixtral 8x7B, 8x22B",
        model_types=("mixtral",),
        architectures=("MixtralForCausalLM",),
        model_class="finetune.families.mixtral.layers.MixtralForCausalLM",
        base_prefix="mixtral",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*"),
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
        chat_template="mixtral",
        hugging_face=HuggingFaceForm(pairs=_NAMES),
        weights=_weights,
        chat_formats={"mixtral": CHAT_FORMATS["mistral"]},
        tiny=TinyRecipe(tokenizer=SentencePieceKind(), config=_tiny_config, weights=_tiny_weights),
        fields=ConfigFields(
            num_kv_heads="num_key_value_heads", head_dim="head_dim", experts="num_local_experts"
        ),
        # Embeddings are kept whole on every rank when the degree does not divide the vocabulary.
        parallel=ParallelLimits(
            tensor_divides=("num_attention_heads", "num_key_value_heads", "intermediate_size")
        ),
        sequence_parallel=True,
        refused_options=JOINED_INNER_REFUSAL,
        argument_folder="llama",
        adapt_config=_adapt_config,
        understood=("head_dim", "rope_parameters", "rope_scaling"),
        tensor_splits=TENSOR_SPLITS,
    )
)
