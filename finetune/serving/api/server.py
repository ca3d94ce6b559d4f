"""The process of the server: it ends when told to, behind the answers that it has begun."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from finetune.machine.screen import show_line
from finetune.serving.api.gate import Gate
from finetune.serving.batching.engine import Engine
from finetune.serving.web.connections import TimedProtocol

_MAX_CONNECTIONS = 1000
_SECONDS_TO_SEND = 5
"""For what is left in the buffers at the end."""


class GracefulServer(uvicorn.Server):
    """A server that answers 503 for a while before it ends.

    uvicorn would stop listening at once, so that new requests meet no answer at all.

    Args:
        gate: The application.
        engine: Decodes.
        drain_seconds: Longest time for the answers that have begun.

    Attributes:
        has_failed: Whether it ended because the model does not run any more.
    """

    def __init__(self, gate: Gate, engine: Engine, *, drain_seconds: float):
        super().__init__(
            uvicorn.Config(
                gate,
                log_level="warning",
                http=TimedProtocol,
                ws="none",
                lifespan="off",
                limit_concurrency=_MAX_CONNECTIONS,
                timeout_graceful_shutdown=_SECONDS_TO_SEND,
                proxy_headers=gate.access.is_behind_proxy,
                server_header=False,
            )
        )
        self.has_failed = False
        self._gate, self._engine, self._drain_seconds = gate, engine, drain_seconds
        self._num_signals = 0
        self._end: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At the first signal the end begins, at the second it is there."""
        self._num_signals += 1
        if self._num_signals > 1:
            self._end = 0.0

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are heard here alone; uvicorn would send them again behind the end."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end now."""
        if self._engine.is_closed and not self._num_signals:
            self.has_failed = True
            return True
        if self._num_signals and not self._gate.is_closing:
            self._gate.is_closing = True
            number = self._gate.num_open
            show_line(f"stopping: {number} request{'s are' if number > 1 else ' is'} finished first")
            self._end = self._end if self._end is not None else time.monotonic() + self._drain_seconds
        if self._end is not None and (not self._gate.num_open or time.monotonic() >= self._end):
            self._engine.close(timeout=0)  # tells those that are not finished
            return True
        return bool(await super().on_tick(counter))


def serve_until_stopped(gate: Gate, engine: Engine, listener: socket.socket, *, drain_seconds: float) -> bool:
    """Serves on an open port until the process is stopped; whether that was the end that was wished."""
    server = GracefulServer(gate, engine, drain_seconds=drain_seconds)
    engine.start()
    try:
        server.run(sockets=[listener])
    finally:
        engine.close(timeout=_SECONDS_TO_SEND)
    return not server.has_failed
