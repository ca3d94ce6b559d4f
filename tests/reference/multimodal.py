"""The multimodal checkpoints whose logits of text are compared with Hugging Face transformers.

Each is a folder as transformers' `save_pretrained` leaves it, with weights that NumPy draws from a seed, also those of
the parts that see or hear. So the comparison with golden logits needs no PyTorch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.reference.logits import HERE, LARGE, VOCAB_SIZE, LogitCase, draw_weights, write_checkpoint

GOLDEN = HERE / "golden_multimodal.json"

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 50000.0,
}
_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_MARKS = {"image_token_id": 0, "video_token_id": 0, "vision_start_token_id": 0, "vision_end_token_id": 0}
_STREAMS = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_CLIP = {"model_type": "clip_vision_model", "projection_dim": 16, **_TOWER}
_QWEN_TOWER = {"depth": 1, "num_heads": 2, "patch_size": 4, "in_channels": 3}
_IMAGE_INDEX = {"image_token_index": 0, "image_seq_length": 4}


@dataclass(frozen=True)
class MultimodalCase:
    """One checkpoint.

    Attributes:
        name: How the tests call it.
        model_class: Of transformers.
        config_class: Of transformers.
        config: Arguments of its configuration.
        norm_mean: As `LogitCase` has it.
        flat: Whether a configuration without a part of its own for the text is tried, too.
    """

    name: str
    model_class: str
    config_class: str
    config: dict[str, Any] = field(default_factory=dict)
    norm_mean: float = 1.0
    flat: bool = False

    def weights(self, shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
        """All weights under the names of the files."""
        return draw_weights(LogitCase(self.name, "", norm_mean=self.norm_mean), shapes, LARGE)

    def write(self, folder: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> Path:
        """A folder as transformers leaves it."""
        return write_checkpoint(folder, config, self.weights(shapes))


_LLAVA = {**_IMAGE_INDEX, "vision_config": _CLIP, "vision_feature_layer": -1}

CASES = {
    case.name: case
    for case in (
        MultimodalCase(
            "qwen2_vl",
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLConfig",
            {
                **_MARKS,
                "text_config": {**_TEXT, **_STREAMS, **_IDS},
                "vision_config": {**_QWEN_TOWER, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
            },
            flat=True,
        ),
        MultimodalCase(
            "qwen2_5_vl",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLConfig",
            {
                **_MARKS,
                "tie_word_embeddings": True,
                "text_config": {**_TEXT, **_STREAMS, **_IDS, "tie_word_embeddings": True},
                "vision_config": {
                    **_QWEN_TOWER,
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "out_hidden_size": 32,
                    "fullatt_block_indexes": [0],
                },
            },
            flat=True,
        ),
        MultimodalCase(
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLConfig",
            {
                **_MARKS,
                "text_config": {
                    **_TEXT,
                    **_IDS,
                    "head_dim": 16,
                    "rope_scaling": {
                        "rope_type": "default",
                        "mrope_section": [4, 2, 2],
                        "mrope_interleaved": True,
                    },
                },
                "vision_config": {
                    **_QWEN_TOWER,
                    "hidden_size": 16,
                    "intermediate_size": 24,
                    "out_hidden_size": 32,
                    "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [0],
                },
            },
        ),
        MultimodalCase(
            "gemma3",
            "Gemma3ForConditionalGeneration",
            "Gemma3Config",
            {
                "image_token_index": 0,
                "mm_tokens_per_image": 4,
                "text_config": {
                    **_TEXT,
                    "head_dim": 16,
                    "query_pre_attn_scalar": 24,
                    "sliding_window": 4,
                    "sliding_window_pattern": 2,
                    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                },
                "vision_config": {"model_type": "siglip_vision_model", **_TOWER},
            },
            norm_mean=0.0,
        ),
        MultimodalCase(
            "llava",
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            {**_LLAVA, "text_config": {"model_type": "llama", **_TEXT}},
        ),
        MultimodalCase(
            "llava_next",
            "LlavaNextForConditionalGeneration",
            "LlavaNextConfig",
            {**_LLAVA, "text_config": {"model_type": "mistral", **_TEXT, "sliding_window": 4}},
        ),
        MultimodalCase(
            "llava_onevision",
            "LlavaOnevisionForConditionalGeneration",
            "LlavaOnevisionConfig",
            {
                "image_token_index": 0,
                "video_token_index": 0,
                "text_config": {"model_type": "qwen2", **_TEXT},
                "vision_config": {"model_type": "siglip_vision_model", **_TOWER, "vision_use_head": False},
            },
        ),
        MultimodalCase(
            "internvl",
            "InternVLForConditionalGeneration",
            "InternVLConfig",
            {
                "image_token_id": 0,
                "image_seq_length": 4,
                "text_config": {"model_type": "qwen2", **_TEXT},
                "vision_config": {
                    "model_type": "internvl_vision",
                    **_TOWER,
                    "image_size": [8, 8],
                    "patch_size": [4, 4],
                },
            },
        ),
        MultimodalCase(
            "mistral3",
            "Mistral3ForConditionalGeneration",
            "Mistral3Config",
            {
                "image_token_index": 0,
                "text_config": {"model_type": "mistral", **_TEXT, "head_dim": 16, "sliding_window": None},
                "vision_config": {"model_type": "pixtral", **_TOWER, "head_dim": 8},
            },
        ),
        MultimodalCase(
            "qwen2_audio",
            "Qwen2AudioForConditionalGeneration",
            "Qwen2AudioConfig",
            {
                "audio_token_index": 0,
                "text_config": {"model_type": "qwen2", **_TEXT},
                "audio_config": {
                    "model_type": "qwen2_audio_encoder",
                    "d_model": 16,
                    "encoder_layers": 1,
                    "encoder_attention_heads": 2,
                    "encoder_ffn_dim": 24,
                    "num_mel_bins": 8,
                    "max_source_positions": 16,
                },
            },
        ),
        MultimodalCase(
            "smolvlm",
            "SmolVLMForConditionalGeneration",
            "SmolVLMConfig",
            {
                "image_token_id": 0,
                "scale_factor": 2,
                "text_config": {"model_type": "llama", **_TEXT, "pad_token_id": 0},
                "vision_config": {"model_type": "smolvlm_vision", **_TOWER},
            },
        ),
    )
}


def with_flat_config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the text part's fields at the top, as the published files have them."""
    text = {
        name: value
        for name, value in config["text_config"].items()
        if name not in ("model_type", "layer_types")
    }
    return {**text, **{name: value for name, value in config.items() if name != "text_config"}}


def with_newer_names(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights under the names of the layers, which transformers 5 writes into files."""
    renamed = {}
    for name, array in weights.items():
        own = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
        own = re.sub(
            r"^(language_model\.model|model(?!\.(visual|language_model|text_model|connector|vision_model)))\.",
            "model.language_model.",
            own,
        )
        own = re.sub(r"^(visual|vision_tower|multi_modal_projector|image_newline)\b", r"model.\1", own)
        renamed[own] = array
    return renamed
