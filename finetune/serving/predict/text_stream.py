"""Text out of tokens that come one by one, never half a character.

A character outside the vocabulary is several byte tokens, and until the last of them is there the decoded
text ends in replacement marks: such an end is held back. Only a window of the newest tokens is decoded
again at every step; a few older ones stand before it, because a tokenizer writes the first token of a text
in another way than the same token within it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

_REPLACEMENT = "\ufffd"
_NUM_BEFORE = 6


class TextStream:
    """Turns tokens into text as they come.

    Args:
        decode: Ids to text, without special tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []
        self._before = 0
        self._start = 0

    def push(self, ids: Iterable[int]) -> str:
        """Takes tokens; returns the text that they complete."""
        self._ids.extend(ids)
        return self._take(whole=False)

    def finish(self) -> str:
        """What is left, an incomplete character as a replacement mark."""
        return self._take(whole=True)

    def _take(self, *, whole: bool) -> str:
        known = self._decode(self._ids[self._before : self._start])
        text = self._decode(self._ids[self._before :])
        if not whole and (text.endswith(_REPLACEMENT) or len(text) <= len(known)):
            return ""
        self._start = len(self._ids)
        self._before = self._window_start()
        return text[len(known) :]

    def _window_start(self) -> int:
        """Where the window may begin: at a token that begins a character."""
        start = max(self._start - _NUM_BEFORE, 0)
        while start > self._before and self._decode(self._ids[start : self._start]).startswith(_REPLACEMENT):
            start -= 1
        return start
