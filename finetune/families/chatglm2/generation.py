"""Which generation a folder of ChatGLM is of, and what its `rope_ratio` then asks of the rotary positions.

ChatGLM2 and ChatGLM3 have one `model_type`, one set of fields and one set of weights, but their models of long texts
read `rope_ratio` in two ways: ChatGLM2-6B-32k divides positions by it, ChatGLM3-6B-32k and -128k multiply the rotary
base with it. Nothing in config.json tells but the name that it was published under; the tokenizer's files tell too,
since only ChatGLM3's knows tokens for roles. GLM-4-9B was first published in the same form, as the fourth generation:
its vocabulary is larger, and no SentencePiece model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.storage.files import read_json_or_empty

ROTARY_BASE, POSITION_DIVISOR = "rotary_base", "position_divisor"
"""Fields of ours: the base of ChatGLM3's angles, and what ChatGLM2's positions are divided by."""
GENERATION = "chatglm_generation"
"""Field of ours: 4 for GLM-4, whose sizes need not tell."""
PLAIN_BASE = 10000.0

_NAME = re.compile(r"chatglm[-_]?v?([23])(?!\d)", re.IGNORECASE)
_GLM4_NAME = re.compile(r"(?<!chat)glm[-_]?4(?!\d)|codegeex4", re.IGNORECASE)
_GLM4_TOKENIZER = "ChatGLM4Tokenizer"
_ROLE = "<|user|>"
_CODE = "tokenization_chatglm.py"
# Between ChatGLM3's padded vocabulary and GLM-4's.
_GLM4_TOKENS = 150000
# Hugging Face's field -> PaddleNLP's.
RENAMED = {
    "num_layers": "num_hidden_layers",
    "padded_vocab_size": "vocab_size",
    "seq_length": "max_sequence_length",
}
# What PaddleNLP's model is built for; other values would be ignored and give other logits.
FIXED: dict[str, tuple[Any, ...]] = {
    "rmsnorm": (True,),
    "original_rope": (True,),
    "post_layer_norm": (True,),
    "interleaved_qkv": (False,),
    "pre_seq_len": (None,),
    "tie_word_embeddings": (False,),
}
UNDERSTOOD = (
    *(*RENAMED, *FIXED, "apply_residual_connection_post_layernorm", "multi_query_attention"),
    *(
        "hidden_size_per_attention_head",
        "quantization_bit",
        "rope_ratio",
        ROTARY_BASE,
        POSITION_DIVISOR,
        GENERATION,
    ),
)
"""Fields of config.json that are read or refused beside those of the tiny configuration."""


def may_be(generation: int, config: Mapping[str, Any], folder: Path | None) -> bool:
    """Whether a config.json is of a generation, or of one that is not told; ChatGLM-6B is of neither.

    Where nothing tells and `rope_ratio` is 1 the two compute the same, and the answer is ChatGLM2.

    Args:
        generation: 2, 3 or 4.
        config: config.json.
        folder: Where it stands, with the files of the tokenizer; None where there is none.
    """
    if "ffn_hidden_size" not in config:
        return False
    told = _generation(config, folder)
    if told is None and _ratio(config) == 1:
        told = 2
    return generation == told if told is not None else generation in (2, 3)


def adapt_config(config: dict[str, Any], generation: int) -> dict[str, Any]:
    """Hugging Face's field names -> PaddleNLP's; one key and value head per head where they are not shared.

    Raises:
        UserError: The config asks for something that the layers do not compute.
    """
    faults = [*_faults(config)]
    if faults:
        raise UserError(faults)
    left_out = ("auto_map", "rope_ratio")
    adapted = {RENAMED.get(name, name): value for name, value in config.items() if name not in left_out}
    if config.get("multi_query_attention") is False:
        adapted["multi_query_group_num"] = adapted["num_attention_heads"]
    if generation == 4:
        adapted[GENERATION] = generation
    if generation in (3, 4):
        adapted.setdefault(ROTARY_BASE, PLAIN_BASE * _ratio(config))
    elif _ratio(config) != 1:
        adapted.setdefault(POSITION_DIVISOR, float(_ratio(config)))
    # PaddleNLP's name table leaves the output layer out for Hugging Face's "ChatGLMModel".
    return adapted | {
        "model_type": "chatglm_v2",
        "architectures": ["ChatGLMv2ForCausalLM"],
        "tie_word_embeddings": False,
    }


def published_config(config: dict[str, Any], name: str) -> dict[str, Any]:
    """PaddleNLP's fields -> Hugging Face's; the generation stays told, by the name.

    Args:
        config: As `adapt_config` gives it.
        name: Of the published model.
    """
    theirs = {there: here for here, there in RENAMED.items()}
    renamed = {
        theirs.get(field, field): value
        for field, value in config.items()
        if field not in (ROTARY_BASE, POSITION_DIVISOR, GENERATION)
    }
    ratio = float(config.get(POSITION_DIVISOR) or config.get(ROTARY_BASE, PLAIN_BASE) / PLAIN_BASE)
    return renamed | {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "_name_or_path": name,
        "rope_ratio": int(ratio) if ratio.is_integer() else ratio,
        "original_rope": True,  # the published code has no default of it
        "multi_query_attention": renamed.get("multi_query_group_num") != renamed.get("num_attention_heads"),
    }


def rotary_facts(config: Any) -> tuple[float, float]:
    """Base of the angles, and what positions are divided by, from PaddleNLP's config object."""
    return float(getattr(config, ROTARY_BASE, PLAIN_BASE)), float(getattr(config, POSITION_DIVISOR, 1.0))


