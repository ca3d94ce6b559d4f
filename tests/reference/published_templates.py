"""Conversations as the chat templates in publishers' folders write them, for the formats that have these names here.

python -m tests.reference.published_templates FOLDER

FOLDER holds NAME.jinja as it is published with a model, for names of `finetune.data.templates.jinja_forms`; transformers
renders them. The texts go into published_templates.json, those of names that FOLDER lacks stay as they are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_suffix(".json")
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
DAY = "26 Jul 2024"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a 城市",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "clock", "parameters": {}}},
]


def system(content: str) -> dict[str, Any]:
    """A system text."""
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, Any]:
    """A question."""
    return {"role": "user", "content": content}


def answer(content: str, **more: Any) -> dict[str, Any]:
    """An answer."""
    return {"role": "assistant", "content": content, **more}


def call(*names: str, content: str = "", **more: Any) -> dict[str, Any]:
    """An answer that calls functions."""
    calls = [
        {
            "type": "function",
            "id": f"call0000{place}",
            "function": {"name": name, "arguments": {"city": "北京"}},
        }
        for place, name in enumerate(names)
    ]
    return answer(content, tool_calls=calls, **more)


def result(content: str) -> dict[str, Any]:
    """What a function returned."""
    return {"role": "tool", "content": content, "tool_call_id": "call00000"}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [user("q")],
    "one round": [user("q"), answer("a")],
    "a second question": [user("q"), answer("a"), user("q2")],
    "two rounds": [user("q"), answer("a"), user("q2"), answer("a2")],
    "system, one question": [system("sys"), user("q")],
    "system, two rounds": [system("sys"), user("q"), answer("a"), user("q2"), answer("a2")],
    "empty system": [system(""), user("q"), answer("a")],
    "thoughts in texts": [
        user("q"),
        answer("<think>\nt1\n</think>\n\na1"),
        user("q2"),
        answer("<think>\nt2\n</think>\n\na2"),
    ],
    "thoughts apart": [
        user("q"),
        answer("a1", reasoning_content="t1"),
        user("q2"),
        answer("a2", reasoning_content="\nt2\n"),
    ],
    "switched off in the question": [user("q /no_think"), answer("a"), user("q2 /think")],
    "called": [user("w?"), call("weather"), result("21")],
    "called, answered": [user("w?"), call("weather"), result("21"), answer("warm")],
    "called twice, then thanked": [
        system("sys"),
        user("w?"),
        call("weather", "clock", content="I look."),
        result("21"),
        result('{"x": 3}'),
        answer("warm"),
        user("thanks"),
        answer("ok"),
    ],
    "thoughts before calls": [
        user("w?"),
        call("weather", reasoning_content="hm"),
        result("21"),
        answer("warm", reasoning_content="so"),
    ],
    "blanks": [user("\n q \n"), answer("\n\na \n"), user("q2 "), answer(" a2")],
    "two questions in a row": [user("q"), user("q2"), answer("a")],
    "begins with an answer": [answer("hi"), user("q")],
}
"""By name; every one is rendered whole, and those that end with a question for its answer."""


def variants() -> list[tuple[str, dict[str, Any]]]:
    """What is rendered, by name: messages, tools, whether an answer is asked for, and what is told of thoughts."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name, messages in CONVERSATIONS.items():
        offers = [TOOLS] if any("tool_calls" in each for each in messages) else [None]
        for tools in [TOOLS, None] if name in ("one question", "system, one question") else offers:
            asks = messages[-1]["role"] != "assistant"
            for switch in (None, True, False) if asks else (None,):
                shown = (
                    f"{name}{', tools' if tools else ''}{'' if switch is None else f', thinking {switch}'}"
                )
                values = {"messages": messages, "tools": tools, "add_generation_prompt": asks}
                found.append((shown, values if switch is None else {**values, "enable_thinking": switch}))
    return found


def main(folder: Path) -> None:
    """Writes the texts; null where a template refuses a conversation."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    golden = json.loads(GOLDEN.read_text("utf-8")) if GOLDEN.exists() else {}
    for path in sorted(folder.glob("*.jinja")):
        source = path.read_text("utf-8")
        template = _compile_jinja_template(source)
        texts: dict[str, str | None] = {}
        for name, values in variants():
            if "enable_thinking" in values and "enable_thinking" not in source:
                continue
            try:
                texts[name] = template.render(date_string=DAY, **values, **TOKENS)
            except Exception:
                texts[name] = None
        golden[path.stem] = texts
    GOLDEN.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
