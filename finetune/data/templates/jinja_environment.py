"""How jinja texts that come with models are read: sandboxed, with the additions that chat templates expect."""

from __future__ import annotations

import json
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

CHAT = "chat"
"""A template of a whole list of messages, as transformers renders it."""
PART = "part"
"""A part of PaddleNLP's ``chat_template.json``."""

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
        extensions=["jinja2.ext.loopcontrols"] if kind == CHAT else (),
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    if kind == CHAT:
        environment.filters["tojson"] = _to_json
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    """Chinese as it is, and no marks of HTML escaped, unlike jinja's own."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def describe(error: Exception) -> str:
    """What a template error says, in one line where jinja knows the line."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    return str(error) or type(error).__name__
