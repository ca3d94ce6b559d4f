"""Texts for tests: strings that make trouble, passages of many kinds, and data sets made of them.

Everything here was written for this project, or is generated from a fixed seed.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

ADVERSARIAL = [
    *("", " ", "  ", "\n", " \n ", "  lead", "trail  ", "\t\ta\t", "\r", "a\r\nb\r\n", "\r\r\n\n"),
    *("\u00e9", "e\u0301", "\u1e9b\u0323", "\ufb01", "\u212b", "\uac00", "\u1112\u1161\u11ab"),
    *("a\u200bb", "\u200b", "\ufeffx", "a\u2060b", "\u202eabc\u202c", "\u0085\u2028\u2029", "\x00", "\x7f\x1b[0m"),
    *("\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f44d\U0001f3fd", "\U0001f1e8\U0001f1f3\U0001f1fa", "\u2764\ufe0f"),
    *("\u3000全角　空格", "ＡＢＣ１２３！", "２０２４年", "ｶﾞ", "שלום עולם", "مرحبا بكم ١٢٣", "क्षि", "\u0e33\u0e4d"),
    *(" " * 10_000, f"a{' ' * 9_999}b", "\n" * 500, "\t" * 100, "1" * 200, "x" * 3000, "的" * 500),
    *("3.14159e-10", "1,234,567.89", "\uffff\U0010ffff\ue000", "don't DON'T we'LL 'S", "a.b,c;d!e?", "ı İ ß ẞ"),
    *("<|im_start|>system\nx<|im_end|>", "<s>[INST] a [/INST] b</s>", "<start_of_turn>user\nhi<end_of_turn>"),
    *("[gMASK]<sop><|user|>\n", "<0x0A>", "<unk>", "<pad><mask>", "<|endoftext|><|endoftext|>"),
    *("\u2581", "\u2581\u2581a\u2581b", "##a", "\u0120a", "def f(x):\n\treturn  x\n\n\n    pass"),
]  # fmt: skip
"""Texts for which tokenizers are known to differ: compositions, invisible characters, long runs, names of tokens."""

NASTY = [
    "",
    " ",
    "  ",
    "\n",
    " \n \n  a",
    "a b",
    " a",
    "a ",
    "  blanks  around  ",
    "two\nlines\n\nand\ttabs\r\n",
    "</s>",
    " </s> ",
    "a </s> b<s><unk><pad>",
    "<|endoftext|><|im_start|>user\n<|im_end|> x",
    "<0x0A><0xE4>▁ ▁▁",
    "<bos><eos><start_of_turn>",
    "[gMASK]sop people isopropyl eop [MASK] sop</s>",
    "e\u0301 \u00e9 \u1e9b\u0323 ﬁ Å Å",
    "emoji 😀👍🏽👨‍👩‍👧 and rare 饕餮 𠮷",
    "１２３ 123456 1,234.5 ½ ² Ⅷ ٣",
    "it's IT'S I'LL we'Ve ſ's",
    "\u00a0\u2003\u3000\u200b\ufeff\u0085\x1c\x1f\x00\x7f",
    "a\u2028b\u2029c\x0bd\x0ce",
    "ไทย العربية हिन्दी",
    "\ud7ff\ue000\ufffd\U0010ffff\ufffe",
    "…。，、।۔،(|[.,!?",
    "new in Unicode 17: \U000323b0\u0558 a\u088fb1\U00033000",
    "x" * 3000,
    " " * 300 + "x" + "\n" * 50,
]
"""Strings on which tokenizers differ."""

PASSAGES = [
    # prose
    "The ferry leaves at seven. Whoever misses it waits on the quay until noon, with the gulls for company, "
    "and learns the timetable by heart.\n\nIn winter there is one boat a day; in a storm there is none.",
    "清晨的菜市场最先醒来：卖豆腐的老人支起木板，热气在灯下散开。有人问价，有人只是路过，"
    "顺手带走一把还沾着露水的小葱。\n\n“今天的豆子新，”他说，“明天也一样。”",
    "Mixed lines 混排：GPU 显存 24GB，batch_size=8 时约占 71.5%；若改用 bfloat16，则降到 43%（见表 3）。"
    "Don't forget the trailing space: ",
    "Größe, naïveté, façade, smörgåsbord — Ελληνικά, кириллица, 日本語のテキスト、한국어 문장, עברית.",
    # code and markup
    "def moving_average(values, width):\n    total = sum(values[:width])\n    for left, right in zip(values, "
    "values[width:]):\n        yield total / width\n        total += right - left\n    yield total / width\n",
    "for (size_t i = 0; i < n; ++i) {\n\tout[i] = (x[i] >> 3) ^ 0xDEADBEEF;\t/* keep the low bits */\n\t"
    'if (!out[i]) return -1;\n}\n#define STR(s) "\\"" #s "\\""\r\n',
    "SELECT name, COUNT(*) AS \"n\"\nFROM orders -- open ones\nWHERE due < '2031-04-05' AND NOT paid\n"
    "GROUP BY 1 HAVING COUNT(*) > 2;",
    '<ul class="menu">\n  <li><a href="?q=a&amp;b=1">Tea &mdash; £2.40</a></li>\n  <!-- 茶 -->\n</ul>',
    '{"id": 17, "tags": ["a", "b\\n", null], "price": 1e-07, "nested": {"深": true}}',
    "| step | loss   |\n|-----:|:-------|\n|   10 | 2.3417 |\n|  100 | 0.9871 |\n\n> quoted\n\n1. first\n   - inner\n",
    "$ tar -xzf model.tar.gz && ls -l | awk '{s+=$5} END {print s/2**20 \" MB\"}'  # sizes",
    r"\begin{equation} \nabla_\theta J = \mathbb{E}\left[\sum_{t=0}^{T} r_t\right] \leq \frac{1}{2}\end{equation}",
    # symbols, control characters, long lines
    "🎉🎉 Done!!! 👩🏽‍💻→🚀 (✓ 12/12) … ¿qué? ¡sí! ™®© ½ ⅓ № ∑∫√∞ ≠ ≤ ≥",
    "bell\x07 escape\x1b[31mred\x1b[0m null\x00 vertical\x0b form\x0c delete\x7f next\x85 blank\u00a0 joiner\u200d bom\ufeff",
    "\t\t\tindented\n\n\n\n   \n      deeper   still   \n\r\n\r\rend\n",
    "AGCT" * 300 + " one line " + "0123456789" * 60,
    "无标点的长行" * 150,
    "=" * 79 + "\n" + "-" * 79 + "\n" + "~*" * 40,
]
"""Texts of the kinds that people fine-tune on."""


def draw_texts(count: int = 300) -> list[str]:
    """Mixtures of nasty parts and of characters from all over Unicode."""
    generator = random.Random(0)
    parts = [part for part in NASTY if len(part) < 100]
    texts = []
    for _ in range(count):
        drawn = generator.sample(parts, 3)
        codes = [generator.randrange(0x3000), generator.randrange(0xE000, 0x20000)]
        texts.append("".join([*drawn, *map(chr, codes), *generator.sample(parts, 1)]))
    return texts


def draw_passages(characters: int, seed: int = 0) -> list[str]:
    """Parts of passages put together, of 1 to 800 characters, about `characters` in all."""
    generator = random.Random(seed)
    texts: list[str] = []
    while sum(map(len, texts)) < characters:
        joined = "\n".join(generator.sample(PASSAGES, 3))
        start = generator.randrange(len(joined) - 1)
        texts.append(joined[start : start + int(800 ** generator.uniform(0, 1))])
    return texts


def write_data_sets(folder: Path) -> dict[str, Path]:
    """Writes data sets in the shapes that other tools use; their files by name."""
    makers = {
        "instructions.json": _instructions,
        "tool_calls.json": _tool_calls,
        "texts.jsonl": _running_texts,
        "preferences.json": _preferences,
    }
    files = {}
    for seed, (name, make) in enumerate(makers.items()):
        files[name] = folder / name
        rows = make(iter(_filled(draw_passages(60_000, seed))))
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = "\n".join(lines) if name.endswith("l") else f"[{', '.join(lines)}]"
        files[name].write_text(text + "\n", encoding="utf-8")
    return files


NUM_ROWS = {"instructions.json": 60, "tool_calls.json": 24, "texts.jsonl": 60, "preferences.json": 30}
"""Examples in each of these data sets."""


def _filled(texts: list[str]) -> list[str]:
    return [text for text in texts if text.strip()]


def _instructions(texts) -> list[dict[str, Any]]:
    rows = []
    for number in range(NUM_ROWS["instructions.json"]):
        row = {"instruction": next(texts), "input": "" if number % 3 else next(texts), "output": next(texts)}
        if number % 4 == 0:
            row["system"] = next(texts)
        if number % 5 == 0:
            row["history"] = [[next(texts), next(texts)] for _ in range(1 + number % 2)]
        rows.append(row)
    return rows


def _tool_calls(texts) -> list[dict[str, Any]]:
    tools = [{"name": "find_price", "description": "价格", "parameters": {"goods": {"type": "string"}}}]
    rows = []
    for number in range(NUM_ROWS["tool_calls.json"]):
        messages = []
        for _ in range(1 + number % 3):
            call = {"name": "find_price", "arguments": {"goods": next(texts)[:40]}}
            messages += [
                {"from": "human", "value": next(texts)},
                {"from": "function_call", "value": json.dumps(call, ensure_ascii=False)},
                {"from": "observation", "value": json.dumps({"price": number / 8, "note": next(texts)[:60]})},
                {"from": "gpt", "value": next(texts)},
            ]
        rows.append({"conversations": messages, "tools": json.dumps(tools, ensure_ascii=False)})
    return rows


def _running_texts(texts) -> list[dict[str, Any]]:
    return [{"text": "\n".join([next(texts), next(texts)])} for _ in range(NUM_ROWS["texts.jsonl"])]


def _preferences(texts) -> list[dict[str, Any]]:
    return [
        {
            "conversations": [{"from": "human", "value": next(texts)}],
            "chosen": {"from": "gpt", "value": next(texts)},
            "rejected": {"from": "gpt", "value": next(texts)},
        }
        for _ in range(NUM_ROWS["preferences.json"])
    ]
