"""Messages in another language, found by the English message that the program made.

Messages stand in English in the code, as f-strings. A catalogue holds them as templates, with "{}" for each value, and
for each the same in the other language with "{0}", "{1}" and so on in the order that its grammar wants. A message is
looked up when it is shown, so that no code knows of languages, and what a catalogue lacks is shown in English.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Container, Mapping

from finetune.machine.language.columns import pad

_PLACE = "{}"
_NUMBERED = re.compile(r"\{(\d+)\}")
_MAX_DEPTH = 4
_LINES, _COLUMNS, _PARTS = re.compile(r"(\n)"), re.compile(r"( {2,})"), re.compile(r"(; )")
"""Between parts of a message that are messages of their own."""
_LABEL = re.compile(r"(error|warning|note|next|interrupted): (?=\S)")
_QUOTES = frozenset(('""', "''", "``"))
_NUMBER = re.compile(r"[-+~<]?\d|nan\b|inf\b")
_MIN_BEGINNING = 6
"""Characters before the first value of what is put behind other messages, by which it is found."""
_MIN_FIXED = 12
"""Letters of a piece around its values; one with fewer fits many a sentence, and is taken around numbers only."""


class Catalogue:
    """Messages by template.

    Args:
        entries: English template -> the same in the other language.
        pieces: The same of what stands in columns, titles and enumerations only: too short to be looked for inside
                a message.
        kept: Texts of a person, such as names of files, that stay as they are inside messages, whatever they look
              like; may grow later.
    """

    def __init__(
        self,
        entries: Mapping[str, str],
        pieces: Mapping[str, str] | None = None,
        kept: Container[str] = frozenset(),
    ):
        self._pieces = Catalogue(pieces) if pieces else None
        self._kept = kept
        self._exact = {key: _Template(key, text) for key, text in entries.items() if _PLACE not in key}
        # What is put behind other messages; f-strings have no place that tells where it begins.
        self._endings = {
            key: text for key, text in entries.items() if key in self._exact and key[0] in " ,:;"
        }
        templates = (_Template(template, text) for template, text in entries.items() if _PLACE in template)
        self._ending_templates = [
            _Template(key, text)
            for key, text in entries.items()
            if _PLACE in key and key[0] in " ,:;" and key.find(_PLACE) >= _MIN_BEGINNING
        ]
        # Of several templates that fit, the one with most fixed text tells most of the message.
        self._templates = sorted(templates, key=lambda each: -each.num_fixed)

    def translate(self, text: str, depth: int = 0) -> str:
        """The message in the other language, or as it is where the catalogue lacks it.

        Values inside a message are translated where they are messages themselves.
        """
        if not text or text.isspace() or (depth and self._is_kept(text)):
            return text
        if found := self._find(text, depth):
            return found
        if text.startswith("  "):
            core = text.lstrip(" ")
            return " " * (len(text) - len(core)) + self.translate(core, depth)
        if depth < _MAX_DEPTH:
            if label := _LABEL.match(text):
                name = self._exact.get(f"{label[1]}:")
                return (name.fill([]) if name else label[0]) + self.translate(text[label.end() :], depth + 1)
            return self._translate_parts(text, depth + 1)
        return text

    def _translate_parts(self, text: str, depth: int) -> str:
        for separator in (_LINES, _COLUMNS, _PARTS):
            parts = separator.split(text)
            if len(parts) > 1:
                cells = [self._translate_part(part, depth) for part in parts]
                return _join_columns(parts, cells) if separator is _COLUMNS else "".join(cells)
        for ending, shown in self._endings.items():
            if text.endswith(ending):
                return self.translate(text.removesuffix(ending), depth) + shown
        for template in self._ending_templates:
            place = text.find(template.first)
            if place > 0 and (values := template.match(text[place:])) is not None:
                return self.translate(text[:place], depth) + template.fill(values)
        return text

    def _find(self, text: str, depth: int) -> str | None:
        if (found := self._match(text)) is None:
            return None
        template, values = found
        if depth < _MAX_DEPTH:
            values = [
                value if is_quoted else self._translate_value(value, depth + 1)
                for value, is_quoted in zip(values, template.quoted, strict=False)
            ]
        return template.fill(values)

    def _translate_value(self, value: str, depth: int) -> str:
        """A value inside a message: a message itself, or a number of things such as "3 samples"."""
        return (self.translate_piece if _NUMBER.match(value) else self.translate)(value, depth)

    def _is_kept(self, text: str) -> bool:
        """Whether a part of a message is a person's: one of the kept texts, or in quotes."""
        text = text.strip()
        return text in self._kept or (text[:1] + text[-1:] in _QUOTES and text[:1] not in text[1:-1])

    def _match(self, text: str) -> tuple[_Template, list[str]] | None:
        if text in self._exact:
            return self._exact[text], []
        for template in self._templates:
            if (values := template.match(text)) is not None:
                return template, values
        return None

    def translate_piece(self, text: str, depth: int = 0) -> str:
        """The text of a column or title in the other language."""
        found = self._pieces._match(text) if self._pieces else None
        if found is None or (found[1] and not found[0].fits_piece(found[1])) or text in self._exact:
            return self.translate(text, depth)
        if depth and self._is_kept(text):
            return text
        template, values = found
        if depth < _MAX_DEPTH:
            values = [self.translate_piece(value, depth + 1) for value in values]
        return template.fill(values)

    def _translate_part(self, part: str, depth: int) -> str:
        core = part.strip(" ")
        return part.replace(core, self.translate_piece(core, depth), 1) if core else part


