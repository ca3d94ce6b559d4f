"""A model with an adapter on it, and the model inside."""

from __future__ import annotations

from typing import Any


def is_adapter(model: Any) -> bool:
    """Whether a model is wrapped by one of PaddleNLP's adapter classes."""
    return hasattr(model, "lora_config") or hasattr(model, "prefix_config")


def base_model(model: Any) -> Any:
    """The model inside an adapter, or the model itself."""
    return model.model if is_adapter(model) else model
