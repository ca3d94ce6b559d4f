"""Connections to the chat page that end in time: without a request, and with the page."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

FIRST_REQUEST_SECONDS = 10.0


class ImpatientProtocol(H11Protocol):
    """uvicorn's protocol, which would wait for ever for a first request, and at the end for browsers to go."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait."""
        super().connection_made(transport)
        self.loop.call_later(FIRST_REQUEST_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        """Closes a connection of which no whole request head has come; none has a cycle then."""
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()

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
