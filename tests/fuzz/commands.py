"""The commands as they are run here: good inputs for them, and where they end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 320,
    "max_length": 128,
}
LINES = [
    {"src": "类型#上衣*风格#职场", "tgt": "这款上衣职场必备。"},
    {"src": ["a red dress"], "tgt": ["The red dress fits well."]},
    {"src": "a", "tgt": "b"},
]


def corpus(folder: Path) -> Path:
    path = folder / "corpus.json"
    lines = (ROOT / "data" / "train.json").read_text(encoding="utf-8").splitlines()[:100]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def prepare_model(folder: Path, family: str = "llama") -> Path:
    from finetune.models.tiny.checkpoint import build_tiny

    return build_tiny(family, folder / family, corpus=corpus(folder), **SMALL)


def prepare_run(folder: Path) -> None:
    """A model, data, and the least argument file."""
    prepare_model(folder)
    data = folder / "data"
    data.mkdir()
    for split in ("train", "dev"):
        text = "\n".join(json.dumps(line, ensure_ascii=False) for line in LINES * 2)
        (data / f"{split}.json").write_text(text, encoding="utf-8")


def arguments(good: Path, **settings: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(good / "llama"),
        "dataset_name_or_path": str(good / "data"),
        "output_dir": "out",
        "do_train": True,
        "device": "cpu",
        "max_steps": 2,
        "max_length": 64,
        "src_length": 32,
        "per_device_train_batch_size": 2,
    } | settings


@contextmanager
def stop_at(module: str, name: str, act: Any = lambda *_given: None) -> Iterator[None]:
    """Ends the command where it would call something."""
    import importlib

    holder = importlib.import_module(module)
    for part in name.split(".")[:-1]:
        holder = getattr(holder, part)
    name = name.rpartition(".")[2]
    original = getattr(holder, name)

    def stop(*given: Any, **named: Any) -> None:
        act(*given, **named)
        raise SystemExit(0)

    setattr(holder, name, stop)
    try:
        yield
    finally:
        setattr(holder, name, original)


def finetune(words: list[str]) -> None:

    import finetune_generation

    argv, sys.argv = sys.argv, ["finetune_generation.py", *words]
    try:
        finetune_generation.main()
    finally:
        sys.argv = argv


def load_paddle() -> None:
    import paddlenlp.trainer
    import paddlenlp.transformers  # noqa: F401

    import finetune.run.trainer  # noqa: F401