def _ratio(config: Mapping[str, Any]) -> Any:
    ratio = config.get("rope_ratio")
    return 1 if ratio is None else ratio


def _faults(config: Mapping[str, Any]) -> Iterator[str]:
    for name, allowed in FIXED.items():
        if name in config and config[name] not in allowed:
            yield (
                f"config.json has {name} {config[name]!r}, which this stack cannot reproduce; allowed: "
                f"{', '.join(map(repr, allowed))}. Use other weights"
            )
    if config.get("quantization_bit"):
        yield (
            f"config.json has quantization_bit {config['quantization_bit']}: these weights are packed in a form of their "
            "own, which is not read here. Use the model of ordinary weights, and weight_quantize_algo to save memory"
        )
    ratio = _ratio(config)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < float("inf"):
        yield (
            f"config.json has rope_ratio {ratio!r}; allowed: a number above 0. "
            "Copy config.json of the published folder again"
        )


def _generation(config: Mapping[str, Any], folder: Path | None) -> int | None:
    """2, 3 or 4; None where neither config.json nor the tokenizer's files tell."""
    if GENERATION in config or int(config.get("padded_vocab_size") or 0) > _GLM4_TOKENS:
        return 4
    if ROTARY_BASE in config:
        return 3
    if POSITION_DIVISOR in config:
        return 2
    settings = read_json_or_empty(folder / "tokenizer_config.json") if folder else {}
    names = [
        name for name in (config.get("_name_or_path"), settings.get("name_or_path")) if isinstance(name, str)
    ]
    if settings.get("tokenizer_class") == _GLM4_TOKENIZER:
        return 4
    for name in names:
        numbers = set(_NAME.findall(name)) | ({"4"} if _GLM4_NAME.search(name) else set())
        if len(numbers) == 1:
            return int(numbers.pop())
    return _generation_of_files(settings, folder) if folder else None


def _generation_of_files(settings: Mapping[str, Any], folder: Path) -> int | None:
    """By the tokens for roles, which ChatGLM3's files name."""
    if any(_ROLE in repr(settings.get(name)) for name in ("added_tokens_decoder", "chat_template")):
        return 3
    for name in ("chat_template.jinja", _CODE):
        path = folder / name
        if path.is_file() and _ROLE in path.read_text(encoding="utf-8", errors="replace"):
            return 3
    return 2 if (folder / _CODE).is_file() else None
