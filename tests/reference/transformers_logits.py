"""Computes the compared logits with Hugging Face transformers, in float32 on CPU.

    python -m tests.reference.transformers_logits      # rewrites golden_logits.npz and golden_logits.json

The weights are drawn by NumPy and put into models that transformers builds from their configs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tests.reference import llama_changes
from tests.reference.logits import (
    CASES,
    GOLDEN_CHECKPOINTS,
    GOLDEN_LOGITS,
    LARGE,
    LogitCase,
    draw_weights,
    input_rows,
)


def model_class(name: str) -> Any:
    """transformers' class of that family's models with an output layer."""
    return getattr(transformers, f"{name}ForCausalLM", None) or getattr(transformers, f"{name}LMHeadModel")


def build_reference(case: LogitCase, scale: float) -> torch.nn.Module:
    """The transformers model with the drawn weights in it."""
    config_class = case.config_class or f"{case.transformers_class}Config"
    config = getattr(transformers, config_class)(**case.config)
    config._attn_implementation = case.attention
    model = model_class(case.transformers_class)(config).float().eval()
    drawn = draw_weights(case, shapes_of(model), scale)
    weights = {name: torch.from_numpy(array) for name, array in drawn.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= set(model._tied_weights_keys or ())
    model.tie_weights()
    for change in case.changes:
        getattr(llama_changes, change)(model)
    return model


def shapes_of(model: torch.nn.Module) -> dict[str, list[int]]:
    """Shapes of all weights that a file of the model holds."""
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    return {name: list(value.shape) for name, value in model.state_dict().items() if name not in tied}


def reference_logits(model: torch.nn.Module) -> np.ndarray:
    """[2, 12, vocabulary] float32, the padding masked."""
    ids, mask = (torch.from_numpy(array) for array in input_rows())
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits.numpy()


def main() -> int:
    """Writes the golden values that are compared with where PyTorch is not installed."""
    logits, checkpoints = {}, {}
    for case in CASES.values():
        model = build_reference(case, LARGE)
        logits[case.name] = reference_logits(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, safe_serialization=True)
            config = json.loads((Path(folder) / "config.json").read_text())
        checkpoints[case.name] = {"config": config, "shapes": shapes_of(model)}
    np.savez_compressed(GOLDEN_LOGITS, **logits)
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    GOLDEN_CHECKPOINTS.write_text(json.dumps({"made_with": made_with, "checkpoints": checkpoints}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
