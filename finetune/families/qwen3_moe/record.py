"""Qwen3-MoE: Qwen3's attention, and experts in most layers."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from finetune.errors import UserError
from finetune.families.expert_config import (
    EXPERT_FIELDS,
    JOINED_INNER_REFUSAL,
    adapt_qwen_experts,
    expert_facts,
    with_experts,
)
from finetune.families.expert_facts import ExpertFacts
from finetune.families.family import ConfigFields, Family, TokenizerFacts, register
from finetune.families.gated_decoder import (
    LINEAR_LAYERS,
    TENSOR_SPLITS,
    gated_decoder_config,
    gated_decoder_weights,
    sized_decoder_weights,
)
from finetune.families.layer_memory import LayerMemory
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.qwen2.tiny_tokenizer import QWEN2_TOKENIZER
from finetune.families.tiny_recipe import TensorSpec, TinyRecipe, TinyShape

_PUBLISHED = {
    "max_window_layers": 0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "router_aux_loss_coef": 0.001,
}
"""What transformers takes for fields that a config.json leaves out."""


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    kinds, first = set(config.get("layer_types") or ()), config.get("max_window_layers")
    if config.get("use_sliding_window") and (len(kinds) > 1 or (first and not kinds)):
        raise UserError(
            f"config.json gives a window to some layers (max_window_layers {first!r}, layer_types), which some versions of "
            "transformers give to those and others to all: set max_window_layers to 0 if all layers have it, or "
            "use_sliding_window to false if your texts are shorter than sliding_window "
            f"({config.get('sliding_window')})"
        )
    return adapt_qwen_experts(
        config, "Qwen3-MoE", _PUBLISHED, attention_bias=False, use_qk_norm=True, qkv_bias=False
    )


def _tiny_experts(shape: TinyShape) -> ExpertFacts:
    return ExpertFacts(num_routed=4, num_chosen=2, inner_size=shape.intermediate_size // 2, normalised=True)


def _head_dim(shape: TinyShape) -> int:
    # Published models have heads wider than hidden size / heads: the tiny one, too.
    return 2 * shape.hidden_size // shape.num_heads


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    experts = _tiny_experts(shape)
    return gated_decoder_config(
        shape,
        model_type="qwen3_moe",
        architectures=["Qwen3MoeForCausalLM"],
        head_dim=_head_dim(shape),
        rope_theta=1000000.0,
        use_sliding_window=False,
        attention_bias=False,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=experts.inner_size,
        norm_topk_prob=True,
        num_experts=experts.num_routed,
        num_experts_per_tok=experts.num_chosen,
        output_router_logits=False,
        router_aux_loss_coef=0.001,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    dense = gated_decoder_weights(shape, "qwen3_moe", head_dim=_head_dim(shape), head_norms=True)
    return with_experts(dense, "qwen3_moe", _tiny_experts(shape))


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    dense = sized_decoder_weights(config, "qwen3_moe", head_norms=True)
    return with_experts(dense, "qwen3_moe", expert_facts(SimpleNamespace(**config)))


QWEN3_MOE = register(
    Family(
        name="qwen3_moe",
        models="Qwen3-30B-A3B, -235B-A22B",
        model_types=("qwen3_moe",),
        architectures=("Qwen3MoeForCausalLM", "Qwen3MoeForCausalLMPipe"),
        model_class="finetune.families.qwen3_moe.layers.Qwen3MoeForCausalLM",
        base_prefix="qwen3_moe",
        lora_target_modules=(*LINEAR_LAYERS, ".*qkv_proj.*"),
        embedding_module="embed_tokens",
        fused_packing="rows",
        window_option="sliding_window",
        # Past keys and values: (batch, length, kv heads, head dim) per layer.
        prefix_postprocess="paddlenlp.peft.prefix.qwen_postprocess_past_key_value",
        tokenizer=TokenizerFacts(
            prefix=(),
            # "<|endoftext|>" in base models, "<|im_end|>" in the others: the folder says which.
            end_of_answer="eos",
            pad_fallback="<|endoftext|>",
            chat_ends=("<|im_end|>",),
            vocab_files=("vocab.json",),
            tokenizer_class="paddlenlp.transformers.Qwen2Tokenizer",
        ),
        weights=_weights,
        memory=LayerMemory(query=6, key_value=2),
        chat_template={"<|im_start|>": "qwen3"},
        tiny=TinyRecipe(tokenizer=QWEN2_TOKENIZER, config=_tiny_config, weights=_tiny_weights),
        fields=ConfigFields(num_kv_heads="num_key_value_heads", head_dim="head_dim", experts="num_experts"),
        # Embeddings are kept whole on every rank when the degree does not divide the vocabulary.
        parallel=ParallelLimits(
            tensor_divides=(
                "num_attention_heads",
                "num_key_value_heads",
                "intermediate_size",
                "moe_intermediate_size",
            )
        ),
        sequence_parallel=True,
        refused_options=JOINED_INNER_REFUSAL,
        argument_folder="qwen",
        adapt_config=_adapt_config,
        understood=(
            "layer_types",
            "qkv_bias",
            "rope_parameters",
            "rope_scaling",
            "use_qk_norm",
            *EXPERT_FIELDS,
        ),
        tensor_splits=TENSOR_SPLITS,
    )
)
