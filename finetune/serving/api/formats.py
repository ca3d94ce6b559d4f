"""The JSON objects of answers, in the two forms of OpenAI's interface."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

DONE = b"data: [DONE]\n\n"


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event that holds an object."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


@dataclass(frozen=True)
class ChatFormat:
    """Answers to conversations.

    Attributes:
        model: Name of the model.
        includes_usage: Whether every event of a stream has the field usage.
        ident: Id of the answer.
        created: Unix time.
    """

    model: str
    includes_usage: bool = False
    ident: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    whole_kind = "chat.completion"
    part_kind = "chat.completion.chunk"

    def whole(self, texts: list[str], finishes: list[str | None], usage: dict[str, int]) -> dict[str, Any]:
        """All answers at once."""
        choices = [
            {"index": index, **self._whole_text(text), "logprobs": None, "finish_reason": finish}
            for index, (text, finish) in enumerate(zip(texts, finishes, strict=True))
        ]
        return {**self._head(self.whole_kind), "choices": choices, "usage": usage}

    def begin(self, num_answers: int) -> list[dict[str, Any]]:
        """What a stream says before the first text."""
        return [
            self._part([{"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                         "finish_reason": None}])
            for index in range(num_answers)
        ]  # fmt: skip

    def part(self, index: int, text: str, finish: str | None) -> list[dict[str, Any]]:
        """New text of an answer, and its end."""
        parts: list[tuple[dict[str, Any], str | None]] = [(self._part_text(text), None)] if text else []
        if finish:
            parts.append((self._part_text(""), finish))
        return [
            self._part([{"index": index, **content, "logprobs": None, "finish_reason": why}])
            for content, why in parts
        ]

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last event of a stream that was asked for its numbers of tokens."""
        return {**self._head(self.part_kind), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.ident, "object": kind, "created": self.created, "model": self.model}

    def _part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.includes_usage else {}
        return {**self._head(self.part_kind), "choices": choices, **usage}

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _part_text(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


@dataclass(frozen=True)
class CompletionFormat(ChatFormat):
    """What follows texts."""

    ident: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")

    whole_kind = "text_completion"
    part_kind = "text_completion"

    def begin(self, num_answers: int) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def _whole_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _part_text = _whole_text
