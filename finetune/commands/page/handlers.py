"""What the handlers of the page have in common: faults are told in the language of the page, words are private."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gradio as gr

from finetune.commands.page.choices import in_language
from finetune.errors import UserError

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of events that answer at once."""


def telling(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose first value is the language, and whose faults are shown as a message."""

    @functools.wraps(function)
    def handle(language: str, *values: Any) -> Any:
        try:
            return function(language, *values)
        except UserError as error:
            told = "\n".join(in_language(fault, language) for fault in error.faults)
            raise gr.Error(told, print_exception=False) from None

    return handle
