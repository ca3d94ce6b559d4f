"""The pieces a template writes: stretches of text with a flag that says whether they are learned."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from finetune.data.reading.conversation import Conversation
from finetune.errors import UserError


class Piece(NamedTuple):
    """A stretch of text that is tokenized on its own.

    Attributes:
        text: The text.
        learned: Whether its tokens carry a label.
        special: Whether names of special tokens in the text, such as ``</s>``, stand for these tokens.
        data: The part of a special piece that comes from the example: names in it are plain text, so
            that no example can end its own response or open another round.
        joined: Whether the blank that the text begins with is the one between two words, which the
            tokenizers that put a blank before every text write by themselves.
        after: The name of the special token that stands before the piece; "" for other text.
        before: The same behind it.
    """

    text: str
    learned: bool
    special: bool = False
    data: str = ""
    joined: bool = False
    after: str = ""
    before: str = ""


class RefusedConversationError(UserError):
    """A template cannot write one conversation: the fault is that of the example, and others go on."""

    def describe(self, place: str) -> str:
        """The fault with the place of the example."""
        fault = self.faults[0]
        return fault if place in fault else f"{place}: {fault}"


class RewrittenConversationError(RefusedConversationError):
    """A template writes earlier messages anew when later ones follow: each answer can be learned in a sample alone."""


class Template(Protocol):
    """How the messages of a conversation are written down.

    Attributes:
        appends_eos: Whether a learned response has to be closed by the end-of-sequence token; False
            when the template writes an end mark of its own.
        special_tokens: Tokens that the template writes and the tokenizer must have.
    """

    appends_eos: bool
    special_tokens: tuple[str, ...]

    def render(self, conversation: Conversation) -> list[Piece]:
        """All pieces of a conversation, in order, for training.

        Raises:
            RefusedConversationError: The template cannot write this conversation.
        """
        ...

    def render_prompt(self, conversation: Conversation) -> list[Piece]:
        """What stands before the last answer, for generation; that answer is not looked at."""
        ...


def chosen_template(template: Template, conversation: Conversation) -> Template:
    """The template itself, or the one that it chooses for a conversation, and that one in turn."""
    while choose := getattr(template, "choose", None):
        template = choose(conversation)
    return template


class Slot(NamedTuple):
    """A part of a template's pattern: its own text, one of its special tokens, or a place for data.

    Attributes:
        kind: "text", "special" or "data".
        value: The text, the token, or the name of the data.
    """

    kind: str
    value: str


class PieceWriter:
    """Writes slots as pieces.

    Template text and data that follow one another are one piece, as the tokenizer would see them in the
    whole text; special tokens and what is learned are pieces of their own.
    """

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._texts: list[str] = []
        self._learned = False
        self._joined = False
        self._after = ""

    def write(self, kind: str, text: str, *, learned: bool) -> None:
        """Adds text of one of the kinds of `Slot`."""
        if kind == "special":
            self._flush(before=text)
            self._pieces.append(Piece(text, learned, True))
            self._after = text
            return
        if learned != self._learned:
            self._flush()
            self._learned = learned
        if not self._texts:  # a blank that an example's own text begins with is data, and stays
            self._joined = kind == "text" and text[:1] == " " and not self._after
        self._texts.append(text)

    def finish(self) -> list[Piece]:
        """The pieces written."""
        self._flush()
        return self._pieces

    def _flush(self, *, before: str = "") -> None:
        text = "".join(self._texts)
        self._texts.clear()
        if text:
            self._pieces.append(
                Piece(text, self._learned, joined=self._joined, after=self._after, before=before)
            )
            self._after = ""


def join_context(pieces: Sequence[Piece], *, has_answer: bool) -> list[Piece]:
    """The pieces with all that stands before the last answer as one text, in which earlier answers are not learned.

    Args:
        pieces: Of a conversation.
        has_answer: Whether the last learned run is its answer; otherwise all of it is context.
    """
    start = len(pieces)
    if has_answer:
        last = max((place for place, piece in enumerate(pieces) if piece.learned), default=start)
        start = last
        while start and pieces[start - 1].learned:
            start -= 1
    joined: list[Piece] = []
    for piece in pieces[:start]:
        piece = piece._replace(learned=False)
        if joined and not (piece.special or joined[-1].special):
            joined[-1] = joined[-1]._replace(text=joined[-1].text + piece.text, before=piece.before)
        else:
            joined.append(piece)
    return [*joined, *pieces[start:]]


def parse_pattern(pattern: str, names: Iterable[str], special_tokens: Sequence[str]) -> tuple[Slot, ...]:
    """Part a pattern such as ``<s>[INST] {content} [/INST]`` into slots.

    Args:
        pattern: The text.
        names: Names that stand in braces for data.
        special_tokens: What in the text is a special token.
    """
    braced = {f"{{{name}}}": name for name in names}
    slots = []
    for part in _splitter((*braced, *special_tokens)).split(pattern):
        if part in braced:
            slots.append(Slot("data", braced[part]))
        elif part:
            slots.append(Slot("special" if part in special_tokens else "text", part))
    return tuple(slots)


@functools.lru_cache(maxsize=64)
def _splitter(marks: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(marks, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if marks else re.compile("(?!)")
