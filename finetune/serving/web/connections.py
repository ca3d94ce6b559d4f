"""Connections that end in time: without a request, and with the server."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_HEAD_SECONDS = 10.0


class TimedProtocol(H11Protocol):
    """uvicorn's protocol, which would wait for ever for the rest of a request's head.

    The first request must begin with the connection, later ones have the time that a connection is kept alive.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Begins to wait at the first part of a head that is not whole, and ends it with the last."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._end_waiting()
        elif self._head_timer is None:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the waiting, too."""
        self._end_waiting()
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(REQUEST_HEAD_SECONDS, self._close)

    def _end_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class ImpatientProtocol(TimedProtocol):
    """The protocol of a page, which would wait for browsers to go at the end."""

    def shutdown(self) -> None:
        """Ends at once: a page that is open in a browser always has a stream that does not end by itself.

        Whoever writes the answer is told that the browser has gone, and stops; uvicorn would cancel it after some
        seconds and print the traceback of that.
        """
        if self.cycle is None or self.cycle.response_complete:
            super().shutdown()
            return
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        self.transport.close()
