"""Who reads the folders that are written in Hugging Face's form: a row of every family.

transformers has a class of most. Of the others it computes some with the class of another family, whose weights are the
same numbers in another order; published code of those is read here field by field, with its defaults. ChatGLM-6B is left
to the NumPy reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from finetune.families.registry import get_family
from tests.families.cases import FACTS
from tests.reference import chatglm2_numpy, chatglm_numpy, published_forms, qwen_numpy
from tests.reference.published_forms import PublishedForm, Weights, as_glm, as_qwen2, undo

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Reader:
    """What computes a family's folders outside of this project.

    Attributes:
        is_own: Whether transformers has a class of the family itself.
        borrowed: Prefix of the names of another family's classes in transformers; "" where none computes the same.
        config: Published config.json -> arguments of the borrowed configuration.
        weights: (tensors of the folder, published config.json, shapes of the borrowed model) -> its weights.
        changes: (published config.json) -> functions of `llama_changes` that change the borrowed model.
        logits: The NumPy reference, where there is one.
        fields: What published config.json have that the published code reads.
        tokenizer: The vocabulary's file, and what tokenizer_config.json calls the class that reads it.
    """

    is_own: bool = False
    borrowed: str = ""
    config: Callable[[Config], dict[str, Any]] = dict
    weights: Callable[[Weights, Config, Mapping[str, Any]], Weights] = lambda weights, *_: weights
    changes: Callable[[Config], tuple[str, ...]] = lambda _: ()
    logits: Callable[..., np.ndarray] | None = None
    fields: tuple[str, ...] = field(default=())
    tokenizer: tuple[str, str] = ("", "")


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_GLM_FIELDS = (
    *(
        "add_bias_linear",
        "add_qkv_bias",
        "ffn_hidden_size",
        "hidden_size",
        "kv_channels",
        "layernorm_epsilon",
    ),
    *(
        "multi_query_attention",
        "multi_query_group_num",
        "num_attention_heads",
        "num_layers",
        "padded_vocab_size",
    ),
    *(
        "rmsnorm",
        "rope_ratio",
        "seq_length",
        "original_rope",
        "tie_word_embeddings",
        "eos_token_id",
        "pad_token_id",
    ),
)


def _as_llama(config: Config, **fields: Any) -> dict[str, Any]:
    sizes = {name: config[name] for name in _SIZES}
    positions = config.get("max_position_embeddings") or config["model_max_length"]
    shared = {"num_key_value_heads": config["num_attention_heads"], "rope_theta": 10000.0}
    more = {"rms_norm_eps": config["rms_norm_eps"], "max_position_embeddings": positions}
    return sizes | shared | more | {"tie_word_embeddings": False} | fields


def _internlm(config: Config) -> dict[str, Any]:
    rotary = config.get("rotary", {"base": 10000, "type": "dynamic"})
    assert rotary["type"] == "dynamic"  # which acts beyond the positions of the model
    return _as_llama(config, attention_bias=config.get("bias", True), rope_theta=float(rotary["base"]))


def _internlm2(config: Config) -> dict[str, Any]:
    assert config.get("bias", True) is False
    groups = config.get("num_key_value_heads") or config["num_attention_heads"]
    return _as_llama(config, num_key_value_heads=groups, rope_theta=config.get("rope_theta", 10000.0))


def _llama_shaped(config: Config) -> dict[str, Any]:
    return _as_llama(config, rope_theta=config.get("rope_theta", 10000.0))


def _has_distances(config: Config) -> bool:
    return "max_position_embeddings" not in config


def _baichuan_changes(config: Config) -> tuple[str, ...]:
    return ("add_distances",) if _has_distances(config) else ()


def _llama_weights(form: PublishedForm) -> Callable[[Weights, Config, Mapping[str, Any]], Weights]:
    def arrange(published: Weights, config: Config, shapes: Mapping[str, Any]) -> Weights:
        groups = config.get("num_key_value_heads") or config["num_attention_heads"]
        return undo(form, published, {"num_key_value_heads": groups}, shapes)

    return arrange


def _normed_head(published: Weights, config: Config, shapes: Mapping[str, Any]) -> Weights:
    """Baichuan 2 divides the output layer's weights of each token by their length."""
    weights = _llama_weights(published_forms.BAICHUAN2)(published, config, shapes)
    head = weights["lm_head.weight"]
    length = np.sqrt(np.square(head, dtype=np.float64).sum(1, keepdims=True))
    return weights | {"lm_head.weight": (head / length).astype(np.float32)}


