"""Writes the tables of docs/families.md and its Chinese twin from the records and from what the tests show of each family.

python tools/family_table.py [--check]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from finetune.errors import UserError  # noqa: E402
from finetune.families.decoder_description import check_description  # noqa: E402
from finetune.families.registry import families  # noqa: E402
from tests.families.coverage import CLAIMS, Claim, Proof  # noqa: E402
from tests.families.references import REARRANGED, WRITTEN, references  # noqa: E402
from tools.marked_tables import replace_table  # noqa: E402


@dataclass(frozen=True)
class Words:
    """What the tables of a page say beside names.

    Attributes:
        heads: Of the columns of both tables.
        references: For the kinds of references that are no class of transformers.
        packing: For the ways of keeping packed samples apart under fused attention.
        static_graph: The refused export.
        every: "every one", of families.
        ending: Of the names of files in the language.
    """

    heads: tuple[tuple[str, ...], tuple[str, ...]]
    references: dict[str, str]
    packing: dict[str, str]
    static_graph: str
    every: str
    ending: str


PAGES = {
    "families.md": Words(
        (
            ("family", "models", "`model_type`", "files", "compared with", "packed rows", "GGUF", "refuses"),
            ("what holds", "families", "tests"),
        ),
        {WRITTEN: "own reference", REARRANGED: "`Llama`, rearranged"},
        {"rows": "rows", "block": "mask", "refused": ""},
        "static graph",
        "all {}",
        "",
    ),
    "families_zh.md": Words(
        (
            ("系列", "模型", "`model_type`", "文件", "对照", "打包的行", "GGUF", "拒绝"),
            ("成立的内容", "系列", "测试"),
        ),
        {WRITTEN: "自写的参照", REARRANGED: "`Llama`，重新排列"},
        {"rows": "行号", "block": "掩码", "refused": ""},
        "静态图",
        "全部 {} 个",
        "_zh",
    ),
}  # fmt: skip


def family_table(words: Words) -> str:
    """A row for each family: models, files, reference, and what it has and refuses."""
    compared = references()
    lines = [_row(words.heads[0]), _row(["---"] * len(words.heads[0]))]
    for name, family in sorted(families().items()):
        folder = family.argument_folder or name
        kinds = [words.references.get(kind, f"`{kind}`") for kind in compared[name]]
        lines.append(_row((
            f"`{name}`", family.models, ", ".join(f"`{each}`" for each in family.model_types),
            f"[{folder}](../{folder}/README{words.ending}.md)", ", ".join(kinds),
            words.packing[family.fused_packing], "✓" if family.gguf else "", ", ".join(_refused(name, words)),
        )))  # fmt: skip
    return "\n".join(lines)


def _refused(name: str, words: Words) -> list[str]:
    family = families()[name]
    found = [] if family.sequence_parallel else ["`sequence_parallel`"]
    try:
        check_description(family)
    except UserError:
        found.append(words.static_graph)
    return found + [f"`{option}`" for option in family.refused_options]


def claim_table(words: Words) -> str:
    """A row for each claim: the families that it holds for, and its tests."""
    lines = [_row(words.heads[1]), _row(["---"] * len(words.heads[1]))]
    for claim in CLAIMS:
        text = claim.chinese if words.ending else claim.english
        tests = dict.fromkeys(map(_file, claim.proofs))
        lines.append(_row((text, _holds_for(claim, words), ", ".join(tests))))
    return "\n".join(lines)


def _holds_for(claim: Claim, words: Words) -> str:
    count = len(families()) - len(claim.exceptions)
    place = 1 if words.ending else 0  # of the language
    left_out = [f"`{name}`: {reasons[place]}" for name, reasons in claim.exceptions.items()]
    return f"{count} ({'; '.join(left_out)})" if left_out else words.every.format(count)


def _file(proof: Proof) -> str:
    path = proof.test.partition("::")[0]
    signs = "\\*" * proof.is_marked + "†" * proof.needs_torch
    return f"[{Path(path).stem.removeprefix('test_')}](../{path}){signs}"


def _row(cells: object) -> str:
    return f"| {' | '.join(cells)} |"  # type: ignore[arg-type]


def tables(page: str) -> dict[str, str]:
    """The tables of a page by name."""
    return {"families": family_table(PAGES[page]), "claims": claim_table(PAGES[page])}


def main() -> int:
    """Writes the pages, or says whether they are up to date."""
    stale = []
    for page in PAGES:
        path = ROOT / "docs" / page
        before = path.read_text(encoding="utf-8")
        for name, table in tables(page).items():
            replace_table(path, table, name)
        if path.read_text(encoding="utf-8") != before:
            stale.append(page)
            if "--check" in sys.argv:
                path.write_text(before, encoding="utf-8")
    if stale and "--check" in sys.argv:
        print(f"run python tools/family_table.py: {', '.join(stale)} would change", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
