"""The argument files for several cards, started as documented, on four CPU processes with tiny models."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from tests.distributed.layouts import build_data
from tests.distributed.processes import ROOT, launch_script
from tests.families.cases import FACTS

pytestmark = pytest.mark.distributed
slow = pytest.mark.slow_distributed

FAMILIES = ("llama", "chatglm2", "qwen", "bloom", "opt")
FILES = ("sft_argument.json", "sft_pp_argument.json")
ALWAYS = {("qwen", FILES[0]), ("bloom", FILES[1])}
IN_HALF_PRECISION = {("qwen", FILES[0])}
"""Files whose bf16 is kept here; all of them: test_half_precision_files.py."""
CASES = [
    pytest.param(family, file, marks=() if (family, file) in ALWAYS else slow)
    for family in FAMILIES
    for file in FILES
]


@pytest.mark.parametrize(("family", "file"), CASES)
def test_argument_file(family, file, tmp_path):
    from finetune.families.family import get_family
    from finetune.models.tiny.checkpoint import build_tiny

    model, output = tmp_path / "model", tmp_path / "out"
    size = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "vocab_size": 640, "max_length": 512}
    build_tiny(family, model, **FACTS[family].small | size)
    data = build_data(tmp_path / "data", num_train=70, num_dev=20)
    overrides = {
        "model_name_or_path": model, "dataset_name_or_path": data, "output_dir": output, "max_steps": 3,
        "device": "cpu", "rehearse_half_precision": (family, file) in IN_HALF_PRECISION,
    }  # fmt: skip
    words = [word for name, value in overrides.items() for word in (f"--{name}", str(value))]
    settings = json.loads((ROOT / family / file).read_text(encoding="utf-8"))
    launch = launch_script(
        ROOT / "finetune_generation.py", 4, [str(ROOT / family / file), *words], timeout=240, cwd=tmp_path
    ).check()

    check_layout(launch.outputs[0], settings)
    log = [json.loads(line) for line in (output / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [record["loss"] for record in log if record["kind"] == "train"]
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[0] == pytest.approx(math.log(640), rel=0.03)  # small random weights know nothing
    results = json.loads((output / "all_results.json").read_text(encoding="utf-8"))
    assert {"eval_loss", "eval_perplexity", "eval_accuracy"} <= results.keys()
    half = (family, file) in IN_HALF_PRECISION
    assert element_types(output) == ({"BF16"} if half else {"F32"})
    written = shapes(output)
    assert {name: written.pop(name) for name in shapes(model)} == shapes(model)
    # PaddleNLP keeps what a model works out by itself, such as rotary frequencies.
    computed = get_family(family).computed_weights
    assert all(any(re.search(pattern, name) for pattern in computed) for name in written), written


def check_layout(output: str, settings: dict) -> None:
    tensor, pipeline = settings["tensor_parallel_degree"], settings.get("pipeline_parallel_degree", 1)
    assert f"tensor {tensor} x pipeline {pipeline} x sharding 1 x data {4 // (tensor * pipeline)}" in output


def shapes(folder: Path) -> dict[str, list[int]]:
    """Of all tensors of a model folder, in one file or several."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as tensors:
            found |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    return found


def element_types(folder: Path) -> set[str]:
    """Of all tensors of a model folder."""
    from safetensors import safe_open

    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return found
