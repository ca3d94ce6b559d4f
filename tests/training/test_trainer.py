"""What our trainer replaces of PaddleNLP's is listed, and its parts know no trainer."""

import re

import pytest
from paddlenlp.trainer import Trainer

from finetune.training.trainer import OVERRIDDEN, FinetuneTrainer
from tests.conftest import ROOT

PAGES = ("docs/architecture.md", "docs/architecture_zh.md")


def test_the_list_of_what_is_overridden_is_true():
    overridden = {
        name
        for name, value in vars(FinetuneTrainer).items()
        if (callable(value) or isinstance(value, property)) and hasattr(Trainer, name)
    }
    assert overridden == OVERRIDDEN.keys()


@pytest.mark.parametrize("page", PAGES)
def test_the_page_shows_the_list(page):
    section = re.split(r"^## ", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    (table,) = [part for part in section if "`OVERRIDDEN`" in part]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", table, flags=re.MULTILINE))
    assert list(rows) == list(OVERRIDDEN)
    if page == PAGES[0]:
        assert rows == OVERRIDDEN


def test_no_part_of_the_training_is_handed_the_trainer():
    for path in (ROOT / "finetune" / "training").glob("*.py"):
        if path.name != "trainer.py":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"FinetuneTrainer|finetune\.training\.trainer", text), path.name
