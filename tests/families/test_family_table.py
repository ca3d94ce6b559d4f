"""The pages of families have what records and tests say."""

from __future__ import annotations

import pytest

from finetune.families.family import families
from tests.conftest import ROOT
from tests.families.references import references
from tools.family_table import PAGES, tables
from tools.marked_tables import table_marks


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_are_those_of_the_tool(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for name, table in tables(page).items():
        begin, end = table_marks(name)
        shown = text.partition(begin)[2].partition(end)[0]
        assert shown.strip() == table, "run python tools/family_table.py"


def test_every_family_has_models_and_a_reference():
    models = [family.models for family in families().values()]
    assert all(models) and len(set(models)) == len(models), (
        "each names its own, also where it copies another record"
    )
    assert references().keys() == families().keys() and all(references().values())


def test_both_languages_have_the_same_sections():
    english, chinese = ((ROOT / "docs" / page).read_text(encoding="utf-8").splitlines() for page in PAGES)
    assert [each[:1] for each in english if each[:1] in ("#", "-", "|")] == [
        each[:1] for each in chinese if each[:1] in ("#", "-", "|")
    ]
