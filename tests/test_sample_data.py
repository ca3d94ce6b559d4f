"""The sample data set in data/: reproducible, valid, and more than a template."""

from __future__ import annotations

import importlib.util
import json
import random
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).resolve().parent.parent / "data"


def load_generator() -> ModuleType:
    # By path: data/ is no package of ours, and a package of that name may be installed.
    spec = importlib.util.spec_from_file_location("sample_data_generator", DATA / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return load_generator()


def read(split: str) -> list[dict[str, str]]:
    lines = (DATA / f"{split}.json").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, str]]]:
    return {split: read(split) for split in ("train", "dev")}


def attributes(source: str) -> list[tuple[str, str]]:
    pairs = [part.split("#") for part in source.split("*")]
    return [(name, value) for name, value in pairs]


def skeleton(generator: ModuleType, example: dict[str, str]) -> str:
    """The text with the values of the source, and the words that belong to them, blanked out."""
    text = example["tgt"]
    for name, value in attributes(example["src"]):
        for word in (value, *generator.PHRASES.get((name, value), ())):
            text = text.replace(word, "_") if word else text
    return text


def test_files_are_what_the_generator_writes(generator: ModuleType, tmp_path: Path) -> None:
    generator.main(["--out", str(tmp_path)])
    for name in ("train.json", "dev.json"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_the_seed_matters(generator: ModuleType) -> None:
    assert generator.generate(20, seed=0) == generator.generate(20, seed=0)
    assert generator.generate(20, seed=0) != generator.generate(20, seed=1)


def test_sizes(splits: dict[str, list[dict[str, str]]]) -> None:
    assert len(splits["train"]) == 3200
    assert len(splits["dev"]) == 200
    assert (DATA / "train.json").stat().st_size < 1_100_000


@pytest.mark.parametrize("split", ["train", "dev"])
def test_every_line_is_a_pair_of_reasonable_length(split: str) -> None:
    for example in read(split):
        assert sorted(example) == ["src", "tgt"]
        assert 20 <= len(example["src"]) <= 50
        assert 40 <= len(example["tgt"]) <= 90
        assert example["tgt"].endswith("。")
        assert not set("{}_-#*") & set(example["tgt"]), "a slot was left unfilled"
        names = [name for name, _ in attributes(example["src"])]
        assert names[0] == "类型"
        assert len(names) == len(set(names))


def test_files_use_unix_line_ends_and_plain_characters() -> None:
    for name in ("train.json", "dev.json"):
        raw = (DATA / name).read_bytes()
        assert raw.endswith(b"}\n")
        assert b"\r" not in raw and b"\\u" not in raw


def test_no_attribute_combination_is_shared(splits: dict[str, list[dict[str, str]]]) -> None:
    combinations = {
        split: [frozenset(attributes(e["src"])) for e in examples] for split, examples in splits.items()
    }
    assert not set(combinations["train"]) & set(combinations["dev"])
    assert len(set(combinations["train"])) == len(combinations["train"])
    assert len(set(combinations["dev"])) == len(combinations["dev"])


def test_dev_uses_no_value_that_train_lacks(splits: dict[str, list[dict[str, str]]]) -> None:
    known = {pair for e in splits["train"] for pair in attributes(e["src"])}
    asked = {pair for e in splits["dev"] for pair in attributes(e["src"])}
    assert asked <= known
    assert len(known) > 120


def test_texts_are_distinct_and_dev_texts_are_new(splits: dict[str, list[dict[str, str]]]) -> None:
    train = [e["tgt"] for e in splits["train"]]
    assert len(set(train)) == len(train)
    assert not set(train) & {e["tgt"] for e in splits["dev"]}


def test_no_template_dominates(generator: ModuleType, splits: dict[str, list[dict[str, str]]]) -> None:
    skeletons = [skeleton(generator, e) for e in splits["train"]]
    count = Counter(skeletons)
    assert len(count) > 0.9 * len(splits["train"])
    assert count.most_common(1)[0][1] <= 10
    openings = Counter(text[:8] for text in skeletons)
    assert openings.most_common(1)[0][1] < 0.05 * len(splits["train"])
    grams = {e["tgt"][i : i + 4] for e in splits["train"] for i in range(len(e["tgt"]) - 3)}
    assert len(grams) > 8000


def test_every_attribute_leaves_its_mark(generator: ModuleType) -> None:
    """Exchanging any one value for another changes the text, also outside the name of the value."""
    rng = random.Random(7)
    for _ in range(200):
        product = generator.draw_product(rng)
        family = generator.FAMILY_OF[product["类型"]]
        text = generator.describe(product)
        for name, value in product.items():
            assert value in text
            others = family.types if name == "类型" else family.values[name]
            other = rng.choice([v for v in others if v != value])
            changed = generator.describe({**product, name: other})
            assert other in changed
            assert changed.replace(other, value) != text or name == "类型", (name, value, other)


def test_the_text_follows_the_order_of_the_source(generator: ModuleType) -> None:
    rng = random.Random(8)
    for _ in range(200):
        product = generator.draw_product(rng)
        text = generator.describe(product)
        # Searched from the last find on: a value may also occur in another value's phrases.
        position = 0
        for value in product.values():
            position = text.find(value, position)
            assert position >= 0, (value, text)


def test_the_style_sets_the_wording_of_the_other_clauses(generator: ModuleType) -> None:
    texts = {
        style: generator.describe({"类型": "茶杯", "材质": "白瓷", "细节": "金边", "风格": style})
        for style in ("简约", "街头", "复古")
    }
    first_sentences = {text.split("。")[0] for text in texts.values()}
    assert len(first_sentences) == 3


def test_contradicting_values_are_kept_out(
    generator: ModuleType, splits: dict[str, list[dict[str, str]]]
) -> None:
    assert not generator.is_plausible({"类型": "短靴", "季节": "夏季"})
    assert generator.is_plausible({"类型": "短靴", "季节": "冬季"})
    for example in splits["train"] + splits["dev"]:
        assert generator.is_plausible(dict(attributes(example["src"]))), example["src"]
