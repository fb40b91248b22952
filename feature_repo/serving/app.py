"""The endpoints: what each request asks of a generation, and how its answer is written."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from feature_repo.serving import metrics, schema, search
from feature_repo.serving.batches import Batcher
from feature_repo.serving.border import FAILED, Border
from feature_repo.serving.direct import Direct
from feature_repo.serving.generation import Generation, Unfit
from feature_repo.serving.search import Ask, Found
from feature_repo.serving.settings import Settings
from feature_repo.serving.store import Guard, Histories, History, Unavailable, open_reader
from feature_repo.serving.watch import Watch

LOG = logging.getLogger("llmemb.serving")
PAGE = Path(__file__).parent / "page.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
SWITCH_S = 0.0005
BEARER = [Depends(HTTPBearer(auto_error=False))]
"""For OpenAPI alone: the border checks the token before any endpoint."""


class Service:
    """What the endpoints share."""

    def __init__(self, settings: Settings, lake: Path | None = None) -> None:
        self.settings = settings
        self.reader, looker = open_reader(settings, lake), open_reader(settings, lake)
        # one connection of SQLite serves one thread
        self.guard = Guard(settings, 1 if self.reader.transport.config.online_store.type == "sqlite" else 8)  # type: ignore[attr-defined]
        self.histories = Histories(settings, self.reader, self.guard)
        self.watch = Watch(settings, looker)
        light = functools.partial(search.is_light, settings=settings)
        self.batcher = Batcher(self.work, light, settings.window_ms / 1000, settings.batch)

    def work(self, asks: Sequence[Ask]) -> list[Found | Exception]:
        """One batch."""
        metrics.BATCH.observe(len(asks))
        return search.answer(asks, self.settings)

    def generation(self) -> Generation:
        """What serves now; a request takes it once. Raises Unready before there is any."""
        if self.watch.current is None:
            raise Unready
        return self.watch.current

    async def recommend(self, body: schema.Recommend) -> dict[str, Any]:
        """The answer of /recommend."""
        made, most = self.generation(), self.settings.most
        check_k(body.k, most)
        if body.user_id is None:
            history = History(item_ids=body.history or [])
        else:
            history = await self.histories.of(body.user_id)
        row_H = made.rows_of(history.item_ids)
        row_L = row_H[row_H >= 0]
        seen, fallback = row_L.tolist(), history.fallback
        if made.recommender is None:
            fallback, row_L = "no_recommender", row_L[:0]
        elif not len(row_L):
            fallback = fallback or "no_known_items"
        hidden = made.withheld_rows.union(seen if body.exclude_seen else (), made.rows_of(body.exclude).tolist()) - {-1}
        ask = Ask(
            generation=made,
            row_L=row_L[-made.max_len :],
            user=True,
            k=body.k,
            hidden=hidden,
            filters=frozen(body.filters),
            explain=body.explain,
        )
        found = await self.batcher.ask(ask)
        if fallback:
            metrics.FALLBACKS.labels(fallback).inc()
        items = written(made, found, body.attributes)
        return {"items": items, "history_items": len(row_L), **said(made, fallback)}

    async def similar(self, body: schema.Similar) -> dict[str, Any]:
        """The answer of /similar."""
        made = self.generation()
        check_k(body.k, self.settings.most)
        row_N, filters = made.rows_of(body.item_ids), frozen(body.filters)
        known = {item_id: int(row) for item_id, row in zip(body.item_ids, row_N, strict=True) if row >= 0}
        asks = [
            Ask(generation=made, row_L=np.array([row]), user=False, k=body.k, hidden=made.withheld_rows | {row}, filters=filters)
            for row in known.values()
        ]
        answers = await asyncio.gather(*(self.batcher.ask(ask) for ask in asks))
        neighbours = {item_id: written(made, found, body.attributes) for item_id, found in zip(known, answers, strict=True)}
        missing = [item_id for item_id, row in zip(body.item_ids, row_N, strict=True) if row < 0]
        return {"neighbours": neighbours, "missing": missing, **said(made, None)}

    async def vectors(self, body: schema.Vectors) -> dict[str, Any]:
        """The answer of /vectors."""
        made = self.generation()
        row_N = made.rows_of(body.item_ids)
        vector_ND = made.index.vector_ND[row_N[row_N >= 0]]
        found = [item_id for item_id, row in zip(body.item_ids, row_N, strict=True) if row >= 0]
        absent = [item_id for item_id, row in zip(body.item_ids, row_N, strict=True) if row < 0]
        deleted, fallback = set(made.withheld.intersection(absent)), None
        if unknown := [item_id for item_id in absent if item_id not in deleted]:
            try:
                deleted |= await self.guard.read(self.reader.forgotten, unknown)
            except Unavailable:
                fallback = "store_down"
                metrics.FALLBACKS.labels(fallback).inc()
        raw = vector_ND.astype("<f4")
        numbers = raw.tolist() if body.encoding == "list" else [base64.b64encode(row.tobytes()).decode() for row in raw]
        told = {"attributes": [chosen(made, int(row), body.attributes) for row in row_N[row_N >= 0]]} if body.attributes else {}
        return {
            "item_ids": found,
            "vectors": numbers,
            "width": made.pointer.width,
            "missing": [item_id for item_id in absent if item_id not in deleted],
            "deleted": [item_id for item_id in absent if item_id in deleted],
            **told,
            **said(made, fallback),
        }


class Unready(Exception):
    """No generation is loaded yet."""


def check_k(k: int, most: int) -> None:
    """Raises Unfit for more than is answered at once."""
    if k > most:
        raise Unfit(f"k is {k}: at most {most} items are answered at once")


def frozen(filters: dict[str, list[str]]) -> search.Filters:
    """A filter that can be remembered."""
    return tuple(sorted((name, tuple(sorted(values))) for name, values in filters.items()))


def said(made: Generation, fallback: str | None) -> dict[str, Any]:
    """What every answer says of where it comes from."""
    pointer = made.pointer
    return {
        "space_id": pointer.space_id,
        "recommender_id": pointer.recommender_id,
        "ds": pointer.ds,
        "sequence": pointer.sequence,
        "age_s": round(pointer.age.total_seconds(), 1),
        "fallback": fallback,
    }


def written(made: Generation, found: Found, attributes: Sequence[str]) -> list[dict[str, Any]]:
    """Items of an answer."""
    items: list[dict[str, Any]] = []
    for number, (row, score) in enumerate(zip(found.row_K.tolist(), found.score_K.tolist(), strict=True)):
        item: dict[str, Any] = {"item_id": made.index.id_of(row), "score": round(score, 6)}
        if found.shares:
            item["parts"] = found.shares[number]
        if attributes:
            item["attributes"] = chosen(made, row, attributes)
        items.append(item)
    return items


def chosen(made: Generation, row: int, names: Sequence[str]) -> dict[str, str]:
    """Some attributes of an item, those that it has; `*` names all."""
    known = made.index.attributes_of(row)
    return known if "*" in names else {name: known[name] for name in names if name in known}


def make_app(settings: Settings, lake: Path | None = None) -> Any:
    """The ASGI application; its generation loads once it runs."""
    torch.set_num_threads(1)
    # the event loop and the numeric thread share one interpreter: by default each may keep it for 5 ms
    sys.setswitchinterval(SWITCH_S)
    service = Service(settings, lake)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.open()
        service.watch.start()
        yield
        service.watch.stop()
        service.batcher.close()
        service.guard.close()
        await service.histories.close()

    app = FastAPI(
        title="LLMEmb serving",
        description="Recommendations, neighbours and item vectors of the space that serves. See docs/serving.md.",
        version="1",
        lifespan=lifespan,
    )
    add_errors(app)
    add_endpoints(app, service)
    add_probes(app, service)
    if settings.page:
        add_page(app, service)
    # what is nobody's fault but ours goes on to the border, which logs where
    refusals = {kind: app.exception_handlers[kind] for kind in (Unfit, Unready)}
    direct = Direct(app, {"/recommend": (schema.Recommend, service.recommend), "/similar": (schema.Similar, service.similar),
                          "/vectors": (schema.Vectors, service.vectors)}, refusals)  # fmt: skip
    bordered = Border(direct, settings)
    bordered.service = service  # type: ignore[attr-defined]  # for tests
    return bordered


def add_endpoints(app: FastAPI, service: Service) -> None:
    """What an SRS asks."""

    @app.post("/recommend", responses=schema.answers(schema.RECOMMENDED), dependencies=BEARER)
    async def recommend(body: schema.Recommend) -> Response:
        """The next items of a user, best first; what is popular where nothing is known of them, and `fallback` says why."""
        return JSONResponse(await service.recommend(body))

    @app.post("/similar", responses=schema.answers(schema.NEIGHBOURS), dependencies=BEARER)
    async def similar(body: schema.Similar) -> Response:
        """The nearest other items of some items, by dot product."""
        return JSONResponse(await service.similar(body))

    @app.post("/vectors", responses=schema.answers(schema.VECTORS), dependencies=BEARER)
    async def vectors(body: schema.Vectors) -> Response:
        """Vectors of some items, all of one space; every id asked for is in exactly one of item_ids, missing and deleted."""
        return JSONResponse(await service.vectors(body))


def add_probes(app: FastAPI, service: Service) -> None:
    """What a platform asks."""

    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether the process lives."""
        return PlainTextResponse("ok")

    @app.get("/readyz")
    async def readyz() -> Response:
        """Whether it can answer: a generation is loaded. A store that is down does not matter."""
        made = service.watch.current
        if made is None:
            return JSONResponse({"error": Unready.__doc__}, 503, {"Retry-After": "1"})
        return JSONResponse({"items": len(made.index) - len(made.withheld_rows), **said(made, None)})

    @app.get("/metrics")
    async def prometheus() -> Response:
        """For Prometheus."""
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4")


