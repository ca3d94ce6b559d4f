"""Every way of holding a base, family and layout: `pytest -m slow_distributed` on this file, about half an hour.

Each is run in one of two precisions, which alternate like the fields of a chessboard: every base, every family and every
pair of layout and base or family meets both. How a matrix is cut or placed does not depend on the precision that its
values are rounded to, so that the other half would repeat what is known.

With FINETUNE_QUANTISED_RESULTS=<file> every case adds a line to that file, from which `tools/quantised_table.py` makes the
table in the documentation; with FINETUNE_QUANTISED_CONTINUE=1 cases that stand there are skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.distributed.layouts import LAYOUTS, ONE, LayoutCase, largest_difference
from tests.distributed.precisions import TOLERANCES, differences
from tests.quantised_folders import write_hugging_face, write_paddlenlp, write_quantised

pytestmark = [pytest.mark.distributed, pytest.mark.slow_distributed]

RESULTS = os.environ.get("FINETUNE_QUANTISED_RESULTS")
FAMILIES = ("llama", "chatglm2", "qwen", "bloom", "opt")
# Settings of a base that is quantised while it is loaded, or the kind of a folder that is quantised already.
BASES = {
    "nf4": {"weight_quantize_algo": "nf4"},
    "nf4 double": {"weight_quantize_algo": "nf4", "weight_double_quant": True},
    "fp4": {"weight_quantize_algo": "fp4"},
    "llm.int8": {"weight_quantize_algo": "llm.int8"},
    "GPTQ folder": "gptq",
    "GPTQ act order folder": "gptq order",
    "AWQ folder": "awq",
    "compressed-tensors int4 folder": "compressed zero points",
    "compressed-tensors int8 folder": "compressed int8",
    "bitsandbytes nf4 folder": "nf4",
    "bitsandbytes int8 folder": "int8",
    "PaddleNLP int8 folder": "paddlenlp",
}
PLACES = {"one": LayoutCase(1, 2)} | {
    name: LAYOUTS[name] for name in ("dp2", "tp2", "pp2", "sharding2 stage1", "sharding2 stage2")
}
BFLOAT16 = {"bf16": True, "fp16_opt_level": "O2", "rehearse_half_precision": True}
PRECISIONS = {"float32": {}, "bfloat16": BFLOAT16}
STEPS = {"max_steps": 10, "eval_steps": 10, "learning_rate": 1e-2, "warmup_steps": 2}
FLOAT32_TOLERANCE = 1e-5


def precision_of(base: str, family: str, layout: str) -> str:
    """The precision of a case: neighbours along any of the three have the other one."""
    numbers = list(BASES).index(base), FAMILIES.index(family), list(PLACES).index(layout)
    return list(PRECISIONS)[sum(numbers) % 2]


CASES = [
    (base, family, precision_of(base, family, layout), layout)
    for base in BASES
    for family in FAMILIES
    for layout in PLACES
]


@pytest.fixture(scope="module")
def expected():
    """(base, family, precision) -> curve of one process."""
    return {}


def settings_of(bench, base: str, family: str, precision: str) -> dict:
    settings = bench.settings(family, "lora", "padded") | STEPS | PRECISIONS[precision]
    if isinstance(BASES[base], dict):
        return settings | BASES[base]
    folder = bench.folder / "quantised" / f"{family} {base}".replace(" ", "-")
    if BASES[base] == "paddlenlp" and not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        write_paddlenlp(bench.model(family), folder)
    elif not folder.exists():
        plain = bench.folder / "quantised" / family
        if not plain.exists():
            plain.parent.mkdir(exist_ok=True)
            write_hugging_face(bench.model(family), plain)
        write_quantised(plain, folder, BASES[base])
    return settings | {"model_name_or_path": str(folder)}


def done() -> set[tuple[str, ...]]:
    """Cases that an earlier run finished without fault."""
    if os.environ.get("FINETUNE_QUANTISED_CONTINUE") != "1" or not RESULTS or not Path(RESULTS).is_file():
        return set()
    records = map(json.loads, Path(RESULTS).read_text(encoding="utf-8").splitlines())
    return {tuple(record["case"]) for record in records if not record["faults"]}


@pytest.mark.parametrize(("base", "family", "precision", "layout"), CASES)
def test_ten_steps_are_those_of_one_process(bench, expected, base, family, precision, layout):
    if (base, family, precision, layout) in done():
        pytest.skip("it stands in the results")
    settings = settings_of(bench, base, family, precision)
    key = base, family, precision
    if key not in expected:
        expected[key] = bench.server.run(settings | ONE.arguments()).check().curve()
    place = PLACES[layout]
    curve = bench.server.run(settings | place.arguments(), place.world).check().curve()
    if precision == "float32":
        found = largest_difference(curve, expected[key])
        limits = dict.fromkeys(found, FLOAT32_TOLERANCE)
    else:
        found = differences(curve, expected[key])
        limits = {name: limit for name, limit in TOLERANCES["bf16"].items() if name in found}
    faults = [f"{name} is {found[name]:.1e}" for name, limit in limits.items() if not found[name] <= limit]
    if RESULTS:
        record = {"case": [base, family, precision, layout], "differences": found, "faults": faults}
        with Path(RESULTS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
    assert not faults, found
