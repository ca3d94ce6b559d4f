"""Texts that end an answer, found across the borders of the stretches in which it comes."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string.

    An end that may be the beginning of one is held back until more text decides it.

    Args:
        stops: The texts, none empty.

    Attributes:
        is_met: Whether one of them was found; nothing is let through any more.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.is_met = False

    def push(self, text: str) -> str:
        """Takes a stretch of text; returns what is certain to belong to the answer."""
        if self.is_met or not text:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        # The one that is complete first counts, of those the longest: so it does not matter how the text is cut.
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_met, self._held = True, ""
            return text[: min(found)[1]]
        num_held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """What was held back, where nothing follows it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop string, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)
