"""What a jinja template writes for messages, in slots, and which of them are learned.

A template says nothing about what is learned. That is found by rendering longer and longer parts of a conversation:
what the answer adds to the text that asks for it is learned. This is right only where a longer part repeats the
shorter one, so a conversation whose earlier rounds a template writes anew is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune.data.reading.conversation import ASSISTANT, TOOL_CALL
from finetune.data.templates.jinja_environment import GENERATION_END, GENERATION_START
from finetune.data.templates.message_outlines import Outline
from finetune.data.templates.pieces import Slot, parse_pattern
from finetune.data.templates.template_rendering import Renderer, RenderError
from finetune.data.templates.template_worker import Variant

_PLACEHOLDERS = re.compile("\ue0f0([0-9]+)\ue0f1")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARKS = re.compile(f"[{GENERATION_START}{GENERATION_END}]")
_NUM_COPIES = 8  # of a placeholder, so that one is left of those that a template cuts
_FIRST_ESCAPE = 0xE100
_PRIVATE = re.compile("[\ue0f0-\ue0ff\ue100-\ue1ff]")

Slots = tuple[tuple[Slot, bool], ...]
"""Slots, each with whether it is learned. Data have the number of their message; thoughts that of the message and the
number of all messages."""


class InconsistentError(Exception):
    """What comes later changes what was written for earlier messages."""

    def __str__(self) -> str:
        return (
            "it writes earlier messages differently once later ones follow, so what a model is asked to "
            "continue would not be what it was trained on. Set train_on to each (every answer becomes a sample of "
            "its own) or to last (the last answers alone are learned), or give chat_template another name or file."
        )


class SlotFinder:
    """Renders messages with one template and parts the text into slots.

    Args:
        source: The template's text.
        renderer: Renders it.
        values: What the template is given beside the messages: special tokens by role, and others.
        specials: What in the text is a special token.
        escaped: The special tokens whose names in data are text.
        places_texts: Whether it places texts as they are, so that a placeholder comes back once and whole.

    Attributes:
        closing: The special token that closes each answer but the last, where the template closes that only when
            another message follows; "" elsewhere.
        marks_learned: Whether the template says itself what is learned.
    """

    def __init__(
        self,
        source: str,
        renderer: Renderer,
        *,
        values: Mapping[str, Any],
        specials: Sequence[str],
        escaped: Sequence[str],
        places_texts: bool,
    ):
        self._renderer, self._values, self._specials = renderer, dict(values), tuple(specials)
        self.marks_learned = _GENERATION.search(source) is not None
        self.closing = ""
        self._num_copies = 1 if places_texts else _NUM_COPIES
        # One character for one, so that a template that counts or cuts finds the same length.
        heads = "".join(sorted({name[0] for name in escaped}))
        self._escapes = {head: chr(_FIRST_ESCAPE + number) for number, head in enumerate(heads)}
        self._heads = {ord(escape): head for head, escape in self._escapes.items()}
        longest_first = sorted(escaped, key=len, reverse=True)
        self._escaped = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def escape(self, text: str) -> str:
        """A text to be rendered, in which names of special tokens are none.

        Raises:
            RenderError: It has characters that are needed for this.
        """
        if _PRIVATE.search(text):
            raise RenderError("a text has characters for private use (U+E0F0 to U+E1FF)")
        return self._escaped.sub(lambda found: self._escapes[found[0][0]] + found[0][1:], text)

    def unescape(self, text: str) -> str:
        """What `escape` had made another text of."""
        return text.translate(self._heads)

    def find(
        self,
        outlines: Sequence[Outline],
        tools: str | None,
        *,
        for_training: bool,
        texts: Sequence[str] | None = None,
        only_last: bool = False,
    ) -> Slots:
        """The text of messages in slots, each with its flag.

        Args:
            outlines: The messages.
            tools: Functions on offer, as JSON text.
            for_training: Whether the last answer is written.
            texts: The contents of all messages, then their thoughts, where the template is to see them; what it
                makes of them is text then. Without, placeholders stand for them, and slots for data come back.
            only_last: Whether the last answer alone is to be learned, so that it does not matter how the template
                had written the earlier ones before.

        Raises:
            InconsistentError: What comes later changes what was written for earlier messages.
            RenderError: The template fails, or a placeholder gets lost.
        """
        roles = [outline.role for outline in outlines]
        if texts is None:
            messages = [
                outline.write(index, len(outlines), num_copies=self._num_copies)
                for index, outline in enumerate(outlines)
            ]
        else:
            shown = list(map(self.escape, texts))
            messages = [
                outline.write_texts(shown[index], shown[len(outlines) + index])
                for index, outline in enumerate(outlines)
            ]
        if self.marks_learned and for_training:
            slots = self._find_marked(messages, tools)
        else:
            slots = self._find_consistent(
                roles, messages, tools, for_training=for_training, only_last=only_last
            )
        if texts is None:
            _check_seen(slots, outlines[: None if for_training else len(roles) - 1])
        return tuple(
            slots if self.marks_learned and for_training else self._close(slots, learns_last=for_training)
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: str | None,
        parts: Sequence[tuple[int, bool]],
        *,
        keeps_marks: bool = False,
    ) -> Iterator[str]:
        """The text of so many messages of the front, each time with or without what asks for an answer."""
        values = {**self._values, "tools": _parse_tools(tools) if tools else None, "messages": list(messages)}
        texts = self._renderer.render_all(
            values, [Variant({"add_generation_prompt": asks}, count) for count, asks in parts]
        )
        return iter(texts) if keeps_marks else (_MARKS.sub("", text) for text in texts)

    def _find_consistent(
        self,
        roles: Sequence[str],
        messages: Sequence[Mapping[str, Any]],
        tools: str | None,
        *,
        for_training: bool,
        only_last: bool,
    ) -> list[tuple[Slot, bool]]:
        """What answers add; of a prompt, or where the last answer counts, earlier ones may have been changed."""
        try:
            return self._find_added(roles, messages, tools, for_training=for_training)
        except InconsistentError:
            if for_training and not only_last:
                raise
            return self._find_added(roles, messages, tools, for_training=for_training, only_last=True)

    def _find_added(
        self,
        roles: Sequence[str],
        messages: Sequence[Mapping[str, Any]],
        tools: str | None,
        *,
        for_training: bool,
        only_last: bool = False,
    ) -> list[tuple[Slot, bool]]:
        """What each answer adds is learned."""
        last = len(roles) - 1
        answers = [index for index, role in enumerate(roles) if role in (ASSISTANT, TOOL_CALL)]
        answers = answers[-1:] if only_last else answers
        parts = [(count, asks) for index in answers for count, asks in ((index, True), (index + 1, False))]
        whole = (len(roles), False)
        if not for_training and answers and answers[-1] == last:
            parts.pop()
        elif for_training and whole not in parts:
            parts.append(whole)
        rendered = list(self.render(messages, tools, parts))
        slots: list[tuple[Slot, bool]] = []
        written = ""
        for number, ((count, asks), text) in enumerate(zip(parts, rendered, strict=True)):
            if (count, asks) == whole and last not in answers and text != written:
                raise InconsistentError
            if not asks and number + 1 < len(rendered):
                text = self._without_ending(text, rendered[number + 1])
            slots += self._parse_added(written, text, learned=not asks)
            written = text
        return slots

    def _without_ending(self, text: str, longer: str) -> str:
        """A text without the special tokens that the template writes at the end of all messages alone."""
        rest = text
        while rest and not longer.startswith(rest):
            ending = next((name for name in self._specials if rest.endswith(name)), rest[-1])
            if ending not in self._specials and not ending.isspace():
                return text
            rest = rest.removesuffix(ending)
        return rest if rest.rstrip().endswith(self._specials) else text  # the answer's own end stays

    def _find_marked(
        self, messages: Sequence[Mapping[str, Any]], tools: str | None
    ) -> list[tuple[Slot, bool]]:
        """The same for a template that says itself what is learned."""
        text = next(self.render(messages, tools, [(len(messages), False)], keeps_marks=True))
        slots: list[tuple[Slot, bool]] = []
        for position, part in enumerate(_MARKS.split(text)):
            slots += [(slot, position % 2 == 1) for slot in self._parse(part)]
        if not any(learned for _, learned in slots):
            raise RenderError("its generation marks stand around no answer")
        return slots

    def _close(self, slots: list[tuple[Slot, bool]], *, learns_last: bool) -> list[tuple[Slot, bool]]:
        """Slots in which the mark that closes an answer is learned, and closes the last one too.

        Some templates close an answer only when another message follows it.
        """
        if not self.closing or not learns_last:
            return slots
        closed: list[tuple[Slot, bool]] = []
        for number, (slot, learned) in enumerate(slots):
            follows_answer = number > 0 and slots[number - 1][1] and slot == Slot("special", self.closing)
            closed.append((slot, learned or follows_answer))
        return [*closed, (Slot("special", self.closing), True)]

    def _parse_added(self, shorter: str, longer: str, *, learned: bool) -> list[tuple[Slot, bool]]:
        if not longer.startswith(shorter):
            raise InconsistentError
        added = longer[len(shorter) :]
        text = added
        if learned and added.rstrip().endswith(self._specials or ("\ue0f2",)):
            text = added.rstrip()  # the line break behind an end mark belongs to no answer
        slots = [(slot, learned) for slot in self._parse(text)]
        return [*slots, *((slot, False) for slot in self._parse(added[len(text) :]))]

    def _parse(self, text: str) -> list[Slot]:
        slots: list[Slot] = []
        for position, part in enumerate(_PLACEHOLDERS.split(text)):  # text, index, text, index, ..., text
            slots += [Slot("data", part)] if position % 2 else parse_pattern(part, (), self._specials)
        return slots


def find_closing(slots: Sequence[tuple[Slot, bool]]) -> str:
    """The special token that follows each answer but the last; "" where there is none."""
    places = [place for place, (_, learned) in enumerate(slots) if learned]
    behind = [slots[place + 1][0] for place in places[:-1] if not slots[place + 1][1]]
    is_last = bool(places) and places[-1] + 1 == len(slots)
    return behind[0].value if is_last and behind and behind[0].kind == "special" else ""


def _check_seen(slots: Sequence[tuple[Slot, bool]], outlines: Sequence[Outline]) -> None:
    seen = {int(slot.value) for slot, _ in slots if slot.kind == "data"}
    lost = [each.role for index, each in enumerate(outlines) if each.has_text and index not in seen]
    if lost:
        raise RenderError(f"it leaves out or alters the text of a message from {lost[0]}")


def _parse_tools(tools: str) -> Any:
    try:
        return json.loads(tools)
    except (ValueError, RecursionError):
        return tools
