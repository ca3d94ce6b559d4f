"""How published folders hold models that transformers computes with another class: other names, joined layers.

Families that transformers has no code of are compared with its Llama, Glm and Qwen2, where the weights of one are those
of the other, put in another order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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


def undo(
    form: PublishedForm,
    published: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    shapes: Mapping[str, Sequence[int]],
) -> Weights:
    """The weights of transformers' Llama from those of a published folder, each number in the place it came from.

    Args:
        form: How the folder holds them.
        published: All of its weights.
        config: Of transformers' model.
        shapes: Of its weights.
    """
    places, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape))
        places[name] = np.arange(start, end).reshape(shape)
    moved = form.rearrange(places, config)
    assert moved.keys() == published.keys()
    numbers, seen = np.empty(end, np.float32), np.zeros(end, bool)
    for name, ids in moved.items():
        assert ids.shape == published[name].shape, name
        numbers[ids], seen[ids] = published[name], True
    assert seen.all()
    return {name: numbers[ids] for name, ids in places.items()}


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


_GLM_NAMES = {
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.encoder.layers": "model.layers",
    "transformer.output_layer": "lm_head",
    "self_attention.dense": "self_attn.o_proj",
    "self_attention.query_key_value": "self_attn.qkv",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
_QWEN2_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "transformer.h": "model.layers",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_attn": "self_attn.qkv",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.up_proj",
    "mlp.w2": "mlp.gate_proj",
    "mlp.c_proj": "mlp.down_proj",
}


def _apart(published: Mapping[str, np.ndarray], names: Mapping[str, str], sizes: Sequence[int]) -> Weights:
    """Other names, and queries, keys and values (`sizes`: rows of each) from layers of their own."""
    found: Weights = {}
    for name, array in published.items():
        for theirs, ours in names.items():
            name = re.sub(rf"(^|\.){re.escape(theirs)}(?=\.)", rf"\g<1>{ours}", name)
        if ".qkv." in name:
            for part, piece in zip("qkv", np.split(array, np.cumsum(sizes)[:-1]), strict=True):
                found[name.replace(".qkv.", f".{part}_proj.")] = piece
        else:
            found[name] = array
    return found


def as_glm(published: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Weights:
    """The weights of ChatGLM 2, 3 and GLM-4 as transformers' Glm has them."""
    head_dim, groups = config["kv_channels"], config["multi_query_group_num"]
    sizes = [config["num_attention_heads"] * head_dim, groups * head_dim, groups * head_dim]
    return _apart(published, _GLM_NAMES, sizes)


def as_qwen2(published: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Weights:
    """The weights of Qwen as transformers' Qwen2 has them."""
    return _apart(published, _QWEN2_NAMES, [config["hidden_size"]] * 3)
