"""Computes the compared logits of multimodal models given text alone, in float32 on CPU.

    python -m tests.reference.transformers_multimodal      # rewrites golden_multimodal.json

Needs a transformers that has all of the models (4.57 or newer). The weights are drawn by NumPy, written under the names
that `save_pretrained` gives them, and read by `from_pretrained`.
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
from safetensors.numpy import load_file

from tests.reference.logits import input_rows
from tests.reference.multimodal import CASES, GOLDEN, MultimodalCase


def describe(case: MultimodalCase) -> dict[str, Any]:
    """config.json and the shapes of all tensors, as transformers saves them."""
    config = getattr(transformers, case.config_class)(**case.config)
    model = getattr(transformers, case.model_class)(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(Path(folder) / "model.safetensors")
        shapes = {name: list(array.shape) for name, array in saved.items()}
        return {"config": json.loads((Path(folder) / "config.json").read_text()), "shapes": shapes}


def reference_logits(folder: Path, model_class: str) -> np.ndarray:
    """[2, 12, vocabulary] float32 of the model in a folder, the padding masked."""
    found = (
        getattr(transformers, model_class).from_pretrained(folder, attn_implementation="eager").float().eval()
    )
    ids, mask = (torch.from_numpy(array) for array in input_rows())
    with torch.no_grad():
        return found(input_ids=ids, attention_mask=mask).logits.numpy()


def main() -> int:
    """Writes the golden values."""
    golden: dict[str, Any] = {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__}
    }
    for case in CASES.values():
        facts = describe(case)
        with tempfile.TemporaryDirectory() as parent:
            folder = case.write(Path(parent) / "model", facts["config"], facts["shapes"])
            logits = reference_logits(folder, case.model_class)
        values = [float(f"{value:.7g}") for value in logits.ravel()]
        golden[case.name] = facts | {"logits": {"shape": list(logits.shape), "values": values}}
        print(case.name, logits.std())
    GOLDEN.write_text(json.dumps(golden) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
