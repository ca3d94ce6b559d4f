"""Writes the tables of bytes per parameter in docs/quantised_bases.md and its Chinese page, from packed matrices.

python tools/weight_bytes_table.py
"""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from finetune.storage.quantisation.packed_weights import pack_matrix
from finetune.storage.quantisation.rounding import round_nearest
from finetune.storage.quantisation.scheme import QuantisationScheme
from tools.marked_tables import replace_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
NAME = "bytes"
_SIZE = 2048
_BILLIONS = 7
_OTHERS = {2: "GPTQ, compressed-tensors", 4: "GPTQ, AWQ, compressed-tensors", 8: ""}
_WORDS = {
    "quantised_bases.md": {
        "head": ("base", "bytes per parameter", f"{_BILLIONS} billion parameters"),
        "double": "{} with `weight_double_quant`",
        "groups": "folder of {}: {} bits, groups of {}",
        "rows": "folder of GPTQ, compressed-tensors, PaddleNLP: 8 bits, a scale for each row",
    },
    "quantised_bases_zh.md": {
        "head": ("基座", "每个参数的字节数", f"{_BILLIONS * 10} 亿参数"),
        "double": "{} 加 `weight_double_quant`",
        "groups": "{} 目录：{} 位，每组 {}",
        "rows": "GPTQ、compressed-tensors、PaddleNLP 目录：8 位，每行一个缩放系数",
    },
}


def main() -> None:
    """Puts the tables between the marks of both pages."""
    for page in _WORDS:
        replace_table(DOCS / page, render(page), NAME)


def render(page: str) -> str:
    """The table in Markdown, in the language of a page."""
    words = _WORDS[page]
    rows = [("float32", 4.0), ("bfloat16, float16", 2.0)]
    matrix = np.random.default_rng(0).standard_normal((_SIZE, _SIZE)).astype(np.float32)
    four_bit = "`nf4`, `fp4`"
    for title, scheme in (
        (four_bit, QuantisationScheme(algorithm="nf4")),
        (words["double"].format(four_bit), QuantisationScheme(algorithm="nf4", double_quant=True)),
        ("`llm.int8`, `weight_only_int8`", QuantisationScheme(algorithm="llm.int8")),
    ):
        rows.append((title, _share(pack_matrix(matrix, scheme, name="matrix"))))
    for bits, size in ((2, 128), (4, 32), (4, 128), (8, -1)):
        title = words["rows"] if size == -1 else words["groups"].format(_OTHERS[bits], bits, size)
        rows.append((title, _share(round_nearest(matrix, bits, size, dtype="float16"))))
    lines = [f"| {' | '.join(words['head'])} |", "|---|---|---|"]
    return "\n".join(
        lines + [f"| {title} | {share:.4g} | {share * _BILLIONS:.3g} GB |" for title, share in rows]
    )


def _share(packed: Any) -> float:
    """Bytes of a packed matrix, scales and zero points included, by the elements that it stands for."""
    return _num_bytes(packed) / _SIZE**2


def _num_bytes(value: Any) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    if is_dataclass(value):
        return sum(_num_bytes(getattr(value, each.name)) for each in fields(value))
    return 0


if __name__ == "__main__":
    main()
