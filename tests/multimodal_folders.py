"""Tiny multimodal folders with a tokenizer: the text part of a tiny model of its family, other parts drawn beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from finetune.merge.tensor_parallel import MergeOptions, merge
from finetune.models.tiny.checkpoint import build_tiny
from tests.reference.multimodal import GOLDEN

_PREPROCESSOR = {"image_processor_type": "AnyImageProcessor", "do_resize": True}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 330,
    "max_length": 256,
}


@dataclass(frozen=True)
class FolderCase:
    """A multimodal folder.

    Attributes:
        family: Record of its text part.
        golden: Case of `tests.reference.multimodal` that has its configuration and its other parts; "" for those that
            transformers does not have.
        options: Of the tiny text part.
        rename: Hugging Face's name in a folder of text alone -> the name in this one.
        config: The text part's configuration -> that of the whole; None: the golden one with its sizes.
        others: Names and shapes of other parts' tensors, beside the golden ones.
        layer: How the model that the whole is loaded into calls a layer of its text part.
    """

    family: str
    golden: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    rename: Callable[[str], str] = str
    config: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    layer: str = "model.language_model.layers"


def _wrapped(name: str) -> str:
    return f"language_model.{name}"


def _internvl_chat(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "llm_config": text,
        "vision_config": {"hidden_size": 16},
        "select_layer": -1,
        "template": "internlm2-chat",
        "torch_dtype": "float32",
    }


def _llava_first_form(text: dict[str, Any]) -> dict[str, Any]:
    names = {"mm_vision_tower": "some/tower", "mm_hidden_size": 16, "mm_projector_type": "linear"}
    return {**text, **names, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}


def _glm4v(text: dict[str, Any]) -> dict[str, Any]:
    tokens = {"boi_token_id": 320, "eoi_token_id": 321}
    return {**text, **tokens, "_name_or_path": "THUDM/glm-4v-9b", "vision_config": {"hidden_size": 16}}


def _qwen_vl(text: dict[str, Any]) -> dict[str, Any]:
    return {**text, "visual": {"width": 16, "layers": 1}, "transformers_version": "4.31.0"}


FOLDERS = {
    "qwen2_vl": FolderCase("qwen2", "qwen2_vl"),
    "qwen3_vl": FolderCase(
        "qwen3", "qwen3_vl", rename=lambda name: name.replace("model.", "model.language_model.", 1)
    ),
    "gemma3": FolderCase("gemma3", "gemma3", {"num_heads": 4}, rename=_wrapped),
    "llava": FolderCase("llama", "llava", rename=_wrapped),
    "mistral3": FolderCase("mistral", "mistral3", rename=_wrapped),
    "internvl_chat": FolderCase(
        "internlm2",
        rename=_wrapped,
        config=_internvl_chat,
        others={"vision_model.embeddings.weight": (16, 3), "mlp1.0.weight": (32,)},
        layer="language_model.model.layers",
    ),
    "llava_first_form": FolderCase(
        "llama",
        config=_llava_first_form,
        others={"model.mm_projector.0.weight": (32, 16), "model.vision_tower.vision_tower.x.weight": (4, 4)},
        layer="model.layers",
    ),
    "glm4v": FolderCase(
        "chatglm4",
        config=_glm4v,
        others={
            "transformer.vision.patch_embedding.cls_embedding": (1, 16),
            "transformer.vision.boi": (1, 1, 32),
        },
        layer="transformer.encoder.layers",
    ),
    "qwen_vl": FolderCase(
        "qwen",
        options={"num_key_value_heads": None, "vocab_size": 520},
        config=_qwen_vl,
        others={"transformer.visual.conv1.weight": (4, 3), "transformer.visual.ln_pre.bias": (4,)},
        layer="transformer.h",
    ),
}


def build_multimodal(name: str, folder: Path) -> Path:
    """Writes a folder as its publisher would, with tokenizer, preprocessor and code.

    Args:
        name: A key of `FOLDERS`.
        folder: To create.
    """
    case = FOLDERS[name]
    tiny, plain = folder.with_name(f"{folder.name}-tiny"), folder.with_name(f"{folder.name}-text")
    build_tiny(case.family, tiny, **{**SIZES, **case.options})
    merge(MergeOptions(tiny, plain, save_format="hf"))
    text = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("merge.json"))
    weights = {case.rename(key): array for key, array in load_file(plain / "model.safetensors").items()}
    others, config = dict(case.others), case.config
    if case.golden:
        golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[case.golden]
        config = lambda found: _with_text(golden["config"], found)  # noqa: E731
        of_text = (
            "language_model.",
            "model.language_model.",
            "lm_head.",
            "model.layers",
            "model.norm",
            "model.embed",
        )
        others |= {key: shape for key, shape in golden["shapes"].items() if not key.startswith(of_text)}
    random = np.random.default_rng(3)
    for key, shape in others.items():
        weights[key] = random.standard_normal(shape).astype(np.float16)
    assert config is not None
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for file, content in (("config.json", config(text)), ("preprocessor_config.json", _PREPROCESSOR)):
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    (folder / "processing_own.py").write_text("# how images become numbers\n", encoding="utf-8")
    return folder


def _with_text(config: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """The golden configuration with the sizes and tokens of a tiny text part."""
    left_out = (
        "model_type",
        "architectures",
        "rope_scaling",
        "rope_theta",
        "rope_local_base_freq",
        "seq_length",
    )
    changed = {key: value for key, value in text.items() if key not in left_out}
    tokens = {key: value for key, value in text.items() if key.endswith("_token_id")}
    inner = config["text_config"] | {"head_dim": text["hidden_size"] // text["num_attention_heads"]} | changed
    return config | tokens | {"text_config": inner, "torch_dtype": "float32"}


def other_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of other parts, which are the only ones in float16."""
    files = folder.glob("*.safetensors")
    found = {key: array for file in files for key, array in load_file(file).items()}
    return {key: array for key, array in found.items() if array.dtype == np.float16}
