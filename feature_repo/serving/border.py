"""What stands between a caller and the endpoints: token, number of requests at once, size and pace of bodies, time, metrics."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
import traceback
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feature_repo.serving import metrics
from feature_repo.serving.settings import Settings

LOG = logging.getLogger("llmemb.serving")
ENDPOINTS = ("/recommend", "/similar", "/vectors")
OPEN = ("/healthz", "/readyz", "/metrics")
LINGER_S = 30.0
"""Seconds for which what is left of a refused request's body is read and dropped."""
FAILED = "the answer failed: the service's log says where"
COMING = 4
"""Requests that may be on their way at once, times those that may be in work: bounds the memory of bodies."""


class Refusal(Exception):
    """A request that no endpoint sees."""

    def __init__(self, status: int, error: str, *headers: tuple[str, str], unread: bool = False) -> None:
        super().__init__(error)
        self.status, self.error, self.headers = status, error, headers
        self.unread = unread
        """Whether the caller may still be sending its body."""


class Border:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.in_work = self.coming = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in (*ENDPOINTS, *OPEN) else "other"
        outcome = 499

        async def told(message: Message) -> None:
            nonlocal outcome
            if message["type"] == "http.response.start":
                outcome = message["status"]
            await send(message)

        try:
            if path in OPEN:
                await self.app(scope, receive, told)
            else:
                await self.admitted(path, scope, receive, told)
        except Refusal as refusal:
            if outcome == 499:  # else the answer had begun, and is cut off
                await refuse(refusal, receive, told)
        except ConnectionResetError:
            pass
        except Exception as error:
            # the message may name what a caller asked for: the log tells the place alone
            LOG.error("%s failed: %s at %s", path, type(error).__name__, traceback.format_tb(error.__traceback__)[-1].strip())
            if outcome == 499:
                await refuse(Refusal(500, FAILED), receive, told)
        finally:
            metrics.answered(path, str(outcome)).inc()

    async def admitted(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        """Checks a request, reads it whole, and lets it in. Raises Refusal."""
        self.check_token(scope)
        if self.coming >= COMING * self.settings.waiting:
            raise busy(f"{self.coming} requests are being sent already", unread=True)
        self.coming += 1
        try:
            body = await self.body(scope, receive)
        finally:
            self.coming -= 1
        if self.in_work >= self.settings.waiting:
            raise busy(f"{self.in_work} requests are in work already")
        started = time.perf_counter()
        self.in_work += 1
        metrics.IN_WORK.inc()
        try:
            async with asyncio.timeout(self.settings.request_s):
                await self.app(scope, replay(body, receive), send)
        except TimeoutError:
            raise busy(f"no answer within {self.settings.request_s} s") from None
        finally:
            self.in_work -= 1
            metrics.IN_WORK.dec()
            if path in ENDPOINTS:
                metrics.seconds(path).observe(time.perf_counter() - started)

    def check_token(self, scope: Scope) -> None:
        """Raises Refusal for a caller without the token."""
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if self.settings.token and not hmac.compare_digest(given, f"Bearer {self.settings.token}".encode()):
            raise Refusal(401, "send the header `Authorization: Bearer TOKEN`", ("WWW-Authenticate", "Bearer"), unread=True)

    async def body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises Refusal where it is too large or comes too slowly."""
        most = self.settings.body_bytes
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length) > most:
            raise too_large(most)
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.settings.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise too_large(most)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(
                408, f"the body did not come within {self.settings.body_s} s: send it at once", ("Connection", "close")
            ) from None


def too_large(most: int) -> Refusal:
    """A body without bounds."""
    return Refusal(413, f"the body is larger than {most:,} bytes: ask for less at once", ("Connection", "close"), unread=True)


def busy(why: str, unread: bool = False) -> Refusal:
    """More than can be kept up with."""
    return Refusal(503, f"{why}: ask again in a second, or add workers", ("Retry-After", "1"), unread=unread)


async def refuse(refusal: Refusal, receive: Receive, send: Send) -> None:
    """Sends a refusal, in the form of all errors."""
    content = json.dumps({"error": refusal.error}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(content))), *refusal.headers]
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": content, "more_body": refusal.unread})
    if refusal.unread:
        # most callers send their whole body before they read: hung up on, they would never see the answer
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})


def replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then what else comes."""
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
