"""Windows of Qwen2 and Qwen3: from a layer on, or in layers that are named, a token sees the last tokens only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import UserError

_FULL, _NARROW = "full_attention", "sliding_attention"
_LEFT_OUT = {"sliding_window": 4096, "max_window_layers": 28}
"""What transformers takes for fields that a config.json leaves out."""


def windowed_layers(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """For each layer whether a config.json asks for the window there.

    As transformers reads it: without `use_sliding_window`, or with a window of null, no layer has it; else those that
    `layer_types` names, or where that is missing those from number `max_window_layers` on.

    Args:
        config: As found.
        num_layers: Of the model.

    Raises:
        UserError: Layers are named that contradict the rest.
    """
    kinds = config.get("layer_types")
    is_on = bool(config.get("use_sliding_window")) and bool(_said(config, "sliding_window"))
    if kinds is None:
        return tuple(is_on and number >= _said(config, "max_window_layers") for number in range(num_layers))
    if len(kinds) != num_layers or not set(kinds) <= {_FULL, _NARROW}:
        raise UserError(
            f"config.json has layer_types of {len(kinds)} layers, {', '.join(sorted(set(map(str, kinds))))}, but must name "
            f"{_FULL} or {_NARROW} for each of num_hidden_layers {num_layers}: copy it again"
        )
    if _NARROW in kinds and not is_on:
        raise UserError(
            f"config.json names layers with sliding-window attention (layer_types), but use_sliding_window "
            f"{config.get('use_sliding_window')!r} and sliding_window {config.get('sliding_window')!r} give them no window: "
            "copy it again"
        )
    return tuple(kind == _NARROW for kind in kinds)


def _said(config: Mapping[str, Any], name: str) -> int:
    return int(config.get(name, _LEFT_OUT[name]) or 0)


def with_layer_windows(config: Mapping[str, Any], *, num_layers: int) -> dict[str, Any]:
    """The configuration with the window, or null, and the kind of every layer, where one has the window.

    Args:
        config: As found.
        num_layers: Of a model whose configuration does not say.

    Raises:
        UserError: See `windowed_layers`.
    """
    adapted = dict(config)
    narrow = windowed_layers(config, config.get("num_hidden_layers", num_layers))
    if not any(narrow):
        return adapted | {"sliding_window": None}
    return adapted | {
        "sliding_window": _said(config, "sliding_window"),
        "layer_types": [_NARROW if each else _FULL for each in narrow],
    }


def window_facts(config: Any) -> dict[str, Any]:
    """The window and the layers that have it, as `HeadFacts` takes them.

    Args:
        config: PaddleNLP's object of a configuration of `with_layer_windows`.
    """
    narrow = tuple(kind == _NARROW for kind in getattr(config, "layer_types", None) or ())
    if not any(narrow):
        return {}
    return {"window": config.sliding_window, "windowed_layers": narrow}
