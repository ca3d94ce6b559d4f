"""Several data sets of a preference method: weights, limits, parts that are held back, one line or many."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finetune.data.reading.splits import Splits, find_sources, read_splits
from finetune.errors import UserError
from finetune.settings.data import DataArguments

NUM_ROWS = {"polite": 12, "short": 6, "marked": 6}


@pytest.fixture
def sets(tmp_path) -> dict[str, str]:
    """Data sets by name: JSON lines of pairs, one line with a list of pairs, and marked answers."""
    rows = {
        name: [{"prompt": f"{name} {number}?", "chosen": "好的", "rejected": "no"} for number in range(count)]
        for name, count in NUM_ROWS.items()
    }
    rows["marked"] = [
        {"prompt": f"marked {number}?", "completion": "yes", "label": number % 2 == 0}
        for number in range(NUM_ROWS["marked"])
    ]
    (tmp_path / "polite.jsonl").write_text("\n".join(map(json.dumps, rows["polite"])), encoding="utf-8")
    (tmp_path / "short.json").write_text(json.dumps(rows["short"]), encoding="utf-8")
    (tmp_path / "marked.json").write_text(json.dumps(rows["marked"]), encoding="utf-8")
    registry = {"listed": {"file_name": "short.json", "ranking": True, "columns": {"prompt": "prompt"}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    return {path.stem: str(path) for path in tmp_path.iterdir()} | {"folder": str(tmp_path)}


def read(comparison: str = "pairs", *, evaluating: bool = False, **settings: Any) -> Splits:
    data = DataArguments(**settings)
    sources = find_sources(data, training=True, evaluating=evaluating)
    return read_splits(data, sources, seed=3, training=True, evaluating=evaluating, comparison=comparison)


def count(conversations: list[Any]) -> Counter[str]:
    return Counter(each.messages[0].content.split()[0] for each in conversations)


def test_weights_share_out_the_pairs(sets):
    mix = [{"path": sets["polite"], "ratio": 1}, {"path": sets["short"], "ratio": 2}]
    train = read(dataset_mix=mix).train
    assert count(train) == {"polite": 6, "short": 12}
    assert all(each.comparison.rejected.content == "no" for each in train)
    assert set(Counter(each.messages[0].content for each in train if each.file.stem == "short").values()) == {
        2
    }


def test_limits_and_lists_of_files(sets):
    mix = [{"path": sets["polite"], "max_samples": 4}, {"path": sets["short"]}]
    assert count(read(dataset_mix=mix).train) == {"polite": 4, "short": 6}
    assert count(read(dataset_name_or_path=f"{sets['polite']},{sets['short']}").train) == {
        "polite": 12,
        "short": 6,
    }


def test_a_registry_and_a_file_mix(sets):
    mix = [{"path": "listed", "ratio": 0.5}, {"path": sets["polite"], "ratio": 0.5}]
    assert count(read(dataset_dir=sets["folder"], dataset_mix=mix).train) == {"short": 9, "polite": 9}


def test_pairs_and_marked_answers_mix_for_kto(sets):
    mix = [{"path": sets["polite"]}, {"path": sets["marked"]}]
    train = read("marked", dataset_mix=mix).train
    assert count(train) == {"polite": 24, "marked": 6}
    assert sum(each.comparison.desirable for each in train) == 12 + 3
    with pytest.raises(UserError, match="one answer that is marked as good or bad is data of KTO"):
        read("pairs", dataset_mix=mix)


@pytest.mark.parametrize("comparison", ["pairs", "marked"])
def test_each_set_gives_its_share_of_what_is_held_back(sets, comparison):
    mix = [{"path": sets["polite"], "ratio": 0.5}, {"path": sets["short"], "ratio": 0.5}]
    splits = read(comparison, evaluating=True, dataset_mix=mix, validation_split=6)
    each = 1 if comparison == "pairs" else 2
    assert count(splits.dev) == {"polite": 4 * each, "short": 2 * each}
    prompts = [{each.messages[0].content for each in part} for part in (splits.train, splits.dev)]
    assert not prompts[0] & prompts[1]


def test_records_of_one_line_are_told_apart(sets):
    content = Path(sets["short"]).read_text(encoding="utf-8")
    assert "\n" not in content
    splits = read("marked", evaluating=True, dataset_name_or_path=sets["short"], validation_split=0.5)
    assert (len(splits.train), len(splits.dev)) == (6, 6)
    assert len({each.origin for each in splits.train}) == 3
