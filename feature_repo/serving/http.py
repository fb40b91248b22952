"""uvicorn's HTTP/1.1, which hangs up on callers that never finish the head of a request."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_S = 10.0
"""Seconds from connecting to the end of the first request's head."""


class Patient(HttpToolsProtocol):
    """uvicorn limits the time between requests, not that before the first one."""

    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begins to wait."""
        super().connection_made(transport)
        self.head_timer = self.loop.call_later(HEAD_S, transport.close)

    def on_headers_complete(self) -> None:
        """The head is here."""
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        if self.head_timer is not None:
            self.head_timer.cancel()
        super().connection_lost(exc)
