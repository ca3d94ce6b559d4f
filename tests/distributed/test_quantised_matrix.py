"""Every way of holding a base, family and layout: `pytest -m slow_distributed` on this file, about half an hour.

With FINETUNE_QUANTISED_RESULTS=<file> every case adds a line to that file, from which `tools/quantised_table.py` makes the
table in the documentation; with FINETUNE_QUANTISED_CONTINUE=1 cases that stand there are skipped.
"""

from __future__ import annotations

import pytest

from tests.distributed.method_matrix import PRECISIONS, STEPS, Matrix, list_cases
from tests.quantised_folders import write_hugging_face, write_paddlenlp, write_quantised

pytestmark = [pytest.mark.distributed, pytest.mark.slow_distributed]

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
CASES = list_cases(tuple(BASES))


@pytest.fixture(scope="module")
def matrix():
    return Matrix("QUANTISED")


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


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_ten_steps_are_those_of_one_process(bench, matrix, case):
    matrix.check(bench, case, settings_of(bench, *case[:3]))