def _glm(config: Config) -> dict[str, Any]:
    groups = config.get("multi_query_group_num", 1)
    if not config.get("multi_query_attention", False):
        groups = config["num_attention_heads"]
    assert config.get("rmsnorm", True) and config.get("post_layer_norm", True)
    assert not config.get("add_bias_linear", False)
    assert not config.get("apply_residual_connection_post_layernorm", False)
    return {
        "vocab_size": config["padded_vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["ffn_hidden_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": groups,
        "head_dim": config["kv_channels"],
        "partial_rotary_factor": 0.5,
        "attention_bias": config.get("add_qkv_bias", False),
        "rms_norm_eps": config.get("layernorm_epsilon", 1e-5),
        "max_position_embeddings": config["seq_length"],
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }


def _glm_of_long_texts(config: Config) -> dict[str, Any]:
    """ChatGLM 3 and GLM-4 multiply the base."""
    return _glm(config) | {"rope_theta": 10000.0 * config.get("rope_ratio", 1)}


def _glm_with_divided_positions(config: Config) -> dict[str, Any]:
    """ChatGLM2-6B-32k divides the positions."""
    factor = float(config.get("rope_ratio", 1))
    scaling = {} if factor == 1 else {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    return _glm(config) | {"rope_theta": 10000.0} | scaling


def _qwen2(config: Config) -> dict[str, Any]:
    """The scalings for texts beyond `seq_length` are 1 within it."""
    assert config.get("no_bias", True) and config.get("rotary_pct", 1.0) == 1.0
    assert config["hidden_size"] == config["kv_channels"] * config["num_attention_heads"]
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"] // 2,
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_attention_heads"],
        "rms_norm_eps": config["layer_norm_epsilon"],
        "rope_theta": float(config["rotary_emb_base"]),
        "max_position_embeddings": config["seq_length"],
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }


OWN = Reader(is_own=True)
_LLAMA_FIELDS = (
    *_SIZES,
    "rms_norm_eps",
    "tie_word_embeddings",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
)
_BAICHUAN = Reader(
    borrowed="Llama",
    config=_as_llama,
    weights=_llama_weights(published_forms.BAICHUAN),
    changes=_baichuan_changes,
    tokenizer=("tokenizer.model", "BaichuanTokenizer"),
    fields=(*_LLAMA_FIELDS, "model_max_length"),
)
_CHATGLM2 = Reader(
    borrowed="Glm",
    config=_glm_with_divided_positions,
    weights=lambda weights, config, _: as_glm(weights, config),
    logits=chatglm2_numpy.logits,
    fields=_GLM_FIELDS,
    tokenizer=("tokenizer.model", "ChatGLMTokenizer"),
)
_CHATGLM3 = replace(_CHATGLM2, config=_glm_of_long_texts)

_LLAMA_SHAPED = Reader(
    borrowed="Llama",
    config=_llama_shaped,
    weights=_llama_weights(PublishedForm()),
    tokenizer=("tokenizer.json", "PreTrainedTokenizerFast"),
    fields=(*_LLAMA_FIELDS, "max_position_embeddings"),
)

READERS = {
    name: OWN if f"{facts.named_as_llama}ForCausalLM" in get_family(name).architectures else _LLAMA_SHAPED
    for name, facts in FACTS.items()
    if facts.named_as_llama
} | {
    "chatglm": Reader(
        logits=chatglm_numpy.logits,
        tokenizer=("ice_text.model", "ChatGLMTokenizer"),
        fields=(
            *(
                "hidden_size",
                "inner_hidden_size",
                "layernorm_epsilon",
                "max_sequence_length",
                "num_attention_heads",
            ),
            *(
                "num_layers",
                "position_encoding_2d",
                "vocab_size",
                "bos_token_id",
                "eos_token_id",
                "mask_token_id",
            ),
            *("gmask_token_id", "pad_token_id"),
        ),
    ),
    "chatglm2": _CHATGLM2,
    "chatglm3": _CHATGLM3,
    "chatglm4": replace(
        _CHATGLM3,
        fields=(*_GLM_FIELDS, "num_hidden_layers", "vocab_size"),
        tokenizer=("tokenizer.model", "ChatGLM4Tokenizer"),
    ),
    "qwen": Reader(
        borrowed="Qwen2",
        config=_qwen2,
        weights=lambda weights, config, _: as_qwen2(weights, config),
        logits=qwen_numpy.logits,
        tokenizer=("qwen.tiktoken", "QWenTokenizer"),
        fields=(
            *(
                *_SIZES,
                "kv_channels",
                "layer_norm_epsilon",
                "max_position_embeddings",
                "no_bias",
                "rotary_emb_base",
            ),
            *("rotary_pct", "seq_length", "tie_word_embeddings", "use_dynamic_ntk", "use_logn_attn"),
        ),
    ),
    "mixtral": OWN,
    "glm4": OWN,
    "phi3": OWN,
    "internlm": Reader(
        borrowed="Llama",
        config=_internlm,
        weights=_llama_weights(published_forms.INTERNLM),
        tokenizer=("tokenizer.model", "InternLMTokenizer"),
        fields=(*_LLAMA_FIELDS, "bias", "max_position_embeddings", "rotary"),
    ),
    "internlm2": Reader(
        borrowed="Llama",
        config=_internlm2,
        weights=_llama_weights(published_forms.INTERNLM2),
        tokenizer=("tokenizer.model", "InternLM2Tokenizer"),
        fields=(*_LLAMA_FIELDS, "bias", "max_position_embeddings", "num_key_value_heads", "rope_theta"),
    ),
    "baichuan": _BAICHUAN,
    "baichuan2": replace(_BAICHUAN, weights=_normed_head, fields=(*_BAICHUAN.fields, "z_loss_weight")),
    "bloom": OWN,
    "gpt2": OWN,
    "falcon": OWN,
    "opt": OWN,
    "gemma2": OWN,
    "gemma3": OWN,
}
"""The reader of every family."""


@dataclass(frozen=True)
class Variant:
    """A model of a family.

    Attributes:
        family: Its name.
        fields: What its config.json has that the family's tiny model has not.
        left_out: Ending of tensors that it has not.
        seed: Of its weights: one that does not say the same of everything.
    """

    family: str
    fields: dict[str, Any] = field(default_factory=dict)
    left_out: str = ""
    seed: int = 0


VARIANTS = {name: Variant(name) for name in READERS} | {
    "baichuan_13b": Variant("baichuan", {"has_distances": True}),
    "baichuan2_7b": Variant("baichuan2", {"has_distances": False}),
    "chatglm2_32k": Variant("chatglm2", {"position_divisor": 4.0}),
    "internlm_20b": Variant("internlm", {"bias": False}, left_out="proj.bias"),
    "opt": Variant("opt", seed=1),
}
"""The models that are asked: one of every family, and others of some."""


def llama_shapes(fields: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shapes of the weights of transformers' Llama, from the fields that `Reader.config` gives."""
    hidden, inner = fields["hidden_size"], fields["intermediate_size"]
    narrow = hidden // fields["num_attention_heads"] * fields["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": [fields["vocab_size"], hidden], "model.norm.weight": [hidden]}
    shapes["lm_head.weight"] = [fields["vocab_size"], hidden]
    for number in range(fields["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        for name, size in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = [size, hidden]
            if fields.get("attention_bias"):
                shapes[f"{layer}self_attn.{name}_proj.bias"] = [size]
        for name, shape in (("gate", [inner, hidden]), ("up", [inner, hidden]), ("down", [hidden, inner])):
            shapes[f"{layer}mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = [hidden]
    return shapes


def load_borrowed(reader: Reader, config: Config, published: Weights) -> Any:
    """transformers' model of the class that computes the same, with the weights of a folder in it."""
    import torch
    import transformers

    from tests.reference import llama_changes
    from tests.reference.transformers_logits import model_class, shapes_of

    fields = getattr(transformers, f"{reader.borrowed}Config")(**reader.config(config))
    fields._attn_implementation = "eager"
    model = model_class(reader.borrowed)(fields).float().eval()
    weights = reader.weights(published, config, shapes_of(model))
    model.load_state_dict(
        {name: torch.from_numpy(np.ascontiguousarray(each)) for name, each in weights.items()}
    )
    for change in reader.changes(config):
        getattr(llama_changes, change)(model)
    return model


def borrowed_tokens(model: Any, rows: list[list[int]], num_tokens: int, *, padding: int) -> list[list[int]]:
    """The likeliest tokens behind some prompts, by `generate`: a batch with padding on the left."""
    import torch

    length = max(map(len, rows))
    ids = torch.tensor([[padding] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    model.generation_config.eos_token_id = None
    # The mask of distances is made for whole texts.
    cached = "forward" not in vars(model)
    made = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=num_tokens,
        use_cache=cached,
        pad_token_id=padding,
    )
    return made[:, length:].tolist()


def reference_tokens(
    reader: Reader, config: Config, published: Weights, rows: list[list[int]], num_tokens: int
) -> list[list[int]]:
    """The same by the NumPy reference in float64, every row alone and from its start for every token."""
    assert reader.logits is not None
    weights = {name: array.astype(np.float64) for name, array in published.items()}
    answers = []
    for row in rows:
        ids = list(row)
        while len(ids) < len(row) + num_tokens:
            ids.append(int(reader.logits(weights, np.array([ids]), config)[0, -1].argmax()))
        answers.append(ids[len(row) :])
    return answers
