"""The way of Chinese-LLaMA-Alpaca-2: a Llama of Hugging Face, a larger tokenizer, its LoRA, SFT on Alpaca files, a merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from finetune.merge import tensor_parallel
from finetune.models.tiny.checkpoint import build_tiny
from tests.conftest import FAST, write_arguments

OLD, NEW = 600, 700
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")


def write_base(folder: Path) -> Path:
    """A tiny Llama in Hugging Face's form, with its tokenizer."""
    build_tiny("llama", folder / "paddle", hidden_size=32, num_layers=2, num_heads=4, vocab_size=OLD)
    source, out = str(folder / "paddle"), str(folder / "base")
    tensor_parallel.main(["--model_name_or_path", source, "--output_dir", out, "--save_format", "hf"])
    return folder / "base"


def add_tokenizer(adapter: Path, folder: Path) -> None:
    """Puts a tokenizer of more tokens beside an adapter, as its authors publish them together."""
    build_tiny("llama", folder / "larger", hidden_size=32, num_layers=1, num_heads=4, vocab_size=NEW)
    for path in (folder / "larger").iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            shutil.copy(path, adapter)


def write_sft(folder: Path, base: Path, adapter: Path, **settings: object) -> Path:
    """The argument file of a short SFT that goes on from the adapter; its output folder is `folder`/sft."""
    (folder / "alpaca").mkdir()
    for split, count in (("train", 8), ("dev", 4)):
        rows = [
            {"instruction": f"第{number}题：什么在水里游？", "input": "", "output": f"鱼{number}在水里游。"}
            for number in range(count)
        ]
        (folder / "alpaca" / f"{split}.json").write_text(json.dumps(rows, ensure_ascii=False))
    given = {
        "model_name_or_path": str(base),
        "tokenizer_name_or_path": str(adapter),
        "lora": True,
        "lora_path": str(adapter),
        "dataset_name_or_path": str(folder / "alpaca"),
        "output_dir": str(folder / "sft"),
        "max_steps": 3,
        "learning_rate": 0.01,
        "chat_template": "none",
    }
    return write_arguments(folder / "sft.json", **FAST | given | settings)
