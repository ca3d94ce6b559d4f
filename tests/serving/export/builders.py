"""Tiny models that say something, their exports, and the dynamic text to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.models.loading import load_model
from finetune.models.resolve import resolve_model
from finetune.models.tiny.checkpoint import build_tiny
from finetune.serving.decoding.settings import DecodingSettings
from finetune.serving.export.options import ExportOptions
from tests.families.cases import FACTS
from tests.families.decoding import WEIGHT_SCALE, random_rows

LENGTHS = (5, 9, 3, 12)
# Large embeddings would outweigh the layers, and a tied output layer then repeats the last token.
_SCALES = {"embeddings_layernorm": 0.05, "norm": 1.0, "ln_": 1.0, "embed": 1.0, "wte": 1.0}


def build_sharp(family: str, folder: Path, **options: Any) -> Path:
    """A tiny checkpoint whose layers matter: with its small weights attention is uniform and hides faults."""
    from safetensors.numpy import load_file, save_file

    if FACTS[family].groups_heads:
        options = {"num_key_value_heads": 2, **options}
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 600, "max_length": 256}
    build_tiny(family, folder, **sizes | options)
    path = folder / "model.safetensors"
    sharpness = FACTS[family].sharpness
    tensors = {
        name: tensor * np.float32(_scale(name) * (sharpness if name.endswith("proj.weight") else 1.0))
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "np"})
    return folder


def export_folder(model: Path, output: Path, **options: Any) -> Path:
    """Exports as export_model.py does, in this process."""
    from finetune.serving.export.run import export

    chosen = ExportOptions(model_name_or_path=str(model), output_path=output, **options)
    chosen.check()
    export(chosen, resolve_model(model))
    return output


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    """Rows of ordinary ids."""
    return [row.tolist() for row in random_rows(lengths, seed=seed)]


def dynamic_model(folder: Path) -> Any:
    """The checkpoint as PaddleNLP runs it."""
    return load_model(resolve_model(folder), dtype="float32")


def dynamic_text(
    model: Any, rows: list[list[int]], settings: DecodingSettings, *, stop_ids: Sequence[int] = (-1,)
) -> list[list[int]]:
    """Tokens of PaddleNLP's `generate`, everything behind a stop id cut off."""
    import paddle

    length = max(map(len, rows))
    # Hidden columns hold the row's last token: PaddleNLP penalises what stands there, too.
    ids = np.array([[row[-1]] * (length - len(row)) + row for row in rows])
    positions = np.arange(length) - np.array([[length - len(row)] for row in rows])
    with paddle.no_grad():
        made, _ = model.generate(
            input_ids=paddle.to_tensor(ids),
            attention_mask=paddle.to_tensor((positions >= 0).astype("int64")),
            position_ids=paddle.to_tensor(positions.clip(0)),
            eos_token_id=list(stop_ids),
            pad_token_id=0,
            **settings.to_kwargs(),
        )
    answers = []
    for row in made.tolist():
        end = next((place for place, token in enumerate(row) if token in stop_ids), len(row))
        answers.append(row[:end])
    return answers


def _scale(name: str) -> float:
    return next((scale for part, scale in _SCALES.items() if part in name), WEIGHT_SCALE)
