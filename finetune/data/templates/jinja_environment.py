"""How jinja texts that come with models are read: sandboxed, with the additions that chat templates expect."""

from __future__ import annotations

import json
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.data.templates.template_clock import template_time

CHAT = "chat"
"""A template of a whole list of messages, as transformers renders it."""
TEXT_PARTS = "{% set messages = messages | text_parts %}\n"
"""In front of a chat template that takes parts of messages alone; the line break goes with the statement."""
PART = "part"
"""A part of PaddleNLP's ``chat_template.json``."""

GENERATION_START, GENERATION_END = "\ue0f6", "\ue0f7"
"""Around what a template marks as learned; private characters, which no template has by chance."""

# What a template that is valid but does not fit the data may raise while it is rendered.
RENDER_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def make_environment(kind: str = CHAT) -> ImmutableSandboxedEnvironment:
    """A template file comes with a downloaded model: it may format text and nothing more.

    Args:
        kind: `CHAT` or `PART`.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=kind == PART,
        extensions=["jinja2.ext.loopcontrols", GenerationMarks] if kind == CHAT else (),
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    if kind == CHAT:
        environment.filters["tojson"] = _to_json
        environment.filters["text_parts"] = _in_parts
        environment.globals["strftime_now"] = lambda pattern: template_time().strftime(pattern)
    return environment


class GenerationMarks(Extension):
    """``{% generation %} ... {% endgeneration %}`` around what a model is to learn, as transformers has it.

    What stands between is written between `GENERATION_START` and `GENERATION_END`.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """The block's content with a mark on either side."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (
            nodes.Output([nodes.TemplateData(mark)], lineno=line)
            for mark in (GENERATION_START, GENERATION_END)
        )
        return nodes.Scope([start, *body, end], lineno=line)


def _in_parts(messages: Any) -> list[dict[str, Any]]:
    """Messages whose texts are lists of one part, as programs for multimodal models hand them over."""
    return [
        message | {"content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Chinese as it is, and no marks of HTML escaped, unlike jinja's own; arguments as in transformers."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def describe(error: Exception) -> str:
    """What a template error says, in one line where jinja knows the line."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    return str(error) or type(error).__name__
