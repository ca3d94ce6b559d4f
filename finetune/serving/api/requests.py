"""The two requests that are answered, read from their JSON objects."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.reading.conversation import ASSISTANT, Conversation, Message
from finetune.data.reading.message_lists import order_messages
from finetune.data.reading.notes import ReadingNotes
from finetune.data.reading.records import Record, RecordError
from finetune.serving.api.errors import InvalidRequest
from finetune.serving.api.fields import Fields, name_type, refuse_type, shown

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 500
_MAX_SEED = 2**63 - 1
_GREEDY_BELOW = 1e-5
"""Temperatures below would overflow."""

_IGNORED = ("user", "safety_identifier", "prompt_cache_key", "metadata")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
_NEUTRAL_OF_CHAT: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}
_NEUTRAL_OF_COMPLETION: dict[str, tuple[Any, ...]] = {
    "logprobs": (),
    "echo": (False,),
    "suffix": ("",),
}
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": ASSISTANT}


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What both kinds of request may ask for.

    Attributes:
        model: Name of the model.
        max_tokens: Most tokens of an answer, None leaves it to the server.
        temperature: None leaves it to the server.
        top_p: None leaves it to the server.
        num_answers: Answers to each prompt.
        seed: Of sampling; drawn where the request names none.
        stop: Texts that end an answer.
        streams: Whether text is sent as it comes.
        includes_usage: Whether a stream ends with the numbers of tokens.
    """

    model: str
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    num_answers: int
    seed: int
    stop: tuple[str, ...]
    streams: bool
    includes_usage: bool


def read_chat(values: dict[str, Any]) -> tuple[Wishes, Conversation]:
    """A request for the answer to a conversation.

    Raises:
        InvalidRequest: A field is missing, wrong, unknown or not supported.
    """
    fields = Fields(values)
    older, newer = (
        fields.take_integer(name, 1, _MAX_SEED) for name in ("max_tokens", "max_completion_tokens")
    )
    if older is not None and newer is not None and older != newer:
        raise InvalidRequest("max_tokens and max_completion_tokens differ: give one of them.", "max_tokens")
    messages = fields.take("messages")
    wishes = _read_wishes(fields, newer if newer is not None else older)
    fields.refuse_unsupported(_NEUTRAL_OF_CHAT)
    fields.refuse_rest()
    return wishes, read_conversation(messages)


def read_completion(values: dict[str, Any]) -> tuple[Wishes, list[str | list[int]]]:
    """A request for what follows one or several texts, or lists of token ids.

    Raises:
        InvalidRequest: A field is missing, wrong, unknown or not supported.
    """
    fields = Fields(values)
    max_tokens = fields.take_integer("max_tokens", 1, _MAX_SEED)
    prompt, wishes = fields.take("prompt"), _read_wishes(fields, max_tokens)
    best = fields.take_integer("best_of", 1, _MAX_SEED)
    if best not in (None, wishes.num_answers):
        raise InvalidRequest("best_of is not supported: leave it out.", "best_of", "unsupported_parameter")
    fields.refuse_unsupported(_NEUTRAL_OF_COMPLETION)
    fields.refuse_rest()
    return wishes, _read_prompts(prompt)


def _read_wishes(fields: Fields, max_tokens: int | None) -> Wishes:
    model = fields.take_text("model")
    if not model:
        raise InvalidRequest("model is missing: give the name that /v1/models tells.", "model")
    temperature, top_p = fields.take_number("temperature", 0, 2), fields.take_number("top_p", 0, 1)
    if (temperature is not None and temperature < _GREEDY_BELOW) or top_p == 0:
        temperature, top_p = 0.0, 1.0
    seed = fields.take_integer("seed", -(2**63), _MAX_SEED)
    streams = fields.take_flag("stream")
    wishes = Wishes(
        model=model,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        num_answers=fields.take_integer("n", 1, _MAX_SEED) or 1,
        seed=secrets.randbits(63) if seed is None else seed % 2**63,
        stop=_read_stops(fields.take("stop")),
        streams=streams,
        includes_usage=_read_stream_options(fields.take("stream_options"), streams),
    )
    fields.refuse_unsupported(_NEUTRAL)
    fields.ignore(*_IGNORED)
    return wishes


def _read_stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        refuse_type("stop", value, "a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop has {len(stops)} texts, {MAX_STOPS} are allowed.", "stop")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"A text of stop has {len(stop)} characters but must have 1 to {MAX_STOP_CHARACTERS}.", "stop"
            )
    return tuple(stops)


def _read_stream_options(value: Any, streams: bool) -> bool:
    if value is None:
        return False
    if not streams:
        raise InvalidRequest("stream_options is for streams only: set stream to true.", "stream_options")
    if not isinstance(value, dict):
        refuse_type("stream_options", value, "an object")
    fields = Fields(value, "stream_options.")
    includes_usage = fields.take_flag("include_usage")
    fields.ignore("include_obfuscation")  # of use behind TLS only; nothing is encrypted here
    fields.refuse_rest()
    return includes_usage


def read_conversation(values: Any) -> Conversation:
    """The messages of a request, to be answered.

    Raises:
        InvalidRequest: They are none, or in an order in which nothing is to be answered.
    """
    if not isinstance(values, list) or not values:
        raise InvalidRequest("messages must be a list with at least one message.", "messages")
    messages = [_read_message(value, f"messages[{place}]") for place, value in enumerate(values)]
    if messages[-1].role != "user":
        raise InvalidRequest(
            f"messages ends with a message of {messages[-1].role}: the last one must be the user's, to be answered.",
            "messages",
        )
    record = Record(Path("request"), 1, {})
    try:
        system, ordered = order_messages(
            record, [*messages, Message(ASSISTANT, "")], "messages", ReadingNotes()
        )
    except RecordError as error:
        raise InvalidRequest(error.faults[0], "messages") from None
    if ordered[0].role == ASSISTANT:
        raise InvalidRequest("messages begins with an answer: begin with the user's message.", "messages")
    return Conversation(ordered, system, Path(), 0)


def _read_message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name} is {name_type(value)}, expected an object.", name)
    fields = Fields(value, f"{name}.")
    role = fields.take_text("role")
    if role not in _ROLES:
        hint = ", which this server does not support" if role in ("tool", "function") else ""
        raise InvalidRequest(
            f"{name}.role is {shown(role)}{hint}: use one of {', '.join(_ROLES)}.", f"{name}.role"
        )
    content = _read_content(fields.take("content"), f"{name}.content")
    fields.ignore("name", "refusal", "annotations", "id", "reasoning_content")
    fields.refuse_unsupported({"audio": (), "tool_calls": ([],), "function_call": ()})
    fields.refuse_rest()
    return Message(_ROLES[role], content)


def _read_content(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        refuse_type(name, value, "a string or a list of parts")
    texts = []
    for place, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f"{name}[{place}] is {f'of type {shown(kind)}' if kind else name_type(part)}: only parts of type "
                '"text" are supported.',
                f"{name}[{place}]",
            )
        texts.append(part["text"])
    return "".join(texts)


def _read_prompts(value: Any) -> list[str | list[int]]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        refuse_type("prompt", value, "a string, a list of token ids, or a list of either, none empty")
    if all(map(_is_id, value)):
        return [value]
    for prompt in value:
        if not isinstance(prompt, str) and not (
            isinstance(prompt, list) and prompt and all(map(_is_id, prompt))
        ):
            refuse_type("prompt", value, "a string, a list of token ids, or a list of either, none empty")
    return list(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
