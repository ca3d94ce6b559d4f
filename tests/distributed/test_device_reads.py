"""A step waits for the device once, at its end: every family, both kinds of rows, full and LoRA, every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed.layouts import GLOBAL_BATCH_SIZE, LAYOUTS, METHODS

pytestmark = pytest.mark.distributed

FAMILIES = ("llama", "chatglm2", "qwen", "bloom", "opt")
NUM_STEPS = 3
ROWS = {"padded": {}, "packed": {"zero_padding": True}, "lazy packed": {"zero_padding": True, "lazy": True}}
END_OF_STEP = "numpy in finetune/parallel/parallel_model.py"
END_OF_EVALUATION = "tolist in finetune/parallel/parallel_model.py"
LOSS_SCALER = {f"{call} in finetune/training/overflow.py" for call in ("__bool__", "__float__")}
DTYPE_TOLD = "tolist in finetune/parallel/pipe/transfers.py"


def with_dropout(folder: Path, target: Path) -> Path:
    """A copy of a model that drops wherever its configuration can say so."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    dropping = {name: 0.1 for name, value in config.items() if "dropout" in name and isinstance(value, float)}
    path.write_text(json.dumps(config | dropping), encoding="utf-8")
    return target


def settings_of(bench, model: Path, method: str, rows: str) -> dict:
    return {
        **bench.settings("llama", method, "padded"),
        "model_name_or_path": str(model),
        "max_steps": NUM_STEPS,
        "eval_steps": NUM_STEPS,
        "warmup_steps": 0,
        "neftune": True,
        "max_grad_norm": 0.1,
        **ROWS[rows],
        **({"lora_dropout": 0.1} if method == "lora" else {}),
    }


def places(reads: list[str]) -> list[str]:
    return [read.rpartition(":")[0] for read in reads]


@pytest.mark.parametrize("rows", ["padded", "packed"])
@pytest.mark.parametrize("method", ["sft", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_process_reads_once_a_step(bench, tmp_path, family, method, rows):
    settings = settings_of(bench, with_dropout(bench.model(family), tmp_path / "model"), method, rows)
    sizes = {"per_device_train_batch_size": GLOBAL_BATCH_SIZE // 4, "gradient_accumulation_steps": 4}
    run = bench.server.run(settings | sizes, counts_reads=True).check()
    assert [places(reads) for reads in run.reads("train_batch")[0]] == [[END_OF_STEP]] * NUM_STEPS
    assert [places(reads) for reads in run.reads("run")[0]] == [[END_OF_EVALUATION]]


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({"bf16": True, "fp16_opt_level": "O1"}, set()),
        ({"bf16": True, "fp16_opt_level": "O2", "amp_master_grad": True}, set()),
        ({"fp16": True, "fp16_opt_level": "O2"}, LOSS_SCALER),
    ],
)
def test_half_precision_reads_once_but_for_the_scaler_of_float16(bench, settings, others):
    """The scaler's reads come behind the step's own: nothing is computed any more that they could hold up."""
    half = settings | {"rehearse_half_precision": True, "max_grad_norm": 1.0}
    sizes = {"per_device_train_batch_size": GLOBAL_BATCH_SIZE // 4, "gradient_accumulation_steps": 4}
    usual = settings_of(bench, bench.model("llama"), "sft", "packed")
    run = bench.server.run(usual | half | sizes, counts_reads=True).check()
    for first, *later in map(places, run.reads("train_batch")[0]):
        assert first == END_OF_STEP and set(later) == others


@pytest.mark.parametrize(
    ("layout", "method", "rows"),
    [
        ("dp2", "sft", "padded"),
        ("dp2", "lora", "lazy packed"),
        ("tp2", "sft", "packed"),
        ("tp2 sequence", "lora", "padded"),
        ("pp2", "sft", "packed"),
        ("pp2 virtual2", "pt", "padded"),
        ("sharding2 stage1", "sft", "packed"),
        ("sharding2 stage2", "lora", "padded"),
        ("sharding2 stage3", "sft", "packed"),
    ],
)
def test_every_process_reads_once_a_step(bench, layout, method, rows):
    case = LAYOUTS[layout]
    settings = settings_of(bench, bench.model("llama"), method, rows) | case.arguments()
    run = bench.server.run(settings, case.world, counts_reads=True).check()
    steps, evaluations = run.reads("train_batch"), run.reads("run")
    assert METHODS[method].items() <= settings.items() and len(steps) == case.world
    for rank in range(case.world):
        first, *later = (places(reads) for reads in steps[rank])
        assert later == [[END_OF_STEP]] * (NUM_STEPS - 1)
        assert first[-1] == END_OF_STEP
        receives = layout.startswith("pp") and (rank > 0 or "virtual" in layout)
        assert set(first[:-1]) == ({DTYPE_TOLD} if receives else set())
        (evaluation,) = evaluations[rank]
        assert [read for read in places(evaluation) if read != DTYPE_TOLD] == [END_OF_EVALUATION]
