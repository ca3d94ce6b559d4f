"""config.json of Falcon's folders, those of the first releases (RefinedWeb) among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune.errors import UserError
from finetune.families.config_checks import check_names_agree, check_norm_epsilon
from finetune.families.gated_decoder import require_values
from finetune.families.rotary_config import check_head_dim, with_scaling

MODEL_TYPES = ("falcon", "RefinedWeb", "RefinedWebModel")
"""Today's name, and the first ones of 40B and of the smaller models."""

_FIELDS = {
    "ffn_hidden_size": "intermediate_size",
    "layer_norm_epsilon": "rms_norm_eps",
    "num_kv_heads": "num_key_value_heads",
}
_FIRST_FIELDS = {
    "n_embed": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
}
_FIXED = {
    "apply_residual_connection_post_layernorm": False,
    "activation": "gelu",
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
DISTANCES = "alibi"
_LEFT_OUT = (*_FIELDS, *_FIRST_FIELDS, *_FIXED, "multi_query", "ff_factor")
# What PaddleNLP's object writes beside them, of the models that its class was made for.
_OF_THE_CLASS = ("hidden_act", "head_dim", "rope_parameters", "rope_scaling")
UNDERSTOOD = (*_LEFT_OUT, *_OF_THE_CLASS, DISTANCES)
"""Fields that are read, or may have one value only."""

# What transformers takes for fields that a config.json leaves out.
_DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bias": False,
}


def adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Published fields -> those of the layers.

    Raises:
        UserError: What the layers do not compute.
    """
    require_values(config, "Falcon", **_FIXED)
    check_norm_epsilon(config, "layer_norm_epsilon")
    check_names_agree(config, _FIELDS | _FIRST_FIELDS)
    adapted = {name: value for name, value in config.items() if name not in _LEFT_OUT}
    for theirs, ours in (_FIRST_FIELDS | _FIELDS).items():
        if config.get(theirs) is not None:
            adapted[ours] = config[theirs]
    is_first = config.get("model_type") in MODEL_TYPES[1:]

    def said(name: str, default: Any) -> Any:
        value = config.get(name)
        return default if value is None else value

    is_new = bool(said("new_decoder_architecture", config.get("model_type") == "RefinedWeb"))
    adapted |= _form(said, is_new=is_new, is_first=is_first)
    num_kv_heads = _num_kv_heads(config, adapted, is_new=is_new, is_first=is_first)
    adapted |= {} if num_kv_heads is None else {"num_key_value_heads": num_kv_heads}
    if adapted.get("intermediate_size") is None and "hidden_size" in adapted:
        adapted["intermediate_size"] = said("ff_factor", 4) * adapted["hidden_size"]
    check_head_dim(adapted)
    return {**_DEFAULTS, **with_scaling(adapted), "model_type": MODEL_TYPES[0]}


def _form(said: Callable[[str, Any], Any], *, is_new: bool, is_first: bool) -> dict[str, Any]:
    """How a layer's branches and norms stand."""
    is_parallel = bool(said("parallel_attn", is_new or not is_first))
    num_norms = said("num_ln_in_parallel_attn", 2 if is_new else 1)
    if is_new and not is_parallel:
        raise UserError(
            "config.json has new_decoder_architecture True and parallel_attn False, a form that no Falcon has. "
            "Use the published config.json"
        )
    if num_norms not in ((1, 2) if is_new else (1,)):
        raise UserError(
            f"config.json has num_ln_in_parallel_attn {num_norms!r}; allowed: 1, or 2 with new_decoder_architecture. "
            "Use the published config.json"
        )
    return {
        "new_decoder_architecture": is_new,
        "parallel_attn": is_parallel,
        DISTANCES: bool(said(DISTANCES, False)),
        "num_ln_in_parallel_attn": num_norms,
    }


def _num_kv_heads(
    config: dict[str, Any], adapted: dict[str, Any], *, is_new: bool, is_first: bool
) -> int | None:
    """Heads of keys and values; None where the configuration does not tell."""
    num_heads: int | None = adapted.get("num_attention_heads")
    if is_new:
        given: int | None = adapted.get("num_key_value_heads")
        return given or (1 if is_first else num_heads)
    multi_query = config.get("multi_query")
    if multi_query is None and config.get("num_key_value_heads") is not None:
        return int(config["num_key_value_heads"])  # adapted before
    return 1 if (not is_first if multi_query is None else multi_query) else num_heads


def published_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration in transformers' fields, whose class works out the size of a head by itself."""
    theirs = {here: there for there, here in _FIELDS.items()}
    published = {theirs.get(name, name): value for name, value in config.items() if name != "head_dim"}
    num_kv_heads, is_new = config.get("num_key_value_heads"), bool(config.get("new_decoder_architecture"))
    return {
        **published,
        **_FIXED,
        "multi_query": num_kv_heads == 1 and not is_new,
        "model_type": MODEL_TYPES[0],
        "architectures": ["FalconForCausalLM"],
    }
