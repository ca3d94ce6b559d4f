"""The values of a YAML text, with the line that each key stands on.

PyYAML splits the text; what a word means is decided here, by the core schema of YAML 1.2 instead of PyYAML's 1.1:
`no`, `on` and `yes` are texts (a flag takes them, a text such as `evaluation_strategy: no` stays one), `1e-5` is a
number, and a date is a text. Every mapping refuses a key that stands in it twice. Tags, which can name Python
classes, are refused. An anchor may be repeated, but the size of the result is bounded, repeats included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_MAX_VALUES = 10_000
_MAX_DEPTH = 20
_NULL = re.compile(r"~|null|Null|NULL|")
_FLAG = re.compile(r"(true|True|TRUE)|false|False|FALSE")
_WHOLE = re.compile(r"[-+]?[0-9]+")
_OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# Eight in YAML 1.1, ten in 1.2; JSON has no such number.
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_MAX_DIGITS = 400  # the largest float has 309


class YamlFault(ValueError):
    """A text that is no YAML, or holds what no argument file needs.

    Args:
        line: Where, counted from one.
        message: What is wrong and what to do.
        column: Counted from one; None where the line says enough.
    """

    def __init__(self, line: int, message: str, column: int | None = None):
        super().__init__(message)
        self.line, self.column = line, column


def parse_yaml(text: str) -> tuple[Any, dict[str, int]]:
    """Reads a YAML text of one document.

    Args:
        text: The text; an empty one gives None.

    Returns:
        The value, and for every key of the outermost mapping its line, counted from one.

    Raises:
        YamlFault: The text is not YAML, or not in the form of an argument file.
    """
    import yaml  # not above: JSON files do not need it

    try:
        builder = _Builder(iter(yaml.parse(text, Loader=yaml.SafeLoader)))
        return builder.read_document(), builder.lines
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise YamlFault(line, f"it holds the control character \\u{code:04x}: remove it") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(part) for part in (error.context, error.problem) if part)
        if mark is None:
            raise YamlFault(1, f"not valid YAML ({problem})") from None
        message = f"not valid YAML ({problem}){_explain(error.problem or '', text, mark.index)}"
        raise YamlFault(mark.line + 1, message, mark.column + 1) from None
    except RecursionError:
        raise YamlFault(1, "it is nested too deep, settings are plain values") from None


@dataclass
class _Builder:
    """Builds values from the events of PyYAML's parser."""

    events: Iterator[Any]
    lines: dict[str, int] = field(default_factory=dict)  # key of the outermost mapping -> its line
    anchors: dict[str, tuple[Any, int]] = field(default_factory=dict)  # name -> value, number of values in it
    num_values: int = 0
    depth: int = 0

    def read_document(self) -> Any:
        next(self.events)  # the start of the stream
        if self._name(first := next(self.events)) == "StreamEnd":
            return None
        first = next(self.events)
        value = self._build(first)
        next(self.events)  # the end of the document
        if self._name(after := next(self.events)) != "StreamEnd":
            raise YamlFault(_line(after), "a second document begins here: keep one")
        return value

    def _build(self, event: Any) -> Any:
        name, before = self._name(event), self.num_values
        if name == "Alias":
            return self._repeat(event)
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            raise YamlFault(
                _line(event), f"the tag {tag} is not read: remove it, and quote what shall be text"
            )
        self._count(event, 1)
        if name == "Scalar":
            value = event.value if event.style else _convert_word(event.value, _line(event))
        else:
            self.depth += 1
            if self.depth > _MAX_DEPTH:
                raise YamlFault(_line(event), "it is nested too deep, settings are plain values")
            value = self._build_list() if name == "SequenceStart" else self._build_mapping()
            self.depth -= 1
        if event.anchor is not None:
            self.anchors[event.anchor] = value, self.num_values - before
        return value

    def _build_list(self) -> list[Any]:
        items = []
        while self._name(event := next(self.events)) != "SequenceEnd":
            items.append(self._build(event))
        return items

    def _build_mapping(self) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while self._name(event := next(self.events)) != "MappingEnd":
            key, line = self._read_key(event), _line(event)
            if key in entries:
                raise YamlFault(line, f'"{key}" stands in line {lines[key]} already: keep one')
            entries[key], lines[key] = self._build(next(self.events)), line
        if self.depth == 1:
            self.lines = lines
        return entries

    def _read_key(self, event: Any) -> str:
        if self._name(event) != "Scalar":
            raise YamlFault(
                _line(event), "a key is a list, a mapping or a repeated anchor: write it as a word"
            )
        if event.value == "<<" and not event.style:
            raise YamlFault(_line(event), "<< (a merge of mappings) is not read: write the entries out")
        if event.tag is not None or event.anchor is not None:
            raise YamlFault(_line(event), f'the key "{event.value}" has a tag or an anchor: remove it')
        self._count(event, 1)
        return str(event.value)

    def _repeat(self, event: Any) -> Any:
        if event.anchor not in self.anchors:
            raise YamlFault(
                _line(event),
                f"*{event.anchor} repeats an anchor that does not stand above (&{event.anchor}): "
                "a text that begins with * stands in quotes",
            )
        value, size = self.anchors[event.anchor]
        self._count(event, size)
        return value

    def _count(self, event: Any, more: int) -> None:
        self.num_values += more
        if self.num_values > _MAX_VALUES:
            raise YamlFault(
                _line(event),
                f"here it has more than {_MAX_VALUES:,} values, repeated anchors included: give the settings alone",
            )

    @staticmethod
    def _name(event: Any) -> str:
        return type(event).__name__.removesuffix("Event")


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _convert_word(word: str, line: int) -> Any:
    """The value of a word without quotes, by YAML 1.2's core schema."""
    if _NULL.fullmatch(word):
        return None
    if flag := _FLAG.fullmatch(word):
        return flag[1] is not None
    if _LEADING_ZERO.fullmatch(word):
        raise YamlFault(
            line,
            f"{word} is a number in base 8 or in base 10, by the version of YAML: write it without the leading "
            "zero, or in quotes where it is a text",
        )
    if len(word) > _MAX_DIGITS and _NUMBER.fullmatch(word):
        raise YamlFault(line, f"a number has {len(word):,} characters: write a shorter one")
    if _WHOLE.fullmatch(word):
        return int(word)
    if _OTHER_BASE.fullmatch(word):
        return int(word, 0)
    if _NUMBER.fullmatch(word):
        return float(word)
    if special := _NOT_FINITE.fullmatch(word):
        return float(f"{special[1]}inf") if special[2] else float("nan")
    return word


def _explain(problem: str, text: str, index: int) -> str:
    """What to change, for mistakes that are often made."""
    character = text[index : index + 1]
    before = text[text.rfind("\n", 0, index) + 1 : index]
    if character == "\t" or "\t" in before[: len(before) - len(before.lstrip())]:
        return ": indent with blanks, not with tabs"
    if "cannot start any token" in problem:
        return f": a text that begins with {character} stands in quotes"
    if "mapping values are not allowed" in problem:
        return ": a text with a colon and a blank in it stands in quotes, and keys begin in one column"
    if "could not find expected ':'" in problem:
        return ": write `key: value`, with a blank after the colon"
    if "block end" in problem or "document start" in problem:
        return ": keys of one level begin in one column"
    if "escape" in problem:
        return ": in double quotes a backslash is doubled, or use single quotes"
    if "end of stream" in problem or "expected ',' or" in problem:
        return ": a quote or a bracket is not closed"
    return ""
