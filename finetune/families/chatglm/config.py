"""ChatGLM-6B's config.json: its fields under the names of the layers, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.errors import UserError
from finetune.families.gated_decoder import require_values
from finetune.families.rotary_scaling import inverse_frequencies

TOTAL_LAYERS = "total_layers"
"""Field of ours: layers of the whole model, also where a stage of a pipeline holds some of them."""
# Published field -> its name here.
RENAMED = {
    "num_layers": "num_hidden_layers",
    "inner_hidden_size": "intermediate_size",
    "layernorm_epsilon": "rms_norm_eps",
    "max_sequence_length": "max_position_embeddings",
}
FIXED: dict[str, Any] = {"position_encoding_2d": True, "tie_word_embeddings": True, "activation": "gelu"}
_TRAINED_APART = ("pre_seq_len", "prefix_projection")
# Fields of the layers that the one model leaves no choice about.
_OF_LAYERS = (TOTAL_LAYERS, "activation", "attention_scale", "head_dim", "hidden_act", "num_key_value_heads",
              "output_predict", "rope_theta")  # fmt: skip
_BEHIND = {"mask_token_id": -4, "gmask_token_id": -3}  # as far from <sop>, in every published vocabulary
_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
UNDERSTOOD = (*RENAMED, *FIXED, *_TRAINED_APART, TOTAL_LAYERS, "quantization_bit", "hidden_act", "attention_scale",
              "num_image_tokens", "head_dim", "rope_theta", "num_key_value_heads", "output_predict")  # fmt: skip
"""Fields of config.json that are read or refused beside those of the tiny configuration."""


def covers(config: Mapping[str, Any], _folder: Path | None) -> bool:
    """Whether a config.json is of the first generation; the later ones have `ffn_hidden_size`."""
    return "ffn_hidden_size" not in config and config.get("model_type") != "chatglm_v2"


def adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Published field names -> those of the layers.

    Raises:
        UserError: The config asks for something that the layers do not compute.
    """
    require_values(config, "ChatGLM-6B", **FIXED)
    if config.get("quantization_bit"):
        raise UserError(
            f"config.json has quantization_bit {config['quantization_bit']}: these weights are packed in a form of their "
            "own, which is not read here. Use chatglm-6b itself, and weight_quantize_algo to save memory"
        )
    if config.get("pre_seq_len"):
        raise UserError(
            f"config.json has pre_seq_len {config['pre_seq_len']}: a prefix of P-Tuning v2 stands in these weights, which "
            "is not read here. Use the base model, and prefix_tuning for a prefix of your own"
        )
    left_out = ("auto_map", *_TRAINED_APART)
    adapted = {RENAMED.get(name, name): value for name, value in config.items() if name not in left_out}
    begin = adapted.get("bos_token_id")
    if begin is not None:
        for name, distance in _BEHIND.items():
            adapted.setdefault(name, begin + distance)
    adapted = _DEFAULTS | adapted | FIXED
    if "num_hidden_layers" in adapted:
        adapted.setdefault(TOTAL_LAYERS, adapted["num_hidden_layers"])
    return adapted | {"model_type": "chatglm", "architectures": ["ChatGLMForCausalLM"]}


def stored_frequencies(base: float, dim: int) -> NDArray[Any]:
    """Inverse frequencies of rotary positions, float32 [dim / 2], with the digits that float16 has.

    The published code and files hold them in float16, whatever the type of the weights.
    """
    return inverse_frequencies(base, dim).astype(np.float16).astype(np.float32)


def published_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration in the fields of the published folder."""
    theirs = {here: there for there, here in RENAMED.items()}
    return {theirs.get(name, name): value for name, value in config.items() if name not in _OF_LAYERS} | {
        "architectures": ["ChatGLMModel"]
    }
