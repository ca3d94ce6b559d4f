"""Kinds of multimodal folders, as one record each: where the text part's configuration and tensors are in them.

For text alone each of these models computes what the family of its text part computes: positions in three streams
(time, height, width) are equal there, and images are what other parts put in the place of tokens. Kinds for which that
is not so are refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.families.multimodal.tensor_layout import TensorLayout

_Test = Callable[[Mapping[str, Any]], bool]


def _always(config: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class MultimodalKind:
    """Facts of one kind.

    Attributes:
        name: As users know it.
        model_types: `model_type` values of its config.json.
        text_type: `model_type` of the text part where its configuration names none, or stands at the top.
        same_types: `model_type` values of the text part -> those of the family that computes the same.
        text_fields: Fields of config.json that may hold the text part's configuration.
        flat: How tensors are called where the text part has no name of its own; None: it always has one.
        is_flat: Whether the text part's fields may stand at the top of config.json.
        layer_prefix: First part of the names of the text part's layers in the model that its program builds, which
            adapters of peft use.
        head_prefix: The same of its output layer.
        is_of: Whether a config.json with one of `model_types` is of this kind.
        refusal: Why its text part is not computed here; "" where it is.
    """

    name: str
    model_types: tuple[str, ...]
    text_type: str = ""
    same_types: Mapping[str, str] = field(default_factory=dict)
    text_fields: tuple[str, ...] = ("text_config",)
    flat: TensorLayout | None = None
    is_flat: bool = False
    layer_prefix: str = "model.language_model"
    head_prefix: str = ""
    is_of: _Test = _always
    refusal: str = ""


def _flat(*others: str) -> TensorLayout:
    return TensorLayout("", others=rf"({'|'.join(others)})")


def _refused(name: str, refusal: str, *model_types: str) -> MultimodalKind:
    return MultimodalKind(name, model_types, refusal=refusal)


_VISUAL = _flat(r"visual\.")
_STREAMS = "the positions of its text part turn a part of each head in pairs of neighbours, by three streams"
_FUSED_EXPERTS = "its files hold the experts of a layer in one tensor"
_FUSED_AND_UNPLACED = "its files hold the experts of a layer in one tensor, and some layers have no positions"
_TOWERS = (
    *("llava", "llava_next", "llava_next_video", "llava_onevision", "video_llava", "vipllava"),
    *("mistral3", "internvl", "deepseek_vl", "deepseek_vl_hybrid"),
)

KINDS = (
    MultimodalKind(
        "Qwen-VL and Qwen-Audio",
        ("qwen",),
        text_type="qwen",
        is_flat=True,
        flat=_flat(r"transformer\.(visual|audio)\."),
        layer_prefix="transformer",
        is_of=lambda config: isinstance(config.get("visual") or config.get("audio"), dict),
    ),
    MultimodalKind(
        "GLM-4V in its first form",
        ("chatglm",),
        text_type="chatglm",
        is_flat=True,
        flat=_flat(r"transformer\.vision\."),
        layer_prefix="transformer",
        is_of=lambda config: isinstance(config.get("vision_config"), dict),
    ),
    MultimodalKind(
        "Qwen2-VL",
        ("qwen2_vl",),
        text_type="qwen2",
        same_types={"qwen2_vl_text": "qwen2"},
        is_flat=True,
        flat=_VISUAL,
    ),
    MultimodalKind(
        "Qwen2.5-VL",
        ("qwen2_5_vl",),
        text_type="qwen2",
        same_types={"qwen2_5_vl_text": "qwen2"},
        is_flat=True,
        flat=_VISUAL,
    ),
    MultimodalKind("Qwen3-VL", ("qwen3_vl",), text_type="qwen3", same_types={"qwen3_vl_text": "qwen3"}),
    MultimodalKind("Gemma 3", ("gemma3",), text_type="gemma3_text"),
    MultimodalKind(
        "InternVL",
        ("internvl_chat",),
        text_fields=("llm_config",),
        layer_prefix="language_model.model",
        head_prefix="language_model.",
    ),
    MultimodalKind(
        "Qwen2-Audio",
        ("qwen2_audio",),
        text_type="qwen2",
        layer_prefix="language_model.model",
        head_prefix="language_model.",
    ),
    MultimodalKind("Mistral 3", ("mistral3",), text_type="mistral"),
    MultimodalKind(
        "LLaVA in its first form",
        ("llava", "llava_llama", "llava_mistral", "llava_qwen"),
        text_type="llama",
        same_types={"llava_mistral": "mistral", "llava_qwen": "qwen2"},
        is_flat=True,
        flat=_flat(r"model\.(mm_projector|vision_tower|vision_resampler|image_newline)\b"),
        layer_prefix="model",
        is_of=lambda config: "mm_hidden_size" in config or "mm_vision_tower" in config,
    ),
    MultimodalKind(
        "LLaVA and models of its build",
        _TOWERS,
        text_type="llama",
        is_of=lambda config: "mm_vision_tower" not in config,
    ),
    MultimodalKind(
        "Idefics 2 and 3, SmolVLM",
        ("idefics2", "idefics3", "smolvlm"),
        text_type="llama",
        layer_prefix="model.text_model",
    ),
    _refused(
        "Llama 3.2 Vision",
        "some of its layers look at the image only (cross attention), and take a place among the others",
        *("mllama", "mllama_text_model"),
    ),
    _refused("GLM-4.1V and later", _STREAMS, "glm4v", "glm4v_text", "glm4v_moe", "glm4v_moe_text"),
    _refused("Qwen3-VL with experts", _FUSED_EXPERTS, "qwen3_vl_moe", "qwen3_vl_moe_text"),
    _refused("Llama 4", _FUSED_AND_UNPLACED, "llama4", "llama4_text"),
    _refused("PaliGemma", "its prompts are read in both directions", "paligemma"),
    _refused(
        "Gemma 3n",
        "its layers share keys and values, and have embeddings of their own",
        *("gemma3n", "gemma3n_text"),
    ),
    _refused(
        "Qwen Omni",
        "its parts that think and speak are models of their own",
        *("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe"),
    ),
    _refused(
        "Phi-4 multimodal", "adapters for images and sounds are a part of it", "phi4mm", "phi4_multimodal"
    ),
    _refused("Phi-3 vision", "its text part is not told apart in its files", "phi3_v"),
    _refused(
        "MiniCPM-V, Ovis, Kimi-VL and models of their kind",
        "its text part is not told apart in its files",
        *("minicpmv", "minicpmo", "ovis", "kimi_vl", "deepseek_vl_v2", "multi_modality", "cogvlm", "cogvlm2"),
    ),
)
"""All kinds; the first that covers a config.json counts."""


def find_kind(config: Mapping[str, Any]) -> MultimodalKind | None:
    """The kind of a config.json; None for a model of text alone, and for kinds that nobody has looked at."""
    model_type = config.get("model_type")
    return next((kind for kind in KINDS if model_type in kind.model_types and kind.is_of(config)), None)
