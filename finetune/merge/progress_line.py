"""One line on a terminal that says how far a merge is."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

_INTERVAL_SECONDS = 0.2


class ProgressLine:
    """Shows bytes done and bytes per second on stderr, a few times per second; nothing where it is no terminal."""

    def __init__(self, num_bytes: int):
        """Takes the number of bytes in all."""
        self._num_bytes = num_bytes
        self._done = 0
        self._began = time.monotonic()
        self._shown = self._began
        self._lock = threading.Lock()
        self._is_terminal = sys.stderr.isatty()

    def __enter__(self) -> ProgressLine:
        """Starts with nothing shown."""
        return self

    def advance(self, num_bytes: int) -> None:
        """Adds bytes; from any thread."""
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if not self._is_terminal or now - self._shown < _INTERVAL_SECONDS:
                return
            self._shown = now
            rate = self._done / max(now - self._began, 1e-9)
            share = 100 * self._done // max(self._num_bytes, 1)
            sys.stderr.write(
                f"\rmerging: {self._done / 1e9:.2f} of {self._num_bytes / 1e9:.2f} GB ({share}%), "
                f"{rate / 1e6:.0f} MB/s\033[K"
            )
            sys.stderr.flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the line away."""
        if self._is_terminal:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
