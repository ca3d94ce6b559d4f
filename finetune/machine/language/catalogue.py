"""Messages in another language, found by the English message that the program made.

Messages stand in English in the code, as f-strings. A catalogue holds them as templates, with "{}" for each value, and
for each the same in the other language with "{0}", "{1}" and so on in the order that its grammar wants. A message is
looked up when it is shown, so that no code knows of languages, and what a catalogue lacks is shown in English.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_PLACE = "{}"
_NUMBERED = re.compile(r"\{(\d+)\}")
_MAX_DEPTH = 4
_LINES, _COLUMNS, _PARTS = re.compile(r"(\n)"), re.compile(r"( {2,})"), re.compile(r"(; )")
"""Between parts of a message that are messages of their own."""
_LABEL = re.compile(r"(error|warning|note|next|interrupted): (?=\S)")


class Catalogue:
    """Messages by template.

    Args:
        entries: English template -> the same in the other language.
        pieces: The same of what stands in columns, titles and enumerations only: too short to be looked for inside
                a message.
    """

    def __init__(self, entries: Mapping[str, str], pieces: Mapping[str, str] | None = None):
        self._pieces = Catalogue(pieces) if pieces else None
        self._exact = {template: text for template, text in entries.items() if _PLACE not in template}
        # What is put behind other messages; f-strings have no place that tells where it begins.
        self._endings = {key: self._exact[key] for key in self._exact if key[0] in " ,:;"}
        templates = (_Template(template, text) for template, text in entries.items() if _PLACE in template)
        # Of several templates that fit, the one with most fixed text tells most of the message.
        self._templates = sorted(templates, key=lambda each: -each.num_fixed)

    def translate(self, text: str, depth: int = 0) -> str:
        """The message in the other language, or as it is where the catalogue lacks it.

        Values inside a message are translated where they are messages themselves.
        """
        if not text or text.isspace():
            return text
        if found := self._find(text, depth):
            return found
        if depth < _MAX_DEPTH:
            if label := _LABEL.match(text):
                name = self._exact.get(f"{label[1]}:", label[0])
                return name + self.translate(text[label.end() :], depth + 1)
            return self._translate_parts(text, depth + 1)
        return text

    def _translate_parts(self, text: str, depth: int) -> str:
        for separator in (_LINES, _COLUMNS, _PARTS):
            parts = separator.split(text)
            if len(parts) > 1:
                return "".join(self._translate_part(part, depth) for part in parts)
        for ending, shown in self._endings.items():
            if text.endswith(ending):
                return self.translate(text.removesuffix(ending), depth) + shown
        return text

    def _find(self, text: str, depth: int) -> str | None:
        if text in self._exact:
            return self._exact[text]
        for template in self._templates:
            if (values := template.match(text)) is not None:
                if depth < _MAX_DEPTH:
                    values = [self.translate(value, depth + 1) for value in values]
                return template.fill(values)
        return None

    def translate_piece(self, text: str, depth: int = 0) -> str:
        """The text of a column or title in the other language."""
        found = self._pieces._find(text, _MAX_DEPTH) if self._pieces else None
        return found or self.translate(text, depth)

    def _translate_part(self, part: str, depth: int) -> str:
        core = part.strip(" ")
        return part.replace(core, self.translate_piece(core, depth), 1) if core else part


class _Template:
    """An English message with places for values, and its translation."""

    def __init__(self, template: str, text: str):
        self._first, *self._middle, self._last = template.split(_PLACE)
        self.num_fixed = len(template) - len(_PLACE) * (len(self._middle) + 1)
        self._text = text

    def match(self, text: str) -> list[str] | None:
        """The values in the places, each as short as it can be; None where this is another message."""
        if _LABEL.match(text) and not _LABEL.match(self._first):
            return None  # the label stands before a message of its own
        end = len(text) - len(self._last)
        if not text.startswith(self._first) or not text.endswith(self._last):
            return None
        values, start = [], len(self._first)
        for fixed in self._middle:
            found = text.find(fixed, start, end)
            if found < 0:
                return None
            values.append(text[start:found])
            start = found + len(fixed)
        return None if start > end else [*values, text[start:end]]

    def fill(self, values: list[str]) -> str:
        """The translation with the values in its places."""
        return _NUMBERED.sub(lambda place: values[int(place[1])], self._text)
