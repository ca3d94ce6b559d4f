"""What ranks hold and update, as `plan` tells it before a run, is what the run of these processes tells."""

from __future__ import annotations

import json
import re

import pytest

from finetune.commands.plan import main
from finetune.models.tiny.checkpoint import build_tiny
from tests.conftest import FAST, ROOT, write_arguments
from tests.distributed.processes import launch_script

pytestmark = [pytest.mark.distributed, pytest.mark.slow_distributed]

_ROW = re.compile(r"^ +\d+ +\d+ +\d+ +\d+ +\d+ +([\d.,M() ]+)$", re.MULTILINE)
_STAGE1 = {"sharding": "stage1", "sharding_parallel_degree": 2}
LAYOUTS = (
    {"tensor_parallel_degree": 2, "pipeline_parallel_degree": 2},
    {"tensor_parallel_degree": 2} | _STAGE1,
    {"pipeline_parallel_degree": 2, "lora": True} | _STAGE1,
    {
        "pipeline_parallel_degree": 2,
        "virtual_pp_degree": 2,
        "prefix_tuning": True,
        "tensor_parallel_degree": 2,
    },
)


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3_moe"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: "-".join(each))
def test_as_planned(family, layout, small_data, tmp_path, capsys):
    model = build_tiny(family, tmp_path / "model", hidden_size=32, num_layers=4, num_heads=4, vocab_size=600)
    settings = FAST | {
        "model_name_or_path": str(model),
        "dataset_name_or_path": str(small_data),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
    }
    arguments = write_arguments(tmp_path / "arguments.json", **settings | layout)
    assert main([str(arguments), "--num_cards", "4", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    run = launch_script(ROOT / "finetune_generation.py", 4, [str(arguments)], cwd=ROOT).check()
    rows = [re.findall(r"[\d,]+", row) for row in _ROW.findall(run.outputs[0])]
    numbers = [[int(each.replace(",", "")) for each in row] for row in rows]
    assert [row[0] for row in numbers] == planned["parameters_per_rank"]
    if "sharding" in layout:
        assert [row[1] for row in numbers] == planned["updated_per_rank"]
