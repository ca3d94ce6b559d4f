"""How published folders hold models that transformers computes as a Llama: other names, joined layers.

Families that transformers has no code of are compared with its Llama, where the weights of one are those of the
other, put in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]


def _as_they_are(weights: Mapping[str, np.ndarray], _config: Mapping[str, Any]) -> Weights:
    return dict(weights)


@dataclass(frozen=True)
class PublishedForm:
    """What a published folder has in place of what transformers writes.

    Attributes:
        config: Fields of config.json that differ.
        rearrange: (weights by the names of transformers' Llama, its config.json) -> those of the folder.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    rearrange: Callable[[Mapping[str, np.ndarray], Mapping[str, Any]], Weights] = _as_they_are

    @property
    def is_custom(self) -> bool:
        """Whether transformers cannot read the folder."""
        return bool(self.config)

    def config_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the folder from that of transformers' model; a value of None takes a field away."""
        changed = {**config, **self.config}
        return {name: value for name, value in changed.items() if self.config.get(name, name) is not None}


def _groups(weights: Mapping[str, np.ndarray], layer: str, config: Mapping[str, Any]) -> np.ndarray:
    """One matrix of the queries of a key head, its key, its value, then those of the next key head."""
    num_kv_heads = config["num_key_value_heads"]
    query, key, value = (weights[f"{layer}.{name}_proj.weight"] for name in "qkv")
    parts = [part.reshape(num_kv_heads, -1, part.shape[1]) for part in (query, key, value)]
    return np.concatenate(parts, axis=1).reshape(-1, query.shape[1])


_INTERNLM2_NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}


def _as_internlm2(weights: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Weights:
    found: Weights = {}
    for name, array in weights.items():
        layer = name.rpartition(".")[0].rpartition(".")[0]
        if name.endswith("q_proj.weight"):
            theirs = layer.replace("self_attn", "attention")
            found[f"{theirs}.wqkv.weight"] = _groups(weights, layer, config)
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            for ours, theirs in _INTERNLM2_NAMES.items():
                name = name.replace(ours, theirs)
            found[name] = array
    return found


INTERNLM = PublishedForm({
    "model_type": "internlm",
    "architectures": ["InternLMForCausalLM"],
    "bias": True,
    "rotary": {"base": 50000.0, "type": "dynamic"},
    **dict.fromkeys(("rope_theta", "attention_bias", "mlp_bias", "head_dim", "num_key_value_heads")),
})  # fmt: skip
# As the first folders have it: with the model_type of the generation before.
INTERNLM2 = PublishedForm(
    {
        "model_type": "internlm",
        "architectures": ["InternLM2ForCausalLM"],
        "bias": False,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    _as_internlm2,
)


def _as_baichuan(weights: Mapping[str, np.ndarray], _config: Mapping[str, Any]) -> Weights:
    """All queries, keys and values from one layer; the length of an output weight means nothing in Baichuan 2."""
    found: Weights = {}
    for name, array in weights.items():
        if name.endswith("q_proj.weight"):
            layer = name.removesuffix(".q_proj.weight")
            parts = [weights[f"{layer}.{part}_proj.weight"] for part in "qkv"]
            found[f"{layer}.W_pack.weight"] = np.concatenate(parts)
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            found[name] = array
    return found


_BAICHUAN = {
    "model_type": "baichuan",
    "architectures": ["BaichuanForCausalLM"],
    "model_max_length": 64,
    **dict.fromkeys(("rope_theta", "attention_bias", "mlp_bias", "head_dim", "num_key_value_heads")),
}
_OF_13B = _BAICHUAN | {"max_position_embeddings": None}
# The published vocabularies are larger than this one, which tells nothing.
BAICHUAN = PublishedForm(
    _BAICHUAN | {"architectures": ["BaiChuanForCausalLM"], "normed_head": False}, _as_baichuan
)
BAICHUAN_13B = PublishedForm(_OF_13B | {"normed_head": False}, _as_baichuan)
BAICHUAN2 = PublishedForm(_BAICHUAN | {"z_loss_weight": 0}, _as_baichuan)
BAICHUAN2_13B = PublishedForm(_OF_13B | {"z_loss_weight": 0}, _as_baichuan)
