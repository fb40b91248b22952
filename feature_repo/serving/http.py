"""uvicorn's HTTP/1.1, which hangs up on callers that never finish the head of a request, or never take their answer."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 10.0
"""Seconds from connecting to the end of the first request's head."""
HEAD_BYTES = 65_536
"""Longest head of a request."""
TOO_LONG = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b'content-length: 63\r\n\r\n{"error": "the head of the request is longer than 65536 bytes"}'
)


class Patient(HttpToolsProtocol):
    """uvicorn stops its clock at a first byte, has none before the first request, and no limit of a head's length."""

    clock: asyncio.TimerHandle | None = None
    in_head = False
    head = 0

    def wait(self, seconds: float) -> None:
        """Hangs up after some seconds, unless a whole head comes."""
        self.stop()
        # not `close`, which would wait for ever for a caller that does not read
        self.clock = self.loop.call_later(seconds, self.transport.abort)

    def stop(self) -> None:
        """Stops the clock."""
        if self.clock is not None:
            self.clock.cancel()
            self.clock = None

    def connection_made(self, transport: Any) -> None:
        """Begins to wait."""
        super().connection_made(transport)
        self.wait(HEAD_S)

    def data_received(self, data: bytes) -> None:
        """Some bytes; those of a head that does not end are counted."""
        began = self.in_head
        super().data_received(data)
        self.head = self.head + len(data) if began and self.in_head else 0
        if self.head > HEAD_BYTES and not self.transport.is_closing():
            self.transport.write(TOO_LONG)
            self.transport.close()

    def on_message_begin(self) -> None:
        """A head begins."""
        self.in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is here."""
        self.in_head = False
        self.stop()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """The next request may come, or what is left of this one's body, which nobody reads."""
        super().on_response_complete()
        self.wait(self.timeout_keep_alive)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        self.stop()
        super().connection_lost(exc)
