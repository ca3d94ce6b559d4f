"""Every shipped argument file in its own precision and its own layout: trained, killed, resumed, evaluated, merged.

The files stand as they are; what a tiny model on CPU processes needs is said behind them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import read_log
from tests.distributed.precision_finals import TRAINED
from tests.distributed.precisions import FAMILIES, TOLERANCES
from tests.distributed.server_runs import ROOT, Kill, Run
from tests.families.cases import FACTS

pytestmark = pytest.mark.distributed

METHODS = ("sft", "lora", "pt", "sft_pp")
NUM_TRAIN, NUM_DEV = 17, 2
"""Two steps an epoch, the second of one sample."""
NUM_EPOCHS, NUM_STEPS, SAVED = 2, 4, 2
VOCABULARY = 640


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Gives the tiny checkpoint of a family, built once."""
    from finetune.models.tiny.checkpoint import build_tiny

    root = tmp_path_factory.mktemp("models")

    def build(family: str) -> Path:
        size = FACTS[family].small | {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "max_length": 256,
        }
        return root / family if (root / family).exists() else build_tiny(family, root / family, **size)

    return build


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The shortest samples of the sample set."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", NUM_TRAIN), ("dev", NUM_DEV)):
        lines = (ROOT / "data" / f"{split}.json").read_text(encoding="utf-8").splitlines()
        chosen = sorted(lines, key=len)[:count]
        (folder / f"{split}.json").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_file(family, method, bench, model, data, tmp_path):
    path = ROOT / family / f"{method}_argument.json"
    file = json.loads(path.read_text(encoding="utf-8"))
    assert file["bf16"] is True and file["fp16_opt_level"] == "O2"
    degrees = [file.get(f"{axis}_parallel_degree", 1) for axis in ("tensor", "pipeline")]
    world = math.prod(degrees)
    base = {
        "model_name_or_path": model(family),
        "dataset_name_or_path": data,
        "device": "cpu",
        "rehearse_half_precision": "true",
    }

    def run(name: str, world: int = 1, kill: Kill | None = None, **more: Any) -> Run:
        options = base | {"output_dir": tmp_path / name} | more
        return bench.server.run_file(path, options, world, kill=kill)

    out = run("out", world, num_train_epochs=NUM_EPOCHS).check()
    if world > 1:
        assert f"tensor {degrees[0]} x pipeline {degrees[1]} x sharding 1 x data 1" in out.logs[0]
    check_curve(out, method)

    killed = run("killed", world, Kill(f"checkpoint-{SAVED}"), num_train_epochs=NUM_EPOCHS)
    assert killed.killed, killed.tails()
    again = run("killed", world, num_train_epochs=NUM_EPOCHS).check()
    assert f"Continuing from {killed.folder}/checkpoint-{SAVED}" in again.logs[0], again.tails()
    assert again.curve() == out.curve()
    assert results(again) == results(out)

    # One process reads what many wrote.
    saved = {TRAINED[method.removesuffix("_pp")]: out.folder, "do_train": "false"}
    if world > 1:
        saved |= {"tensor_parallel_degree": 1, "pipeline_parallel_degree": 1}
    limit = TOLERANCES["bf16"]["eval_loss"] if world > 1 else 0
    expected = results(out)["eval_loss"]
    assert results(run("by_loss", **saved).check())["eval_loss"] == pytest.approx(expected, rel=limit, abs=0)
    generation = {"eval_with_do_generation": "true", "max_new_tokens": 4, "save_generation_output": "true"}
    answers = run("by_generation", **saved, **generation).check().folder / "generated_output.json"
    assert len(answers.read_text(encoding="utf-8").splitlines()) == NUM_DEV

    if method == "lora":
        merged = tmp_path / "merged"
        options = ["--model_name_or_path", model(family), "--lora_path", out.folder]
        bench.server.run_script("merge_lora_params", [*options, "--merge_model_path", merged], merged).check()
        more = {"model_name_or_path": merged, "lora": "false", "do_train": "false"}
        loss = results(run("of_merged", **more).check())["eval_loss"]
        assert loss == pytest.approx(expected, rel=TOLERANCES["bf16"]["eval_loss"])


def check_curve(out: Run, method: str) -> None:
    """All steps are there, the model knew nothing and learns, and its weights are in half precision."""
    log = read_log(out.folder)
    assert [record["step"] for record in log] == list(range(1, NUM_STEPS + 1))
    assert log[0]["loss"] == pytest.approx(math.log(VOCABULARY), rel=0.03)
    assert all(math.isfinite(record["grad_norm"]) and record["grad_norm"] > 0 for record in log)
    assert [record["step"] for record in read_log(out.folder, "eval")] == [SAVED, NUM_STEPS]
    written = {dtype for path in out.folder.glob("*.safetensors") for dtype in dtypes(path)}
    assert written == {"BF16"}, (method, written)


def dtypes(path: Path) -> set[str]:
    """Element types of a safetensors file, from its header."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {entry["dtype"] for name, entry in header.items() if name != "__metadata__"}


def results(run: Run) -> dict[str, float]:
    """Metrics of a run, without those of the clock."""
    found = json.loads((run.folder / "all_results.json").read_text(encoding="utf-8"))
    return {name: value for name, value in found.items() if "second" not in name}
