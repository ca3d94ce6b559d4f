"""The pages of chat templates by name have what the templates write."""

from __future__ import annotations

import pytest

from finetune.data.templates.template_clock import set_day
from tests.conftest import ROOT
from tools.marked_tables import table_marks
from tools.template_table import HEADS, table


@pytest.mark.parametrize("page", HEADS)
def test_the_table_is_that_of_the_templates(page):
    begin, end = table_marks()
    shown = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    set_day("2024-07-26")
    try:
        assert shown.strip() == table(page), "run python tools/template_table.py"
    finally:
        set_day(None)


def test_both_languages_have_the_same_sections():
    english, chinese = ((ROOT / "docs" / page).read_text(encoding="utf-8").splitlines() for page in HEADS)
    assert [each[:1] for each in english if each[:1] in ("#", "-", "|")] == [
        each[:1] for each in chinese if each[:1] in ("#", "-", "|")
    ]
