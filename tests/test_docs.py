"""What the documents say of the repository: files that they name are there, and both languages say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_import_levels import LEVELS

NAMED = re.compile(r"(?<![\w./-])((?:finetune|tests|benchmarks|tools)/[\w/.-]*\w/?)")
LINK = re.compile(r"\]\(([^)#\s]+)\)")
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README*.md")})
IN_STEP = (
    "architecture",
    "adding-a-family",
    "metrics",
    "trackers",
    "README",
    "tutorials/customer_service",
    "tutorials/domain",
    "tutorials/many_cards",
)
"""Pages whose two languages have the same tables and lists, line by line."""


def named(path: Path) -> set[str]:
    """Paths of the repository that a document names."""
    return set(NAMED.findall(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_documents_name_are_there(path):
    if path.name == "CHANGELOG.md":
        pytest.skip("it tells of earlier versions")
    assert [name for name in sorted(named(path)) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    links = [link for link in LINK.findall(path.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("name", IN_STEP)
def test_both_languages_say_the_same_of_the_same_files(name):
    english, chinese = (ROOT / "docs" / f"{name}{ending}.md" for ending in ("", "_zh"))
    assert named(english) == named(chinese)
    assert shape(english) == shape(chinese)


def shape(path: Path) -> list[str]:
    """How each line of a document begins: heading, table, list, code or text."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [re.match(r"#*|\||- |```|", line)[0] if line else "" for line in lines]  # type: ignore[index]


@pytest.mark.parametrize("name", ["architecture.md", "architecture_zh.md"])
def test_the_map_has_every_package_in_the_order_of_the_levels(name):
    rows = [
        tuple(re.findall(r"`([\w/]+)`", line.split("|")[1]))
        for line in (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    packages = {package for level in LEVELS for package in level}
    shown = [row for row in rows if row and set(row) <= packages]
    assert shown == list(reversed(LEVELS))


def test_the_search_finds_names_of_files(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "See `finetune/a/b.py`, [c](../finetune/c.py) and `finetune/d/`; not finetune.e.", encoding="utf-8"
    )
    assert named(page) == {"finetune/a/b.py", "finetune/d/"}
