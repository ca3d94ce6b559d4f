"""Loading and training over a quantised base hold the packed model and little more, measured on a file of 1.1 GB.

Counted is VmHWM of a fresh process, less what it holds after the imports. A matrix of 11.5M weights is the largest: in
float32 it takes 46 MB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.models import test_memory as large

pytestmark = [
    pytest.mark.slow_distributed,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM from /proc"),
]

NUM_LAYERS = 5
LARGEST = large.HIDDEN * large.INNER * 4
MEASURE = """
import sys
from types import SimpleNamespace
import numpy as np, paddle
from finetune.adapters.lora import add_lora
from finetune.machine.processor import keep_freed_memory
from finetune.models.loading import load_model; from finetune.models.resolve import resolve_model
from finetune.models.quantised.layers import packed_layers
from finetune.storage.quantisation.scheme import QuantisationScheme
from finetune.training.loss import logits_of
import paddlenlp.transformers.llama.modeling
def held(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024
keep_freed_memory()
paddle.matmul(paddle.rand([64, 64]), paddle.rand([64, 64]))
before = held("VmRSS")
folder, algorithm, *options = sys.argv[1:]
resolved = resolve_model(folder)
scheme = QuantisationScheme(algorithm=algorithm) if algorithm != "none" else None
model = load_model(resolved, dtype="float32", config_overrides={"use_cache": False}, quantisation=scheme)
loaded = held("VmHWM")
settings = dict(lora_target_modules=None, lora_rank=8, lora_alpha=16, lora_dropout=0.0, rslora=False,
                lora_plus_scale=1.0, pissa=False, model_name_or_path="large", modules_to_save=None,
                use_dora=False, lora_use_mixer=False, rank_pattern=None, alpha_pattern=None, lora_bias="none", lora_dtype=None,
                init_lora_weights="default", vera=False, lokr=False)
model = add_lora(model, SimpleNamespace(**settings), family=resolved.family, dtype="float32")
model.mark_only_lora_as_trainable()
model.train()
if "recompute" in options:
    model.recompute_enable()
trained = [each for each in model.parameters() if not each.stop_gradient]
optimizer = paddle.optimizer.AdamW(1e-4, parameters=trained)
ids = paddle.to_tensor(np.arange(256).reshape(1, 256))
for _ in range(2):
    logits = logits_of(model(input_ids=ids))
    paddle.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    del logits
    optimizer.step()
    optimizer.clear_grad()
size = sum(int(each.size) * each.element_size() for each in model.parameters())
size += sum(layer.packed.num_bytes for layer in packed_layers(model).values())
print(size, loaded - before, held("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Llama of 1.1 GB in float32 with a small vocabulary."""
    path = tmp_path_factory.mktemp("large")
    shapes = large.shapes(NUM_LAYERS)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shapes[name] = (8000, large.HIDDEN)
    large.write_safetensors(path / "model.safetensors", shapes, "float32")
    config = large.CONFIG | {
        "vocab_size": 8000,
        "num_hidden_layers": NUM_LAYERS,
        "max_position_embeddings": 512,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def measure(folder: Path, *words: str) -> tuple[int, int, int]:
    """Bytes of the model as it is held; most that loading, and training, took beyond the imports."""
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), *words],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    size, loading, training = map(int, run.stdout.split()[-3:])
    print(f"{words}: model {size / 1e6:.0f} MB, loading {loading / 1e6:.0f}, training {training / 1e6:.0f}")
    return size, loading, training


@pytest.mark.parametrize("algorithm", ["nf4", "llm.int8"])
def test_with_recompute_little_is_held_beside_the_model(folder, algorithm):
    size, loading, training = measure(folder, algorithm, "recompute")
    assert size < 0.45e9
    assert loading < size + 4 * LARGEST + 400e6
    assert training < size + 600e6


def test_without_recompute_only_one_matrix_is_added_beside_float32(folder):
    size, loading, training = measure(folder, "nf4")
    assert size < 0.3e9
    assert loading < size + 4 * LARGEST + 400e6
    assert training < size + 600e6
    plain_size, _, plain = measure(folder, "none")
    assert plain_size > 1.1e9
    # Values of the matrix in use, and what the allocator leaves unused between tensors of other sizes.
    assert training - size < plain - plain_size + 4 * LARGEST
