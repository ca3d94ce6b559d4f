"""Writes the sample conversations: a shop that tells where an order is.

Somebody asks after a thing; the shop asks for the number of the order; the number is told; the shop says where the order
is. The letter of the number decides: A is on its way, B is being packed, C has been delivered. Nobody says so: a model
that answers right for numbers it has never seen has learned it from the conversations.

One half is English, the other Chinese. Some conversations end with thanks.

    python data/conversations/generate.py [--out data/conversations] [--num_train 400] [--num_dev 100] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple


class Language(NamedTuple):
    """The parts that conversations of one language are made of.

    Attributes:
        system: What stands before every conversation.
        things: What was ordered.
        questions: How somebody asks; {x} is the thing.
        requests: How the shop asks for the number.
        numbers: How the number {n} is told.
        states: Letter of the number -> where the order is; {n} is the number.
        thanks: How somebody ends.
        farewells: What the shop says then.
    """

    system: str
    things: tuple[str, ...]
    questions: tuple[str, ...]
    requests: tuple[str, ...]
    numbers: tuple[str, ...]
    states: dict[str, str]
    thanks: tuple[str, ...]
    farewells: tuple[str, ...]


ENGLISH = Language(
    system="You answer for the shop. Be brief.",
    things=(
        *("lamp", "kettle", "chair", "jacket", "teapot", "backpack", "mirror", "blanket", "desk", "clock"),
        *("vase", "umbrella", "carpet", "mug", "shelf", "pillow", "radio", "scarf", "stool", "basket"),
    ),
    questions=(
        "Where is my {x}?",
        "When does the {x} come?",
        "I am waiting for a {x}.",
        "What about my {x}?",
    ),
    requests=("What is the number of your order?", "Please tell me the number of your order."),
    numbers=("{n}", "It is {n}.", "My number is {n}."),
    states={
        "A": "Your order {n} is on its way.",
        "B": "Your order {n} is being packed.",
        "C": "Your order {n} has been delivered.",
    },
    thanks=("Thank you!", "Good, thanks."),
    farewells=("You are welcome.", "Glad to help."),
)
CHINESE = Language(
    system="你代表商店回答，请简短。",
    things=(
        *("台灯", "水壶", "椅子", "外套", "茶壶", "背包", "镜子", "毛毯", "书桌", "闹钟"),
        *("花瓶", "雨伞", "地毯", "水杯", "书架", "枕头", "收音机", "围巾", "凳子", "篮子"),
    ),
    questions=("我的{x}到哪儿了？", "{x}什么时候到？", "我在等{x}。", "我买的{x}怎么样了？"),
    requests=("请问您的订单号是多少？", "请告诉我订单号。"),
    numbers=("{n}", "是{n}。", "我的订单号是{n}。"),
    states={"A": "订单{n}正在路上。", "B": "订单{n}正在打包。", "C": "订单{n}已经送达。"},
    thanks=("谢谢！", "好的，谢谢。"),
    farewells=("不客气。", "很高兴为您服务。"),
)
THANKS_SHARE = 0.3
"""Of the training conversations: these go on after the answer."""


def converse(language: Language, number: str, rng: random.Random, *, may_thank: bool) -> list[dict[str, str]]:
    """One conversation, as messages.

    Args:
        language: Its parts.
        number: Of the order, such as "B-417".
        rng: Chooses them.
        may_thank: Whether it may go on after the answer that matters.
    """
    said = [
        ("user", rng.choice(language.questions).format(x=rng.choice(language.things))),
        ("assistant", rng.choice(language.requests)),
        ("user", rng.choice(language.numbers).format(n=number)),
        ("assistant", language.states[number[0]].format(n=number)),
    ]
    if may_thank and rng.random() < THANKS_SHARE:
        said += [("user", rng.choice(language.thanks)), ("assistant", rng.choice(language.farewells))]
    return [{"role": role, "content": text} for role, text in (("system", language.system), *said)]


def generate(num: int, seed: int, *, num_held_out: int = 0) -> tuple[list[dict], list[dict]]:
    """Conversations to train on and to judge by; no number is in both.

    Args:
        num: All of them; at most 2,700.
        seed: Of the choices.
        num_held_out: The last of them, which end with the answer that matters.
    """
    rng = random.Random(seed)
    numbers = [f"{letter}-{number}" for letter in "ABC" for number in range(100, 1000)]
    rng.shuffle(numbers)
    made = [
        {
            "messages": converse(
                (ENGLISH, CHINESE)[place % 2], number, rng, may_thank=place < num - num_held_out
            )
        }
        for place, number in enumerate(numbers[:num])
    ]
    return made[: num - num_held_out], made[num - num_held_out :]


def main(argv: list[str] | None = None) -> None:
    """Writes train.json and dev.json."""
    parser = argparse.ArgumentParser(description="Write sample conversations.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--num_train", type=int, default=400)
    parser.add_argument("--num_dev", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if not 0 < options.num_train + options.num_dev <= 2700:
        parser.error(f"there are 2700 numbers, {options.num_train} + {options.num_dev} were asked for")
    num = options.num_train + options.num_dev
    parts = generate(num, options.seed, num_held_out=options.num_dev)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train.json", "dev.json"), parts, strict=True):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.out / name).write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