def _join_columns(parts: list[str], shown: list[str]) -> str:
    """Puts cells together so that each begins where the English one began, or two blanks behind the one before.

    Args:
        parts: The English line, cells and the blanks between them by turns.
        shown: The same with translated cells.
    """
    text, start = shown[0], len(parts[0])
    for gap, part, cell in zip(parts[1::2], parts[2::2], shown[2::2], strict=True):
        start += len(gap)
        text = pad(text + ("  " if text.strip() else gap), start) + cell
        start += len(part)
    return text


class _Template:
    """An English message with places for values, and its translation."""

    def __init__(self, template: str, text: str):
        fixed = template.split(_PLACE)
        self.first, self._middle = fixed[0], fixed[1:-1]
        self._last = fixed[-1] if len(fixed) > 1 else ""
        self.num_fixed = sum(map(len, fixed))
        self.quoted = [before[-1:] + after[:1] in _QUOTES for before, after in itertools.pairwise(fixed)]
        """Whether a place stands in quotes, and so holds a name."""
        self._text = text

    def match(self, text: str) -> list[str] | None:
        """The values in the places, each as short as it can be; None where this is another message."""
        if _LABEL.match(text) and not _LABEL.match(self.first):
            return None  # the label stands before a message of its own
        if not self.first and text.startswith("  "):
            return None  # an indentation is no value
        end = len(text) - len(self._last)
        if not text.startswith(self.first) or not text.endswith(self._last):
            return None
        values, start = [], len(self.first)
        for fixed in self._middle:
            found = text.find(fixed, start, end)
            if found < 0:
                return None
            values.append(text[start:found])
            start = found + len(fixed)
        return None if start > end else [*values, text[start:end]]

    def fits_piece(self, values: list[str]) -> bool:
        """Whether the values are such as stand in this piece, and not the rest of a sentence or of a line."""
        if any("  " in value for value in values):
            return False
        is_title = self.first[:1].isupper()
        words = [word for value in values for word in value.split()]  # such as "3m 20s"
        return is_title or self.num_fixed >= _MIN_FIXED or all(map(_NUMBER.match, words))

    def fill(self, values: list[str]) -> str:
        """The translation with the values in its places."""
        return _NUMBERED.sub(lambda place: values[int(place[1])], self._text)
