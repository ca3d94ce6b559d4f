"""A tensor-parallel rank reads its part of a checkpoint and no more, measured on a file of 2 GB.

Counted is VmHWM, the largest resident set that a process ever had, touched pages of mapped files included, less
the resident set before loading.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from finetune.families.family import get_family
from finetune.families.tiny_recipe import TinyShape
from finetune.storage.writer import TensorWriter
from tests.distributed.processes import launch_script

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM from /proc"),
]

DEGREE = 4
ALLOWED_BYTES = 750_000_000
SHAPE = TinyShape(
    hidden_size=2048,
    intermediate_size=5504,
    num_layers=9,
    num_heads=16,
    num_kv_heads=16,
    vocab_size=16000,
    max_length=64,
)
WORKER = """
import sys
from finetune.models.loading import load_model; from finetune.models.resolve import resolve_model
from finetune.processes.groups import start_groups
from finetune.processes.layout import Layout
import paddle, paddlenlp.transformers
paddle.set_device("cpu")

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

resolved = resolve_model(sys.argv[1])
groups = start_groups(Layout(tensor=4), device="cpu")
import importlib
importlib.import_module(resolved.family.model_class.rpartition(".")[0])
before = status("VmRSS")
overrides = {"tensor_parallel_degree": 4, "tensor_parallel_rank": groups.rank}
model = load_model(resolved, dtype="float32", config_overrides=overrides)
size = sum(int(p.size) * p.element_size() for p in model.parameters())
print(f"MEMORY {status('VmHWM') - before} {size}")
"""


def write_checkpoint(name: str, folder: Path) -> int:
    """Random weights, tensor by tensor; returns their size in bytes."""
    recipe = get_family(name).tiny
    specs = recipe.weights(SHAPE)
    (folder / "config.json").write_text(json.dumps(recipe.config(SHAPE)))
    writer = TensorWriter(
        folder / "model.safetensors", {key: ("float32", spec.shape) for key, spec in specs.items()}
    )
    generator = np.random.default_rng(0)
    for key, spec in specs.items():
        writer.write(key, generator.random(spec.shape, dtype=np.float32))
    writer.close()
    return sum(4 * int(np.prod(spec.shape)) for spec in specs.values())


@pytest.mark.parametrize("name", ["llama", "chatglm2"])
def test_four_ranks_add_little_more_than_their_quarter(name, tmp_path):
    size = write_checkpoint(name, tmp_path)
    assert size > 1.9e9
    launch = launch_script(WORKER, DEGREE, [str(tmp_path)], timeout=300).check()
    for output in launch.outputs:
        line = next(line for line in output.splitlines() if line.startswith("MEMORY"))
        added, held = map(int, line.split()[1:])
        print(f"{name}: checkpoint {size / 1e6:.0f} MB, held {held / 1e6:.0f} MB, added {added / 1e6:.0f} MB")
        assert held < size / DEGREE * 1.01
        assert added < ALLOWED_BYTES, launch.tails()
