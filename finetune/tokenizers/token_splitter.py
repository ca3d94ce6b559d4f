"""Text cut at the names of tokens: what is one id, and what the vocabulary has to spell.

The rules are those of `AddedVocabulary` in Hugging Face's `tokenizers`: names that are looked for as they stand
come first, then the rest is normalised and the others are looked for. Of several names that begin at one place
the longest counts.

Where blanks are normalised to SentencePiece's sign for them (\u2581), a name of the second kind is met in either
spelling, and no such blank belongs to it: only those of other kinds, such as ends of lines, do.

Where texts are normalised by a blank in front (SentencePiece's "legacy" form), that happens to every stretch
between names of the first kind, and to the names of the second kind as well: these are then met only behind a
blank, be it the one in front.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from finetune.tokenizers.added_tokens import AddedToken

# Unicode's White_Space; Python's own \s has four control characters more.
_BLANKS = "[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*"
_BLANKS_BEFORE, _BLANKS_BEHIND = re.compile(_BLANKS + r"\Z"), re.compile(_BLANKS)
_JOINERS, _CIRCLED = (
    "\u200c\u200d",
    re.compile("[\u24b6-\u24e9\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]"),
)
_MAX_FIRST_CHARACTERS = 4
_MAX_BLANKS = 6

BLANK_SIGN = "\u2581"
"""What SentencePiece writes for a blank."""
PREFIXES = (" ", BLANK_SIGN)
"""A first stretch that begins so, with a blank or with SentencePiece's sign for it, gets no blank in front."""


class Stretch(NamedTuple):
    """A part of a text.

    Attributes:
        text: What has to be spelled; "" for a token.
        token: Its id; -1 for text.
        inner: Whether the vocabulary must not put a blank in front.
    """

    text: str
    token: int = -1
    inner: bool = False


class TokenSplitter:
    """Finds tokens in texts.

    Args:
        tokens: What is looked for.
        ids: Their ids by name.
        normalize: What happens to text before it is spelled.
        marks_blanks: Whether that turns blanks into SentencePiece's sign for them.
        prefixed: Whether that includes a blank in front of every stretch.
        first_only: Whether the vocabulary puts a blank in front of the first stretch only.
        even_blanks: Whether it does where that begins with a blank.
    """

    def __init__(
        self,
        tokens: Iterable[AddedToken],
        ids: Mapping[str, int],
        *,
        normalize: Callable[[str], str] | None = None,
        marks_blanks: bool = False,
        prefixed: bool = False,
        first_only: bool = False,
        even_blanks: bool = False,
    ):
        listed = [token for token in tokens if token.content and token.behind is not None]
        self._ids, self._normalize = ids, normalize
        self._prefixed, self._first_only = prefixed, first_only
        self._unblanked = () if even_blanks else PREFIXES
        marks = marks_blanks or prefixed
        self._plain = _Finder([token for token in listed if not token.normalized])
        self._normalized = _Finder(
            [token for token in listed if token.normalized],
            normalize=normalize,
            marks_blanks=marks,
            prefixed=prefixed,
        )
        self._may_change = normalize is not None and any(token.normalized for token in listed)
        forms = {
            form: token
            for token in listed
            for form in (_blank_forms(token.content) if token.normalized and marks else [token.content])
        }
        self._starts = {form[0] for form in forms}
        self._any = re.compile(_alternation(forms))

    def may_split(self, text: str) -> bool:
        """Whether the text names a token at all; False for nearly all texts, and fast."""
        if self._normalize is not None and self._may_change and not text.isascii():
            return self._names(text) or self._names(self._normalize(text))
        return self._names(text)

    def _names(self, text: str) -> bool:
        starts = self._starts
        if len(starts) <= _MAX_FIRST_CHARACTERS:
            for start in starts:
                if start in text:
                    break
            else:
                return False
        return self._any.search(text) is not None

    def split(self, text: str, *, inner: bool = False) -> Iterator[Stretch]:
        """The parts of a text, none of them empty; text is normalised.

        Args:
            text: Any text.
            inner: Whether it follows a token.
        """
        is_first = not inner
        for part, token in self._plain.cut(text):
            if token is not None:
                yield Stretch("", self._ids[token.content])
                is_first = token.restarts
            else:
                is_inner = self._first_only and (not is_first or part.startswith(self._unblanked))
                yield from self._split_normalized(part, inner=is_inner)
                is_first = False

    def _split_normalized(self, text: str, *, inner: bool) -> Iterator[Stretch]:
        if self._normalize is not None:
            text = self._normalize(text)
        parts = list(self._normalized.cut(f" {text}" if self._prefixed else text))
        if len(parts) == 1 and parts[0][1] is None:
            yield Stretch(text, inner=inner)
            return
        for part, token in parts:
            if token is not None:
                yield Stretch("", self._ids[token.content])
            else:
                yield Stretch(part, inner=inner or self._prefixed)
            inner = inner or self._first_only


class _Finder:
    """Cuts text at some names."""

    def __init__(
        self,
        tokens: list[AddedToken],
        *,
        normalize: Callable[[str], str] | None = None,
        marks_blanks: bool = False,
        prefixed: bool = False,
    ):
        self._marks_blanks = marks_blanks
        self._tokens = {
            self._as_searched(normalize(token.content) if normalize else token.content): token
            for token in tokens
        }
        pattern = _alternation(self._tokens)
        self._pattern = re.compile(rf"{BLANK_SIGN}({pattern})" if prefixed else f"({pattern})")

    def _as_searched(self, text: str) -> str:
        """The text in which names are looked for; of the same length."""
        return text.replace(" ", BLANK_SIGN) if self._marks_blanks else text

    def cut(self, text: str) -> Iterator[tuple[str, AddedToken | None]]:
        start = 0
        if self._tokens:
            searched = self._as_searched(text)
            for match in self._pattern.finditer(searched):
                token = self._tokens[match.group(1)]
                left, right = match.span()
                # A name may lie in the blanks that belong to the token before it: both count, as in the library.
                if token.single_word and _touches_word(searched, left, right):
                    continue
                if token.lstrip and (blanks := _BLANKS_BEFORE.search(searched, start, left)):
                    left = blanks.start()
                if token.rstrip and (blanks := _BLANKS_BEHIND.match(searched, right)):
                    right = blanks.end()
                if left > start:
                    yield text[start:left], None
                yield "", token
                start = right
        if start < len(text):
            yield text[start:], None


def _blank_forms(name: str) -> list[str]:
    """A name with each of its blanks in both spellings; in all combinations where they are few."""
    blanks = [place for place, character in enumerate(name) if character in PREFIXES]
    forms = [name]
    for place in blanks[:_MAX_BLANKS]:
        forms = [f"{form[:place]}{blank}{form[place + 1 :]}" for form in forms for blank in PREFIXES]
    return forms


def _touches_word(text: str, left: int, right: int) -> bool:
    return (left > 0 and _is_of_word(text[left - 1])) or (right < len(text) and _is_of_word(text[right]))


def _is_of_word(character: str) -> bool:
    """A word character of Unicode, which has marks and joiners, and no numbers but digits and letters; Python's ``w`` class differs."""
    category = unicodedata.category(character)
    is_usual = category[0] in "LM" or category in ("Nd", "Nl", "Pc")
    return is_usual or character in _JOINERS or _CIRCLED.match(character) is not None


def _alternation(tokens: Mapping[str, AddedToken]) -> str:
    """A regular expression for names, the longest first."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return "|".join(
        (f"(?<={re.escape(behind)})" if (behind := tokens[name].behind) else "") + re.escape(name)
        for name in longest_first
    ) or "(?!)"  # fmt: skip
