"""The sample data of the tutorials: reproducible, and what is held out stays held out."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT

CONVERSATIONS, DOMAIN = ROOT / "data" / "conversations", ROOT / "data" / "domain"


def generator(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sample_{folder.name}", folder / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("folder", [CONVERSATIONS, DOMAIN], ids=lambda folder: folder.name)
def test_files_are_what_the_generator_writes(folder, tmp_path):
    generator(folder).main(["--out", str(tmp_path)])
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.json"))
    assert written == sorted(path.relative_to(folder) for path in folder.rglob("*.json"))
    for name in written:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize(
    "folder, words",
    [(CONVERSATIONS, ["--num_train", "2700"]), (DOMAIN, ["--num_plants", "81"])],
    ids=["conversations", "domain"],
)
def test_more_than_there_can_be_is_refused(folder, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        generator(folder).main(["--out", str(tmp_path), *words])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and ("2700 numbers" in said or "up to 80" in said)


def test_no_number_of_a_held_out_conversation_was_trained_on():
    numbers = [
        {re.search(r"[ABC]-\d{3}", row["messages"][3]["content"])[0] for row in read(CONVERSATIONS / name)}
        for name in ("train.json", "dev.json")
    ]
    assert [len(each) for each in numbers] == [400, 100]
    assert not numbers[0] & numbers[1]
    assert all(row["messages"][-1]["role"] == "assistant" for row in read(CONVERSATIONS / "dev.json"))


def test_no_question_of_the_training_names_a_held_out_plant():
    trained = {re.search(r"the (\w+)", row["src"])[1] for row in read(DOMAIN / "questions" / "train.json")}
    held_out = {re.search(r"the (\w+)", row["src"])[1] for row in read(DOMAIN / "questions" / "dev.json")}
    texts = " ".join(row["text"] for row in read(DOMAIN / "texts" / "train.json"))
    assert (len(trained), len(held_out)) == (45, 15) and not trained & held_out
    assert all(plant in texts for plant in trained | held_out)
