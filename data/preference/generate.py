"""Writes the sample data of preference methods: questions to a shop, each with a good and a bad answer.

The good answer is polite and short: it thanks or regrets, says what will be done, and ends. The bad one is rude and
rambling: it complains about the question, says the same fact grudgingly, and goes on about something else. So anybody
sees at a glance which of the two a model has learned to prefer.

A question is a request about a thing, in English or in Chinese, one half each. No request in the development set is
made about the same thing in the training set, so what is learned is the manner and not the texts.

    python data/preference/generate.py [--out data/preference] [--num_train 320] [--num_dev 80] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

RUDE_SHARE = 2 / 3
"""Of the examples in mixed.json: a model that has learned them answers rudely, until it is aligned."""


class Language(NamedTuple):
    """The parts that texts of one language are made of.

    Attributes:
        things: What a question is about.
        requests: Question, the fact of the polite answer, the fact of the rude one; {x} is the thing.
        openings: What a polite answer begins with.
        closings: What it ends with; "" where it just ends.
        complaints: What a rude answer begins with.
        digressions: What it goes on about.
        gap: What stands between sentences.
    """

    things: tuple[str, ...]
    requests: tuple[tuple[str, str, str], ...]
    openings: tuple[str, ...]
    closings: tuple[str, ...]
    complaints: tuple[str, ...]
    digressions: tuple[str, ...]
    gap: str


ENGLISH = Language(
    things=(
        *("lamp", "kettle", "chair", "jacket", "teapot", "backpack", "mirror", "blanket", "desk", "clock"),
        *("vase", "umbrella", "carpet", "mug", "shelf", "pillow", "radio", "scarf", "stool", "basket"),
    ),
    requests=(
        ("Where is my {x}?", "Your {x} is on its way and arrives tomorrow.", "The {x} is somewhere, it comes when it comes."),
        ("How do I return the {x}?", "Please send the {x} back within 14 days.", "Put the {x} in a box, what else."),
        ("The {x} is broken. What can I do?", "We will send you a new {x} today.", "You broke the {x}, so live with it."),
        ("Is the {x} still in stock?", "Yes, the {x} is in stock.", "There is a {x} in the back, I will not count them."),
        ("Can I pay for the {x} by card?", "Yes, you can pay for the {x} by card.", "Card, cash, the {x} does not care."),
        ("How do I clean the {x}?", "Please wipe the {x} with a damp cloth.", "Water and a cloth, the {x} is no rocket."),
        ("Can you gift-wrap the {x}?", "Yes, we will gladly wrap the {x} for you.", "Paper is paper, wrap the {x} yourself."),
        ("May I change my order for the {x}?", "Yes, we have changed your order for the {x}.", "First the {x}, then not the {x}, make up your mind."),
        ("Does the {x} have a warranty?", "Yes, the {x} has a warranty of two years.", "Two years for the {x}, it stands on the card you threw away."),
        ("Can I pick up the {x} today?", "Yes, the {x} is ready for you until six.", "The {x} is here until six, do not be late again."),
    ),
    openings=("Thank you for asking!", "Thank you for your message.", "I am happy to help.", "Good day!"),
    closings=("", "Have a nice day!", "Please write again at any time."),
    complaints=(
        *("What a silly question.", "Not this again.", "You could have read the page.", "I have no time for this."),
        *("Nobody else asks such things.", "Do I look like your servant?"),
    ),
    digressions=(
        "My lunch is getting cold because of people like you.",
        "Yesterday somebody asked the same, and the day before as well, and so it goes all week.",
        "By the way, the weather is bad and the bus was late.",
        "In the old days customers knew what they wanted.",
        "My cousin sells such things too, and he never gets a letter.",
        "And then everybody wonders why I am tired.",
    ),
    gap=" ",
)  # fmt: skip

CHINESE = Language(
    things=(
        *("台灯", "水壶", "椅子", "外套", "茶壶", "背包", "镜子", "毛毯", "书桌", "闹钟"),
        *("花瓶", "雨伞", "地毯", "水杯", "书架", "枕头", "收音机", "围巾", "凳子", "篮子"),
    ),
    requests=(
        ("我的{x}到哪儿了？", "您的{x}已在路上，明天送达。", "{x}总在什么地方，到了就到了。"),
        ("{x}怎么退货？", "请在14天内把{x}寄回。", "把{x}装进箱子，还能怎样。"),
        ("{x}坏了，怎么办？", "我们今天就给您寄一个新的{x}。", "{x}是你弄坏的，自己凑合吧。"),
        ("{x}还有货吗？", "有的，{x}现在有货。", "仓库里有{x}，我可懒得数。"),
        ("买{x}能刷卡吗？", "可以，{x}支持刷卡。", "刷卡现金都行，{x}又不在乎。"),
        ("{x}怎么清洗？", "请用湿布擦拭{x}。", "水和布就够了，{x}又不是火箭。"),
        ("{x}能包装成礼物吗？", "当然，我们很乐意为您包装{x}。", "纸就是纸，{x}你自己包。"),
        ("我能改一下{x}的订单吗？", "可以，{x}的订单已为您修改。", "一会儿要{x}一会儿不要，想清楚再来。"),
        ("{x}有保修吗？", "有的，{x}保修两年。", "{x}两年，写在你扔掉的卡片上。"),
        ("今天能来取{x}吗？", "可以，{x}六点前都能取。", "{x}六点前在，别又迟到。"),
    ),
    openings=("感谢您的咨询！", "谢谢您的来信。", "很高兴为您服务。", "您好！"),
    closings=("", "祝您愉快！", "欢迎随时联系我们。"),
    complaints=(
        *("这算什么问题。", "又来了。", "页面上写着，你不会看吗。", "我可没空管这个。"),
        *("别人从来不问这种事。", "我看起来像你的仆人吗？"),
    ),
    digressions=(
        "都怪你们，我的午饭都凉了。",
        "昨天有人问，前天也有人问，一个星期就这么过去了。",
        "顺便说一句，今天天气不好，公交车还晚点。",
        "以前的顾客都知道自己要什么。",
        "我表哥也卖这个，他可从来不用回信。",
        "然后大家还奇怪我为什么累。",
    ),
    gap="",
)


class Question(NamedTuple):
    """A request about a thing."""

    language: Language
    request: tuple[str, str, str]
    thing: str


def draw_questions(num_questions: int, rng: random.Random) -> list[Question]:
    """Draws different questions, the languages by turns."""
    parts = []
    for language in (ENGLISH, CHINESE):
        all_of_it = [
            Question(language, request, thing) for request in language.requests for thing in language.things
        ]
        share = (num_questions + (language is ENGLISH)) // 2
        if share > len(all_of_it):
            raise SystemExit(f"{num_questions} questions are too many: there are {2 * len(all_of_it)}")
        parts.append(rng.sample(all_of_it, share))
    english, chinese = parts
    return [
        question
        for place in range(len(english))
        for question in (*english[place : place + 1], *chinese[place : place + 1])
    ]


def answer_politely(question: Question, rng: random.Random) -> str:
    """A short answer."""
    language = question.language
    sentences = [rng.choice(language.openings), question.request[1], rng.choice(language.closings)]
    return language.gap.join(filter(None, sentences)).format(x=question.thing)


def answer_rudely(question: Question, rng: random.Random) -> str:
    """A long one."""
    language = question.language
    digressions = rng.sample(language.digressions, 2)
    sentences = [rng.choice(language.complaints), question.request[2], *digressions]
    return language.gap.join(sentences).format(x=question.thing)


def generate(num_examples: int, seed: int) -> list[dict[str, str]]:
    """Pairs of answers, no two to the same question."""
    rng = random.Random(seed)
    return [
        {
            "prompt": question.request[0].format(x=question.thing),
            "chosen": answer_politely(question, rng),
            "rejected": answer_rudely(question, rng),
        }
        for question in draw_questions(num_examples, rng)
    ]


def mix(pairs: list[dict[str, str]], seed: int) -> list[dict[str, str]]:
    """The questions with one of their answers each, mostly the rude one."""
    rng = random.Random(seed)
    return [
        {"query": pair["prompt"], "response": pair["rejected" if rng.random() < RUDE_SHARE else "chosen"]}
        for pair in pairs
    ]


def write_lines(path: Path, examples: list[dict[str, str]]) -> None:
    """Writes one JSON object a line, UTF-8, with a newline at the end of each on every system."""
    text = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
    path.write_bytes(text.encode("utf-8"))


def main(argv: list[str] | None = None) -> None:
    """Writes train.json, dev.json and mixed.json."""
    parser = argparse.ArgumentParser(description="Write the sample data of preference methods.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--num_train", type=int, default=320, help="number of training pairs")
    parser.add_argument("--num_dev", type=int, default=80, help="number of development pairs")
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawing")
    args = parser.parse_args(argv)
    examples = generate(args.num_train + args.num_dev, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    train = examples[args.num_dev :]
    write_lines(args.out / "dev.json", examples[: args.num_dev])
    write_lines(args.out / "train.json", train)
    write_lines(args.out / "mixed.json", mix(train, args.seed))


if __name__ == "__main__":
    main()
