"""What runs of several processes leave, made into one model by the merge scripts."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from safetensors.numpy import load_file

from tests.distributed.layouts import FAMILIES, LAYOUTS, ROOT
from tests.reference.test_hugging_face_folders import check_tokens

pytestmark = pytest.mark.distributed
slow = pytest.mark.slow_distributed
TOLERANCE = 1e-5

CASES = [("chatglm2", "tp2"), ("llama", "tp2 x pp2")]
SLOW_CASES = [
    (family, layout)
    for family in FAMILIES
    for layout in ("one", "tp2", "tp2 x pp2")
    if (family, layout) not in CASES
]


def run_script(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("family", "layout"), [*CASES, *(pytest.param(*case, marks=slow) for case in SLOW_CASES)]
)
def test_a_merged_adapter_computes_what_the_adapter_computes(bench, family, layout, tmp_path):
    settings = bench.settings(family, "lora", "padded") | {"max_steps": 6, "do_eval": False}
    settings |= {"evaluation_strategy": "no", "learning_rate": 0.01, "rslora": True}
    degrees = {} if layout == "one" else LAYOUTS[layout].arguments()
    world = 1 if layout == "one" else LAYOUTS[layout].world
    run = bench.server.run(settings | degrees, world).check()
    text = run_script(
        "merge_lora_params.py",
        *("--model_name_or_path", bench.model(family), "--lora_path", run.folder),
        *("--merge_model_path", tmp_path / "merged", "--verify"),
    )
    found = re.search(r"largest difference of a logit ([0-9.e+-]+),", text)
    assert found, text
    assert float(found[1]) <= TOLERANCE
    changes = [float(each) for each in re.findall(r"changed by ([0-9.]+) %", text)]
    assert changes and min(changes) > 0.01  # an adapter that did nothing would merge well, too


def test_files_of_ranks_merge_to_the_whole_model(bench, tmp_path):
    settings = bench.settings("qwen", "sft", "padded") | LAYOUTS["tp2 x pp2"].arguments()
    settings |= {"max_steps": 2, "save_steps": 2, "save_strategy": "steps", "unified_checkpoint": False}
    run = bench.server.run(settings | {"evaluation_strategy": "no", "do_eval": False}, 4).check()
    checkpoint = run.folder / "checkpoint-2"
    assert len(list(checkpoint.glob("model_state.tp0?_pp0?.pdparams"))) == 4
    run_script("merge_tp_params.py", "--model_name_or_path", checkpoint, "--output_dir", tmp_path / "whole")
    whole, expected = read_weights(tmp_path / "whole"), read_weights(run.folder)
    assert whole.keys() == expected.keys()
    assert all((whole[name] == expected[name]).all() for name in expected)
    theirs = tmp_path / "theirs"
    words = ("--model_name_or_path", checkpoint, "--output_dir", theirs, "--save_format", "hf")
    run_script("merge_tp_params.py", *words)
    check_tokens(theirs, "qwen", live=False)


def read_weights(folder) -> dict:
    return {
        name: value for path in folder.glob("model*.safetensors") for name, value in load_file(path).items()
    }
