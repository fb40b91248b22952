"""The short way of a request that is in order: its body parsed and its answer written without the web framework's steps.

FastAPI's routing, dependencies and validation took two fifths of the event loop's time. It still tells OpenAPI and words every
refusal of a body: what is not in order goes its way.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Answer = Callable[[Any], Awaitable[dict[str, Any]]]
WRITTEN = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
JSON = (b"application/json", b"application/json; charset=utf-8")


class Direct:
    """ASGI application around FastAPI's; expects bodies that come in one piece, as the border reads them."""

    def __init__(
        self, app: ASGIApp, endpoints: Mapping[str, tuple[type[BaseModel], Answer]], refusals: Mapping[Any, Any]
    ) -> None:
        """`refusals` are what words each kind of error that an answer may raise."""
        self.app, self.endpoints, self.refusals = app, endpoints, refusals
        self.told = tuple(refusals)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        known = self.endpoints.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if known is None or not any(name == b"content-type" and value.lower() in JSON for name, value in scope["headers"]):
            await self.app(scope, receive, send)
            return
        message = await receive()
        model, answer = known
        try:
            asked = model.model_validate_json(message.get("body", b""))
        except ValidationError:
            await self.app(scope, first(message, receive), send)
            return
        try:
            content = WRITTEN.encode(await answer(asked)).encode()
        except self.told as error:
            refused: Response = await self.refusals[type(error)](Request(scope), error)
            await refused(scope, receive, send)
            return
        headers = [(b"content-length", str(len(content)).encode()), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})


def first(message: Message, receive: Receive) -> Receive:
    """Gives a message that was read already, then what else comes."""
    read = [message]

    async def again() -> Message:
        return read.pop() if read else await receive()

    return again
