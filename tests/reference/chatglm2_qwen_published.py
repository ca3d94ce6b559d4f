"""The families that transformers lacks as their authors publish them: names, layouts and configs of the files on the hubs.

A tiny checkpoint written by this project is rewritten here, so that the loader is tested on folders of
the published shape and the reference models compute from published names.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.families.cases import FACTS
from tests.reference import chatglm2_numpy, chatglm_numpy, qwen_numpy

_FIELDS_OF_CHATGLM2 = {
    "num_hidden_layers": "num_layers",
    "vocab_size": "padded_vocab_size",
    "max_sequence_length": "seq_length",
}


def _chatglm2_config(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of the published ChatGLM2-6B, with this checkpoint's sizes."""
    kept = {_FIELDS_OF_CHATGLM2.get(name, name): value for name, value in config.items() if name != "dtype"}
    return kept | {
        "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
        "model_type": "chatglm",
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "multi_query_attention": True,
        "original_rope": True,
        "post_layer_norm": True,
        "torch_dtype": "float16",
        "transformers_version": "4.27.1",
    }


def _chatglm3_config(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of the published ChatGLM3-6B-32k, which tells its base by a ratio and its generation by its name."""
    published = _chatglm2_config(config)
    ratio = published.pop("rotary_base") / 10000
    return published | {"_name_or_path": "THUDM/chatglm3-6b-32k", "rope_ratio": ratio}


def _chatglm4_config(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of the published GLM-4-9B-chat."""
    published = _chatglm3_config(config)
    del published["chatglm_generation"]
    return published | {
        "_name_or_path": "THUDM/glm-4-9b-chat",
        "classifier_dropout": None,
        "eos_token_id": [published["eos_token_id"]],
    }


def _chatglm_config(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of the published ChatGLM-6B."""
    names = {"num_hidden_layers": "num_layers", "intermediate_size": "inner_hidden_size",
             "rms_norm_eps": "layernorm_epsilon", "max_position_embeddings": "max_sequence_length"}  # fmt: skip
    left_out = ("dtype", "tie_word_embeddings", "initializer_range")
    kept = {names.get(name, name): value for name, value in config.items() if name not in left_out}
    return kept | {
        "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
        "pre_seq_len": None,
        "prefix_projection": False,
        "quantization_bit": 0,
        "torch_dtype": "float16",
        "transformers_version": "4.27.1",
    }


def _qwen_config(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of the published Qwen-7B, with this checkpoint's sizes."""
    left_out = ("dtype", "bos_token_id", "eos_token_id", "pad_token_id")
    return {name: value for name, value in config.items() if name not in left_out} | {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
        "attn_dropout_prob": 0.0,
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "onnx_safe": None,
        "scale_attn_weights": True,
        "softmax_in_fp32": False,
        "tokenizer_class": "QWenTokenizer",
        "transformers_version": "4.32.0",
        "use_cache_kernel": False,
        "use_cache_quantization": False,
        "use_flash_attn": "auto",
    }


@dataclass(frozen=True)
class Published:
    """How a family is published.

    Attributes:
        base: First part of this project's parameter names, "transformer" in the published ones.
        pairs: Further parts of names: this project's and the published ones.
        settings: Further settings of tokenizer_config.json.
        head_copy: The embedding that its files hold a second time, as the output layer.
        marks: Ids that every text of random ids has to have, one behind the other.
        config: This project's config.json -> the published one.
        tokenizer_class: What the published tokenizer_config.json names.
        logits: The reference model.
        lora_layers: Last parts of the linear layers that LoRA adapts.
    """

    base: str
    config: Callable[[dict[str, Any]], dict[str, Any]]
    tokenizer_class: str
    logits: Callable[..., Any]
    lora_layers: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    head_copy: str | None = None
    marks: tuple[int, ...] = ()


PUBLISHED = {
    "chatglm": Published(
        "chatglm", _chatglm_config, "ChatGLMTokenizer", chatglm_numpy.logits,
        ("query_key_value_proj", "o_proj", "up_proj", "down_proj"),
        (("embed_tokens", "word_embeddings"), ("self_attn.query_key_value_proj", "attention.query_key_value"),
         ("self_attn.o_proj", "attention.dense"), ("up_proj", "dense_h_to_4h"), ("down_proj", "dense_4h_to_h"),
         ("transformer.norm.", "transformer.final_layernorm.")),
        {"num_image_tokens": 0}, "transformer.word_embeddings.weight", (5, 8),
    ),
    "chatglm2": Published(
        "chatglm_v2", _chatglm2_config, "ChatGLMTokenizer", chatglm2_numpy.logits,
        ("query_key_value", "self_attention.dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "chatglm3": Published(
        "chatglm_v2", _chatglm3_config, "ChatGLMTokenizer", chatglm2_numpy.logits,
        ("query_key_value", "self_attention.dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "chatglm4": Published(
        "chatglm_v2", _chatglm4_config, "ChatGLM4Tokenizer", chatglm2_numpy.logits,
        ("query_key_value", "self_attention.dense", "dense_h_to_4h", "dense_4h_to_h"),
    ),
    "qwen": Published(
        "qwen", _qwen_config, "QWenTokenizer", qwen_numpy.logits,
        ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"),
    ),
}  # fmt: skip


def published_name(name: str, family: str) -> str:
    """This project's parameter name -> the published one."""
    base = f"{PUBLISHED[family].base}."
    name = f"transformer.{name.removeprefix(base)}" if name.startswith(base) else name
    for here, there in PUBLISHED[family].pairs:
        name = name.replace(here, there)
    return name


def published_config(folder: Path, family: str) -> dict[str, Any]:
    """config.json of a tiny checkpoint in the published form."""
    return PUBLISHED[family].config(json.loads((folder / "config.json").read_text()))


def published_weights(folder: Path, family: str) -> dict[str, np.ndarray]:
    """Weights of a tiny checkpoint by published names, linear layers as [out, in]."""
    found = {}
    for name, array in load_file(folder / "model.safetensors").items():
        is_linear = array.ndim == 2 and not any(word in name for word in ("embed", "wte"))
        found[published_name(name, family)] = np.ascontiguousarray(array.T if is_linear else array)
    return found


def write_published(folder: Path, target: Path, family: str) -> Path:
    """The same checkpoint as a folder of the published form."""
    target.mkdir(parents=True)
    weights = published_weights(folder, family)
    if copied := PUBLISHED[family].head_copy:
        weights["lm_head.weight"] = weights[copied]
    weights |= {name: np.ones(shape, np.float16) for name, shape in FACTS[family].computed_tensors.items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(published_config(folder, family)))
    settings = {
        "model_max_length": 8192,
        "tokenizer_class": PUBLISHED[family].tokenizer_class,
        "auto_map": {},
        **PUBLISHED[family].settings,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.model", "qwen.tiktoken", "ice_text.model"):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    return target
