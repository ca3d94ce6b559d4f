"""The conversation formats that no pattern expresses, by name: thoughts, dates, functions and calls of them.

Each is jinja text of the folder ``forms``, which writes what the text in the publisher's folder does, behind values
that tell the models of one publisher apart. Where it has to differ, so that something can be learned from it, its
comment says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune.storage.files import read_text

SWITCH = "enable_thinking"
"""What a template asks for to know whether an answer begins with thoughts."""

_FOLDER = Path(__file__).parent / "forms"
_MARKS = ("<|im_start|>", "<|im_end|>")
_HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_INSTRUCTION = ("[INST]", "[/INST]", "[TOOL_CALLS]")
_QWEN = {"default_system": None, "joins_tools": False, "thinking": "", "keeps_thoughts": True}


@dataclass(frozen=True, kw_only=True)
class JinjaForm:
    """A format as jinja text.

    Attributes:
        file: Name of the text in the folder.
        special_tokens: Tokens that it writes and the tokenizer must have.
        values: What is set before the text.
        has_switch: Whether it asks for `SWITCH`.
        stands_in: Whether it is meant for models whose own template cannot be trained.
    """

    file: str
    special_tokens: tuple[str, ...]
    values: Mapping[str, str | bool | None] = field(default_factory=dict)
    has_switch: bool = False
    stands_in: bool = False

    @property
    def source(self) -> str:
        """The whole text."""
        given = {
            name: json.dumps(value) if value is not None else "none" for name, value in self.values.items()
        }
        settings = "".join(f"{{%- set {name} = {value} %}}\n" for name, value in given.items())
        return settings + read_text(_FOLDER / f"{self.file}.jinja")


JINJA_FORMS: dict[str, JinjaForm] = {
    "qwen2.5": JinjaForm(
        file="qwen",
        special_tokens=_MARKS,
        values=_QWEN
        | {
            "default_system": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
            "joins_tools": True,
        },
    ),
    "qwen3": JinjaForm(
        file="qwen", special_tokens=_MARKS, values=_QWEN | {"thinking": "switched"}, has_switch=True
    ),
    "qwen3_nothink": JinjaForm(file="qwen", special_tokens=_MARKS, values=_QWEN),
    "qwen3_thinking": JinjaForm(file="qwen", special_tokens=_MARKS, values=_QWEN | {"thinking": "always"}),
    "qwq": JinjaForm(
        file="qwen",
        special_tokens=_MARKS,
        values=_QWEN | {"joins_tools": True, "thinking": "always", "keeps_thoughts": False},
    ),
    "deepseek_r1": JinjaForm(
        file="deepseek_r1",
        special_tokens=("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        has_switch=True,
        stands_in=True,
    ),
    "llama3.1": JinjaForm(file="llama3", special_tokens=_HEADERS, values={"date": "26 Jul 2024"}),
    "llama3.2": JinjaForm(file="llama3", special_tokens=_HEADERS, values={"date": None}),
    "mistral_v3": JinjaForm(file="mistral", special_tokens=_INSTRUCTION, values={"gap": " "}),
    "mistral_nemo": JinjaForm(file="mistral", special_tokens=_INSTRUCTION, values={"gap": ""}),
    "skywork": JinjaForm(file="skywork", special_tokens=("<s>", "</s>")),
}
JINJA_FORMS["llama3.3"] = JINJA_FORMS["llama3.1"]
