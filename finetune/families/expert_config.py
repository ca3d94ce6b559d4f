"""What the records of families with experts share: fields of config.json, weights of tiny checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError
from finetune.families.expert_facts import ExpertFacts
from finetune.families.gated_decoder import require_values
from finetune.families.layer_windows import with_layer_windows
from finetune.families.rotary_config import with_scaling
from finetune.families.tiny_recipe import TensorSpec

EXPERT_FIELDS = (
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "output_router_logits",
    "router_aux_loss_coef",
    "shared_expert_intermediate_size",
)
"""Fields of config.json that say how experts are, as Qwen's models name them."""

JOINED_INNER_REFUSAL = {
    "fuse_attention_ffn": "the layers of experts stand apart in all files, and there is no rule that joins them"
}
"""Options that no family with experts has, and why."""


def adapt_qwen_experts(
    config: dict[str, Any], name: str, published: Mapping[str, Any], **allowed: Any
) -> dict[str, Any]:
    """Brings the rotary base to the top and adds what the file leaves out.

    Args:
        config: config.json in Qwen's fields, as found.
        name: Of the family, as users know it.
        published: What transformers takes for fields that are missing.
        **allowed: See `finetune.families.gated_decoder.require_values`.

    Raises:
        UserError: The configuration asks for what the layers do not compute, or contradicts itself.
    """
    require_values(config, name, hidden_act="silu", **allowed)
    given = {field: value for field, value in with_scaling(config).items() if value is not None}
    whole = {**published, **given}
    if "sliding_window" in config:
        whole["sliding_window"] = config["sliding_window"]  # null is none, and no field that is missing
    adapted = with_layer_windows(whole, num_layers=whole["num_hidden_layers"])
    check_chosen_experts(adapted, "num_experts")
    if adapted["decoder_sparse_step"] < 1:
        raise UserError(
            f"config.json has decoder_sparse_step {adapted['decoder_sparse_step']}, but layers with experts are "
            "counted from 1. Take the config.json that belongs to the weights"
        )
    return adapted


def expert_facts(config: Any) -> ExpertFacts:
    """The facts of a configuration with these fields, as PaddleNLP's object."""
    return ExpertFacts(
        num_routed=int(config.num_experts),
        num_chosen=int(config.num_experts_per_tok),
        inner_size=int(config.moe_intermediate_size),
        normalised=bool(config.norm_topk_prob),
        shared_size=getattr(config, "shared_expert_intermediate_size", None),
        sparse_step=int(config.decoder_sparse_step),
        dense_layers=tuple(config.mlp_only_layers or ()),
    )


def check_chosen_experts(config: Mapping[str, Any], field: str) -> None:
    """Compares how many experts a token passes with how many there are.

    Args:
        config: As adapted.
        field: That says how many there are.

    Raises:
        UserError: No model can have them.
    """
    num_experts, num_chosen = config[field], config["num_experts_per_tok"]
    if not 1 <= num_chosen <= num_experts:
        raise UserError(
            f"config.json has num_experts_per_tok {num_chosen}, but a layer has {num_experts} experts ({field}): "
            "a token can pass 1 to as many. Take the config.json that belongs to the weights"
        )


def with_experts(weights: Mapping[str, TensorSpec], prefix: str, facts: ExpertFacts) -> dict[str, TensorSpec]:
    """The weights of a tiny decoder, with experts in the place of feed-forward layers.

    Args:
        weights: With feed-forward layers in all layers.
        prefix: First part of the names.
        facts: How many experts, in which layers, how wide.
    """
    changed: dict[str, TensorSpec] = {}
    for name, spec in weights.items():
        layer, is_inner, part = name.partition(".mlp.")
        if not is_inner or not facts.has_experts(int(layer.removeprefix(f"{prefix}.layers."))):
            changed[name] = spec
        elif part == "gate_proj.weight":
            hidden = spec.shape[0]
            for each in facts.linear_layers():
                changed[f"{layer}.mlp.{each}.weight"] = TensorSpec(_shape(each, hidden, facts))
    return changed


def _shape(layer: str, hidden: int, facts: ExpertFacts) -> tuple[int, int]:
    """[in, out] of a linear layer of a feed-forward layer with experts."""
    if layer == "gate":
        return hidden, facts.num_routed
    if layer == "shared_expert_gate":
        return hidden, 1
    inner = facts.shared_size if layer.startswith("shared_expert.") else facts.inner_size
    if inner is None:
        raise ValueError("these facts know no shared expert")
    return (inner, hidden) if layer.endswith("down_proj") else (hidden, inner)
