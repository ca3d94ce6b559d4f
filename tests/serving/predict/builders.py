"""Adapters on disk, and a decoder with answers known before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.serving.decoding.settings import DecodingSettings
from tests.families.decoding import with_lora, with_prefix


def save_lora(base: Path, folder: Path) -> Path:
    """A LoRA adapter that matters, as a run leaves it."""
    import paddle

    resolved = resolve_model(base)
    model = with_lora(load_model(resolved, dtype="float32"), resolved.family)
    paddle.seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.set_value(paddle.randn(parameter.shape) * 0.3)
    return _save(model, folder)


def save_prefix(base: Path, folder: Path) -> Path:
    """A trained prefix, as a run leaves it."""
    resolved = resolve_model(base)
    return _save(with_prefix(load_model(resolved, dtype="float32"), resolved.family), folder)


def _save(model: Any, folder: Path) -> Path:
    from finetune.adapters.files import save_adapter

    folder.mkdir(parents=True)
    save_adapter(model, folder)
    return folder


class ScriptedDecoder:
    """Always gives the same tokens, one after another.

    Attributes:
        calls: Prompts and numbers of the samples of every call.
    """

    def __init__(self, ids: Sequence[int], fail_at: int | None = None):
        self._ids = list(ids)
        self._fail_at = fail_at
        self.calls: list[tuple[list[list[int]], list[int] | None]] = []

    def generate(
        self, prompts: Any, settings: DecodingSettings, *, samples: Any = None, on_tokens: Any = None
    ) -> list[list[int]]:
        if len(self.calls) == self._fail_at:
            raise KeyboardInterrupt
        self.calls.append(([list(row) for row in prompts], None if samples is None else list(samples)))
        for token in self._ids if on_tokens else ():
            on_tokens([[token]] * len(prompts))
        return [list(self._ids) for _ in prompts]
