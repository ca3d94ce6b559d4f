"""The bar of a merge, on a terminal and elsewhere."""

from __future__ import annotations

import io
import sys
import threading

from finetune.merge.progress_bar import show_progress


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_bytes_and_is_clean_afterwards(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with show_progress(4_000_000) as advance:
        threads = [threading.Thread(target=advance, args=(1_000_000,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    text = screen.getvalue()
    assert "merging" in text and "4.0/4.0 MB" in text
    assert text.endswith("\x1b[2K"), "the line is taken away"


def test_a_pipe_gets_nothing(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with show_progress(10) as advance:
        advance(10)
    assert pipe.getvalue() == ""
