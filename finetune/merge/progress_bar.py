"""How far a merge is, on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def show_progress(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes done and bytes per second on stderr, taken away at the end; nothing where it is no terminal.

    Args:
        num_bytes: To be written in all.

    Yields:
        To be called, from any thread, with the number of bytes written since the last call.
    """
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("merging", *columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=num_bytes)
        yield lambda count: progress.advance(task, count)
