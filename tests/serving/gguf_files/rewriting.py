"""Changes one number of a tensor in a safetensors file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from finetune.storage.safetensors_files import read_safetensors


def rewrite(path: Path, name: str, value: float) -> None:
    """Writes a float32 over the first number of a tensor."""
    start = read_safetensors(path).arrays[name].start
    content = bytearray(path.read_bytes())
    content[start : start + 4] = np.float32(value).tobytes()
    path.write_bytes(content)
