"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B): Qwen2's attention, experts, and one for all tokens beside them."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

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
from finetune.families.parallel_limits import ParallelLimits
from finetune.families.qwen2.tiny_tokenizer import QWEN2_TOKENIZER
from finetune.families.tiny_recipe import TensorSpec, TinyRecipe, TinyShape

_PUBLISHED = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "qkv_bias": True,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
}
"""What transformers takes for fields that a config.json leaves out."""


def _adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    return adapt_qwen_experts(config, "Qwen2-MoE", _PUBLISHED)


def _tiny_experts(shape: TinyShape) -> ExpertFacts:
    inner = shape.intermediate_size // 2
    return ExpertFacts(num_routed=4, num_chosen=2, inner_size=inner, shared_size=shape.intermediate_size)


def _tiny_config(shape: TinyShape) -> dict[str, Any]:
    experts = _tiny_experts(shape)
    return gated_decoder_config(
        shape,
        model_type="qwen2_moe",
        architectures=["Qwen2MoeForCausalLM"],
        rope_theta=1000000.0,
        use_sliding_window=False,
        qkv_bias=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=experts.inner_size,
        norm_topk_prob=False,
        num_experts=experts.num_routed,
        num_experts_per_tok=experts.num_chosen,
        shared_expert_intermediate_size=experts.shared_size,
        output_router_logits=False,
        router_aux_loss_coef=0.001,
    )


def _tiny_weights(shape: TinyShape) -> dict[str, TensorSpec]:
    dense = gated_decoder_weights(shape, "qwen2_moe", qkv_bias=True)
    return with_experts(dense, "qwen2_moe", _tiny_experts(shape))


def _weights(config: Mapping[str, Any]) -> dict[str, TensorSpec]:
    dense = sized_decoder_weights(config, "qwen2_moe", qkv_bias=bool(config.get("qkv_bias", True)))
    return with_experts(dense, "qwen2_moe", expert_facts(SimpleNamespace(**config)))


QWEN2_MOE = register(
    Family(
        name="qwen2_moe",
        models="Qwen1.5-MoE, Qwen2-57B-A14B",
        model_types=("qwen2_moe",),
        architectures=("Qwen2MoeForCausalLM", "Qwen2MoeForCausalLMPipe"),
        model_class="finetune.families.qwen2_moe.layers.Qwen2MoeForCausalLM",
        base_prefix="qwen2_moe",
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
        chat_template={"<|im_start|>": "qwen2"},
        tiny=TinyRecipe(tokenizer=QWEN2_TOKENIZER, config=_tiny_config, weights=_tiny_weights),
        fields=ConfigFields(num_kv_heads="num_key_value_heads", experts="num_experts"),
        # Embeddings are kept whole on every rank when the degree does not divide the vocabulary.
        parallel=ParallelLimits(
            tensor_divides=(
                "num_attention_heads",
                "num_key_value_heads",
                "intermediate_size",
                "moe_intermediate_size",
                "shared_expert_intermediate_size",
            )
        ),
        sequence_parallel=True,
        refused_options=JOINED_INNER_REFUSAL,
        argument_folder="qwen",
        adapt_config=_adapt_config,
        understood=("head_dim", "layer_types", "rope_parameters", "rope_scaling", *EXPERT_FIELDS),
        tensor_splits=TENSOR_SPLITS,
    )
)
