"""Models and adapters in the hands of transformers and peft: loaded, trained a little, asked for logits."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from finetune.families.family import get_family
from tests.reference.readers import READERS

HAS_PEFT = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))
REQUIRED = os.environ.get("FINETUNE_REQUIRE_PARITY") == "1"
FAMILIES = tuple(name for name, reader in READERS.items() if reader.is_own)
"""Families that go to transformers and peft, and back."""
NEEDS_PEFT = [
    pytest.mark.parity,
    pytest.mark.skipif(
        not HAS_PEFT and not REQUIRED, reason="PyTorch is not installed; make parity installs it"
    ),
]
TOLERANCE = 2e-5  # of the spread of the logits: sums in another order, through caps and large scores


def load_theirs(folder: Path):
    import torch
    import transformers

    # The other forms of attention leave caps of scores out.
    has_distances = json.loads((folder / "config.json").read_text()).get("alibi")
    settings = {"torch_dtype": torch.float32, "attn_implementation": "sdpa" if has_distances else "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def their_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15).reshape(1, 12)).logits.numpy()


def check_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() < TOLERANCE * max(1.0, float(expected.std()))


def train_peft(base: Path, folder: Path, config_class: str = "LoraConfig", **settings):
    """Two steps of peft's on a base in Hugging Face's form; gives the adapted model."""
    import peft
    import torch

    torch.manual_seed(0)
    given = {"lora_alpha": 6} if config_class == "LoraConfig" else {}
    given |= {
        "r": 4,
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "task_type": "CAUSAL_LM",
    }
    model = peft.get_peft_model(load_theirs(base), getattr(peft, config_class)(**given | settings))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    for _ in range(2):
        ids = torch.randint(3, 90, (2, 12))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(folder)
    return model


def write_their_config(folder: Path, name: str, config: dict) -> None:
    from finetune.merge.hf_out import hugging_face_config

    content = hugging_face_config(config, get_family(name), dtype="float32")
    (folder / "config.json").write_text(json.dumps(content))
