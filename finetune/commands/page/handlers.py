"""What the handlers of the page have in common: faults are told in the language of the page, words are private."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from finetune.errors import UserError
from finetune.serving.chat.toasts import fault_toast

QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of events that answer at once."""


def telling(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose first value is the language, and whose faults are shown as a message."""

    @functools.wraps(function)
    def handle(language: str, *values: Any) -> Any:
        try:
            return function(language, *values)
        except UserError as error:
            raise fault_toast(error, language) from None

    return handle
