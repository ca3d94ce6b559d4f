"""Preference data of the distributed tests."""

from __future__ import annotations

import itertools
import json
from pathlib import Path


def build_preferences(folder: Path) -> Path:
    """21 and 5 short pairs: the last batch of an epoch is a small one."""
    folder.mkdir(parents=True, exist_ok=True)
    things, ways = (
        ("裙子", "shoes", "帽子", "a bag", "外套"),
        ("好吗", "price?", "怎么样", "colour?", "在哪里", "size?"),
    )
    prompts = [f"{thing} {way}" for thing, way in itertools.product(things, ways)]
    rows = [
        {
            "prompt": prompt,
            "chosen": f"您好 {prompt[:3]} 很好。"[: 6 + number % 7],
            "rejected": "no idea, 随便"[: 4 + number % 5],
        }
        for number, prompt in enumerate(prompts)
    ]
    for split, part in (("train", rows[:21]), ("dev", rows[21:26])):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{split}.json").write_text(text, encoding="utf-8")
    return folder
