"""Rotary settings of config.json in the three places where Hugging Face versions keep them."""

from __future__ import annotations

from typing import Any

from finetune.errors import UserError

_UNSCALED = (None, "default")


def split_rotary(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes the rotary settings out of a config.

    transformers 5 writes `rope_parameters` with the base and the scaling in it, older versions a
    top-level `rope_theta` and `rope_scaling`.

    Returns:
        The config without the nested settings and with `rope_theta` at the top where it was given, and
        the scaling settings (empty when there are none).
    """
    adapted = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if "rope_theta" in scaling:
        adapted["rope_theta"] = scaling.pop("rope_theta")
    return adapted, scaling


def without_scaling(config: dict[str, Any], *, may_turn_parts: bool = False) -> dict[str, Any]:
    """The config with `rope_theta` at the top, for models that are run with unscaled positions only.

    Args:
        config: As found.
        may_turn_parts: Whether positions on a part of each head are computed.

    Raises:
        UserError: The config asks for a scaling, or for positions on a part of each head.
    """
    adapted, scaling = split_rotary(config)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in _UNSCALED:
        raise UserError(
            f"config.json asks for rotary scaling {kind!r}, which this stack cannot reproduce for this "
            "family; allowed: none. Use weights without that scaling, or delete the "
            "setting if all your texts are shorter than the model's original length"
        )
    share = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if share != 1.0 and not may_turn_parts:
        raise UserError(
            f"config.json has partial_rotary_factor {share}, but this model family is run with 1.0 only: "
            "these weights cannot be used"
        )
    return adapted


def check_head_dim(config: dict[str, Any]) -> None:
    """Raises UserError when heads are wider or narrower than hidden size / number of heads."""
    head_dim, num_heads = config.get("head_dim"), config.get("num_attention_heads")
    hidden_size = config.get("hidden_size")
    if head_dim and num_heads and hidden_size and head_dim * num_heads != hidden_size:
        raise UserError(
            f"config.json has head_dim {head_dim} with {num_heads} heads, but PaddleNLP's model needs "
            f"hidden_size / heads = {hidden_size // num_heads}: these weights cannot be used"
        )
