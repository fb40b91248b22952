"""What stands between a caller and the endpoints: token, number of requests at once, size and pace of bodies, time, metrics."""

from __future__ import annotations

import asyncio
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


class Refusal(Exception):
    """A request that no endpoint sees."""

    def __init__(self, status: int, error: str, *headers: tuple[str, str]) -> None:
        super().__init__(error)
        self.status, self.error, self.headers = status, error, headers


class Border:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.in_work = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in (*ENDPOINTS, *OPEN) else "other"
        started, outcome = time.perf_counter(), 499

        async def told(message: Message) -> None:
            nonlocal outcome
            if message["type"] == "http.response.start":
                outcome = message["status"]
            await send(message)

        try:
            if path in OPEN:
                await self.app(scope, receive, told)
            else:
                started = await self.admitted(scope, receive, told)
        except Refusal as refusal:
            await refuse(refusal, told)
        except ConnectionResetError:
            pass
        except Exception as error:
            # the message may name what a caller asked for: the log tells the place alone
            LOG.error("%s failed: %s at %s", path, type(error).__name__, traceback.format_tb(error.__traceback__)[-1].strip())
            if outcome == 499:
                await refuse(Refusal(500, "the answer failed: the service's log says where"), told)
        finally:
            metrics.REQUESTS.labels(path, str(outcome)).inc()
            if path in ENDPOINTS:
                metrics.SECONDS.labels(path).observe(time.perf_counter() - started)

    async def admitted(self, scope: Scope, receive: Receive, send: Send) -> float:
        """Checks a request, reads it whole, and lets it in; returns when it was read. Raises Refusal."""
        self.check_token(scope)
        if scope["path"] not in ENDPOINTS:
            await self.app(scope, receive, send)
            return time.perf_counter()
        body = await self.body(scope, receive)
        started = time.perf_counter()
        if self.in_work >= self.settings.waiting:
            raise busy(f"{self.in_work} requests are in work already")
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
        return started

    def check_token(self, scope: Scope) -> None:
        """Raises Refusal for a caller without the token."""
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if self.settings.token and not hmac.compare_digest(given, f"Bearer {self.settings.token}".encode()):
            raise Refusal(401, "send the header `Authorization: Bearer TOKEN`", ("WWW-Authenticate", "Bearer"))

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
    return Refusal(413, f"the body is larger than {most:,} bytes: ask for less at once", ("Connection", "close"))


def busy(why: str) -> Refusal:
    """More than can be kept up with."""
    return Refusal(503, f"{why}: ask again in a second, or add workers", ("Retry-After", "1"))


async def refuse(refusal: Refusal, send: Send) -> None:
    """Sends a refusal, in the form of all errors."""
    content = json.dumps({"error": refusal.error}).encode()
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(content))), *refusal.headers]
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": content})


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
