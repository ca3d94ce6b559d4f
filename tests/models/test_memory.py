"""Loading holds the model and little more, measured on real files.

Counted is VmHWM of a fresh process: the largest resident set it ever had, imports of Paddle and PaddleNLP and
touched pages of mapped files included (0.5 GB of it is there before the first weight is read).
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.storage.torch_writing import save_bin

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM from /proc"),
]

ALLOWED_BYTES = 10**9
HIDDEN, INNER, VOCABULARY = 2048, 5632, 32000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 128,
}
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16"}
MEASURE = """
import sys
from finetune.models.loading import load_model; from finetune.models.resolve import resolve_model
from finetune.models.vocabulary import VocabularyGrowth
rows = int(sys.argv[2])
growth = VocabularyGrowth(32000, rows, ("embed_tokens", "lm_head")) if rows else None
model = load_model(resolve_model(sys.argv[1]), dtype="float32", growth=growth)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024, sum(int(p.size) * p.element_size() for p in model.parameters()))
"""


def shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers stores a Llama."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        found |= {f"{prefix}mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        found[prefix + "mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {
            f"{prefix}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str) -> None:
    """Random numbers, tensor by tensor, so that the test needs no memory either."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        begin, end = end, end + int(np.prod(shape)) * np.dtype(dtype).itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for shape in tensors.values():
            file.write(generator.standard_normal(shape, dtype=np.float32).astype(dtype).tobytes())


def measure(folder: Path, *, num_layers: int, rows: int = 0) -> tuple[int, int]:
    """Peak memory of loading a folder as float32, and bytes of the model."""
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": num_layers}))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), str(rows)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    peak, size = map(int, run.stdout.split()[-2:])
    print(f"model {size / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, {(peak - size) / 1e6:.0f} MB above it")
    return peak, size


@pytest.mark.parametrize(("dtype", "num_layers"), [("float32", 3), ("float16", 1)])
def test_safetensors(tmp_path, dtype, num_layers):
    write_safetensors(tmp_path / "model.safetensors", shapes(num_layers), dtype)
    peak, size = measure(tmp_path, num_layers=num_layers)
    assert size > (1e9 if num_layers == 3 else 0.6e9)
    assert peak < size + ALLOWED_BYTES


def test_paddlenlps_pdparams(tmp_path):
    generator = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes(3).items():
        stored = shape if "embed" in name else shape[::-1]
        tensors[name.replace("model.", "llama.")] = generator.standard_normal(stored, dtype=np.float32)
    with (tmp_path / "model_state.pdparams").open("wb") as file:
        pickle.dump(tensors, file, 4)
    peak, size = measure(tmp_path, num_layers=3)
    assert size > 1e9
    assert peak < size + ALLOWED_BYTES


def test_pytorch_bin(tmp_path):
    generator = np.random.default_rng(0)
    tensors = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes(3).items()}
    save_bin(tmp_path / "pytorch_model.bin", tensors)
    peak, size = measure(tmp_path, num_layers=3)
    assert size > 1e9
    assert peak < size + ALLOWED_BYTES


def test_more_embeddings(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", shapes(1), "float16")
    peak, size = measure(tmp_path, num_layers=1, rows=55296)
    assert size > 1e9
    assert peak < size + ALLOWED_BYTES