def add_page(app: FastAPI, service: Service) -> None:
    """The page for people, and what it asks beside the endpoints."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(), headers={"Content-Security-Policy": POLICY})

    @app.get("/page/users", include_in_schema=False)
    async def users() -> Response:
        return JSONResponse({"users": [user for user in service.settings.page_users.split(",") if user]})

    @app.post("/page/history", include_in_schema=False)
    async def history(body: schema.Recommend) -> Response:
        made = service.generation()
        known = (await service.histories.of(body.user_id or "")).item_ids
        rows = [(item_id, int(row)) for item_id, row in zip(known, made.rows_of(known), strict=True)]
        items = [
            {"item_id": item_id, "attributes": made.index.attributes_of(row) if row >= 0 else {}}
            for item_id, row in reversed(rows[-50:])
        ]
        return JSONResponse({"items": items})


def add_errors(app: FastAPI) -> None:
    """Every refusal is {"error": what is wrong and what to do}, without repeating ids."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        if "json" not in request.headers.get("content-type", ""):
            return JSONResponse({"error": "send the body with the header `Content-Type: application/json`"}, 415)
        found = error.errors()[:5]
        if found[0]["type"] == "json_invalid":
            why = f"character {found[0]['loc'][-1]}: {found[0]['ctx']['error']}"
            return JSONResponse({"error": f"the body is no JSON, see {why} (see /docs)"}, 422)
        said_of = [f"{'.'.join(str(part) for part in one['loc'][:3]) or 'body'}: {one['msg']}" for one in found]
        return JSONResponse({"error": "; ".join(said_of) + " (see /docs)"}, 422)

    @app.exception_handler(HTTPException)
    async def told(request: Request, error: HTTPException) -> Response:
        # a body that is no text at all, a path that is not there, another method
        known = {
            400: "the body is no JSON in UTF-8, or a number or nesting in it has no end",
            404: "no such path",
            405: "another method",
        }
        return JSONResponse({"error": f"{known.get(error.status_code, error.detail)} (see /docs)"}, error.status_code)

    @app.exception_handler(Unfit)
    async def unfit(request: Request, error: Unfit) -> Response:
        return JSONResponse({"error": str(error)}, 422)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": FAILED}, 500)

    @app.exception_handler(Unready)
    async def unready(request: Request, error: Unready) -> Response:
        return JSONResponse({"error": "nothing is served yet: has publish run?"}, 503, {"Retry-After": "1"})
