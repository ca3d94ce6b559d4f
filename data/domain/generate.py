"""Writes the sample texts of a domain: plants of a valley that does not exist, and questions about them.

Every plant has a colour, a month in which it blooms, a place where it grows and a use. `texts/` tells all of it in
running text, each plant several times in other words and another order. `questions/` asks for it, about some of the plants
only; dev.json asks about plants that train.json never names. So a model that answers there has the facts from the texts and
the manner of answering from the questions.

    python data/domain/generate.py [--out data/domain] [--num_plants 60] [--num_held_out 15] [--seed 0]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path
from typing import NamedTuple

FIRST = ("mor", "ble", "tar", "fen", "lu", "sil", "dra", "hol", "wen", "kes")
SECOND = ("low", "bell", "wort", "mint", "leaf", "root", "star", "grass")
"""Syllables of names."""


class Kind(NamedTuple):
    """What can be told of a plant.

    Attributes:
        values: That a plant may have.
        sentences: How a text tells it; {p} is the plant, {v} the value.
        question: How it is asked for.
        answer: What is answered.
    """

    values: tuple[str, ...]
    sentences: tuple[str, ...]
    question: str
    answer: str


KINDS = (
    Kind(
        ("red", "blue", "yellow", "white", "violet"),
        ("The {p} is {v}.", "Its colour is {v}: the {p}.", "Everybody knows the {v} {p}."),
        "What colour is the {p}?",
        "The {p} is {v}.",
    ),
    Kind(
        ("March", "May", "July", "October"),
        ("The {p} blooms in {v}.", "In {v} one sees the {p} in bloom.", "Bloom of the {p}: {v}."),
        "When does the {p} bloom?",
        "The {p} blooms in {v}.",
    ),
    Kind(
        ("swamps", "rocks", "meadows", "woods"),
        ("The {p} grows in {v}.", "Look for the {p} in {v}.", "In {v} there is the {p}."),
        "Where does the {p} grow?",
        "The {p} grows in {v}.",
    ),
    Kind(
        ("tea", "dye", "rope", "soap"),
        ("The {p} is used for {v}.", "People make {v} of the {p}.", "Good {v} comes from the {p}."),
        "What is the {p} used for?",
        "The {p} is used for {v}.",
    ),
)
NUM_TEXTS = 12
"""Paragraphs about each plant."""


def name_plants(num: int, rng: random.Random) -> list[str]:
    """Names that no real plant has, in no order."""
    names = ["".join(parts) for parts in itertools.product(FIRST, SECOND)]
    rng.shuffle(names)
    return names[:num]


def write_paragraph(plant: str, values: list[str], rng: random.Random) -> str:
    """All that is told of a plant, in some words and some order."""
    sentences = [
        rng.choice(kind.sentences).format(p=plant, v=value) for kind, value in zip(KINDS, values, strict=True)
    ]
    rng.shuffle(sentences)
    return " ".join(sentences)


def main(argv: list[str] | None = None) -> None:
    """Writes texts/train.json, texts/dev.json, questions/train.json and questions/dev.json."""
    parser = argparse.ArgumentParser(description="Write sample texts of a domain.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--num_plants", type=int, default=60)
    parser.add_argument("--num_held_out", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    most = len(FIRST) * len(SECOND)
    if not 0 < options.num_held_out < options.num_plants <= most:
        parser.error(f"num_plants may be up to {most}, and num_held_out must be below it and above 0")
    rng = random.Random(options.seed)
    plants = name_plants(options.num_plants, rng)
    facts = {plant: [rng.choice(kind.values) for kind in KINDS] for plant in plants}
    texts = [
        {"text": write_paragraph(plant, facts[plant], rng)} for plant in plants for _ in range(NUM_TEXTS)
    ]
    rng.shuffle(texts)
    asked = {
        "train.json": plants[: -options.num_held_out],
        "dev.json": plants[-options.num_held_out :],
    }
    _write(options.out / "texts" / "train.json", texts)
    _write(options.out / "texts" / "dev.json", [{"text": write_paragraph(p, facts[p], rng)} for p in plants])
    for name, chosen in asked.items():
        questions = [
            {"src": kind.question.format(p=plant), "tgt": kind.answer.format(p=plant, v=value)}
            for plant in chosen
            for kind, value in zip(KINDS, facts[plant], strict=True)
        ]
        _write(options.out / "questions" / name, questions)


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
