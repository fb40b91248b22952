"""A small lake with the tables and manifests of a night, and the laws that every page of the report keeps."""

from __future__ import annotations

import json
import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs import report
from jobs.lake import manifests, partitions
from jobs.lake.items import content_hash
from jobs.lake.partitions import write_json
from jobs.lake.tables import INTERACTIONS, ITEM_GROUPS, ITEMS, item_embeddings, llm_embeddings
from jobs.run import Run

DS = "2026-03-10"
SPACE, ENCODER, BASE = "5" * 16, "e" * 16, "b" * 16
GENRES = ("Drama", "Comedy", "Action")
EVIL = "<script>window.evil = 1</script> & \"quotes\" 'all' $x_1$ </table>"


def item_table(count: int, ds: str, genres: tuple[str, ...] = GENRES) -> pa.Table:
    """Items i0…; the first bears markup."""
    titles = [EVIL, *(f"Film {number}" for number in range(1, count))][:count]
    pairs = [
        [{"name": "title", "value": text}, {"name": "genre", "value": f"{genres[number % len(genres)]}, Other"}]
        for number, text in enumerate(titles)
    ]
    hashes = [content_hash([(pair["name"], pair["value"]) for pair in row]) for row in pairs]
    columns = {"item_id": [f"i{number}" for number in range(count)], "attributes": pairs, "content_hash": hashes}
    return pa.table({**columns, "first_seen_ds": [ds] * count}, ITEMS.schema)


def vectors(count: int, width: int, groups: int, seed: int) -> pa.FixedSizeListArray:
    """Vectors in clusters, as many as there are genres."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(groups, width)) * 3
    emb = np.stack([centres[number % groups] for number in range(count)]) + random.normal(size=(count, width))
    return pa.FixedSizeListArray.from_arrays(pa.array(emb.astype(np.float32).ravel()), width)


def embedded(lake: Path, encoder: str, items: pa.Table, seed: int) -> None:
    """An encoder that has embedded all items."""
    home = lake / "models" / "encoder" / encoder
    home.mkdir(parents=True, exist_ok=True)
    lora = None if encoder == BASE else {"r": 8}
    (home / "encoder.json").write_text(json.dumps({"base": "tiny", "base_sha256": "1" * 64, "lora": lora}))
    rows = pa.table({"item_id": items["item_id"], "content_hash": items["content_hash"],
                     "embedding": vectors(items.num_rows, 12, 3, seed)})  # fmt: skip
    partitions.write(lake, llm_embeddings(12, "float32"), f"encoder={encoder}/ds={DS}", [rows])


def tables(lake: Path, ds: str = DS, count: int = 40, genres: tuple[str, ...] = GENRES, space: str = SPACE) -> None:
    """Items, logs and vectors of a night."""
    items = item_table(count, ds, genres)
    partitions.write(lake, ITEMS, f"ds={ds}", [items])
    events = [("u", f"i{number % count}", number) for number in range(50)]
    partitions.write(
        lake,
        INTERACTIONS,
        f"ds={ds}",
        [pa.Table.from_arrays(list(map(pa.array, zip(*events, strict=True))), schema=INTERACTIONS.schema)],
    )
    for seed, encoder in enumerate((BASE, ENCODER)):
        embedded(lake, encoder, items, seed)
    rows = {
        "item_id": items["item_id"],
        "space_id": [space] * count,
        "embedding": vectors(count, 8, 3, 5),
        "content_hash": items["content_hash"],
        "group": [ITEM_GROUPS[number % 3] for number in range(count)],
    }
    partitions.write(lake, item_embeddings(8), f"space={space}/ds={ds}", [pa.table(rows)])


def difference(against: str, slice_: str, value: float, n: int = 90) -> dict[str, Any]:
    ends = (
        {"low": None, "high": None, "detectable": None}
        if n < 30
        else {"low": value - 0.02, "high": value + 0.02, "detectable": 0.03}
    )
    return {"against": against, "slice": slice_, "value": value, "reference": 0.1, "n": n, **ends}


def results(count: int = 40, space: str = SPACE) -> dict[str, dict[str, Any]]:
    """The Result of every job of a night, as far as the report reads them."""
    history = [{"loss": 3.0 - step, "ndcg": step / 10, "recall": step / 5} for step in range(3)]
    slices = {name: {"ndcg@10": 0.1, "hr@10": 0.2, "mrr": 0.1, "sampled_ndcg@10": 0.3} for name in ("overall", "tail", "cold")}
    ids = {"space_id": space, "encoder_id": ENCODER, "recommender_id": "c" * 16}
    return {
        "extract": {
            "seen": {"items": count + 3, "interactions": 55},
            "quarantined": {"items: no attributes": 3, "interactions: duplicate event": 5},
            "rows": {"items": count, "interactions": 50, "sequences": 1, "quarantine": 8},
            "new_items": 2, "changed_items": 1, "forgotten": 0, "later": 4, "fill": {"title": 1.0, "genre": 0.9},
            "outputs": {f"items/ds={DS}": "1" * 64}, "inputs": {"shop.items": "43:77"},
        },
        "scft": {
            "encoder_id": ENCODER, "due": True, "reason": "there is no encoder", "trained_ds": DS,
            "losses": [3.0, 2.0, 1.0], "steps": 3, "best_step": 3,
            "history": [{"step": 0.0, "mrr": 0.4, "recall_1": 0.3}, {"step": 3.0, "mrr": 0.6, "recall_1": 0.5}],
            "figures": {"mrr": 0.6}, "base_figures": {"mrr": 0.4},
            "worth": {"verdict": "no different", "why": "over 120 users",
                      "ndcg": {"new": {"overall": 0.0321}, "base": {"overall": 0.0319}}},
        },
        "embed": {
            "encoder_id": ENCODER, "embedded": count, "tokens": count * 20, "tokens_per_second": 9.0, "device": "cuda",
        },
        "pretrain": {"history": history, "best_epoch": 3, "validation_ndcg": 0.2, "device": "cuda"},
        "rat": {
            "history": history, "best_epoch": 2, "validation_ndcg": 0.2, "device": "cuda",
            "fused": {"weights": {"llmemb": 1.0, "text": 0.35}, "widths": {"llmemb": 64, "text": 128}, "alone": {"llmemb": 0.041},
                      "gains": {"text": 0.0125, "shuffled": 0.0}},
        },
        "evaluate": {
            "values": {"popularity": slices, "llmemb": slices, "champion": slices},
            "users": {"overall": 90, "tail": 40, "cold": 12},
            "differences": [difference("popularity", "overall", 0.05), difference("champion", "overall", 0.01),
                            difference("champion", "tail", 0.0), difference("champion", "cold", 0.0, 12)],
            "leaking": False, "champion_id": "d" * 16,
        },
        "promote": {
            **ids, "decision": "promoted", "champion_id": "d" * 16, "approved_by": "", "version": "2",
            "reasons": [{"gate": "above popularity", "verdict": "passed", "text": "NDCG +0.05"}],
        },
        "project": {**ids, "rows": {"item_embeddings": count}},
        "publish": {
            **ids, "items": count, "written": count, "compatibility": "breaking",
            "churn": {"head": 0.1, "tail": 0.2, "cold": 0.3},
        },
        "lookup": {"read_ms_p50": 7.0},
    }  # fmt: skip


def family() -> dict[str, dict[str, Any]]:
    """The Results of the jobs that are off unless asked for, as far as the report reads them."""
    slices = {name: {"ndcg@10": 0.1, "hr@10": 0.2} for name in ("overall", "tail")}
    route = {"main": 0.1, "random": 0.1, "oracle": 0.2, "low": 0.001, "high": 0.03, "over": 0.015, "over_low": 0.002,
             "over_high": 0.028}  # fmt: skip
    weak = {"users": 18.0, "ndcg": 0.02, "others": 0.12, "without_hit": 0.9}
    return {
        "codes": {
            "books_id": "b00c" * 4, "source": f"space {SPACE}", "refit": True, "new": 40, "changed": 0, "kept": 0, "entries": 256,
            "report": {"bits": 32, "books": {"recall_at_10": 0.61, "error": 0.12}, "pq": {"recall_at_10": 0.52, "error": 0.29},
                       "collisions": {"share": 0.05, "largest": 3.0, "most_numbered": 4}, "moved": {"items": 38, "share": 0.93},
                       "category": {"attribute": "genre", "information": [0.71, 0.15]},
                       "usage": [{"entropy": 7.9, "gini": 0.21, "dead": 0.0}, {"entropy": 6.5, "gini": 0.42, "dead": 12.0}]},
        },
        "rerank": {
            "recommender_id": "c" * 16, "users": 90, "top": 20, "tokens": 8, "mix": 0.2, "in_list": 0.4,
            "ndcg": {"recommender": 0.2, "plain": 0.15, "soft": 0.18, "shuffled": 0.11, "mixed": 0.21, "oracle": 0.4},
            "differences": {"soft": {"value": -0.02, "low": -0.031, "high": -0.009},
                            "oracle": {"value": 0.2, "low": None, "high": None}},
        },
        "generate": {
            "books_id": "b00c" * 4, "users": 77, "ndcg": {"generated": 0.03, "recommender": 0.05}, "items_share": 1.0,
            "drift": 0.0, "difference": {"value": -0.02, "low": -0.04, "high": -0.001},
        },
        "bakeoff": {
            "champion": "fused", "seeds": [42, 43], "device": "cuda", "users": {"overall": 90, "tail": 40},
            "values": {"fused": slices, "id_only": slices, EVIL: slices},
            "differences": [difference("id_only", "overall", 0.05), difference(EVIL, "tail", -0.01, 12)],
            "models": [{"model": "fused", "by_seed": [0.1, 0.11], "seconds": 61.5, "bytes_per_item": 2048.0,
                        "told": [{"weights": {"text": 0.3}}]},
                       {"model": "fused_pq", "by_seed": [0.1, 0.11], "seconds": 61.7, "bytes_per_item": 4.0,
                        "told": [{"recall_at_10": 0.55, "error": 0.31}, {"recall_at_10": 0.56, "error": 0.3}]}],
            "routing": {"weak": {"length": weak}, "without_validation": 7, "routes": {
                "text": [{"signal": "length", "share": share, "ndcg": ndcg, "gain": ndcg - 0.1, **route}
                         for share, ndcg in ((0.0, 0.1), (0.2, 0.115), (1.0, 0.1))]}},
        },
    }  # fmt: skip


def record(lake: Path, job: str, result: dict[str, Any] | None, ds: str = DS, status: str = "done", **more: Any) -> None:
    """A manifest as the command line writes it."""
    manifest = {
        "job": job, "ds": ds, "status": status, "seconds": 2.5, "started_at": f"{ds}T01:00:00+00:00", "code_revision": "c0de",
        "recipe_sha256": "9" * 64, "config": {"margin": 0.02}, **more,
    }  # fmt: skip
    if result is not None:
        manifest["result"] = {"inputs": {}, "outputs": {}, "rows": {}, **result}
    write_json(manifests.path_of(lake, ds, job), manifest)


def whole_night(lake: Path, ds: str = DS, space: str = SPACE, **changes: Any) -> None:
    """Tables and manifests of a night in which every job ran."""
    tables(lake, ds, space=space, **changes)
    for job, result in results(changes.get("count", 40), space).items():
        record(lake, job, result, ds)


def tell(lake: Path, ds: str = DS, **changes: Any) -> tuple[report.Result, str]:
    """Runs the report; its Result and the page."""
    result = report.run(report.Config(run=Run(ds=ds, lake=lake), **{"base_items": 0, **changes}))
    html = Path(result.path).read_text()
    check_page(html)
    return result, html


class Page(HTMLParser):
    """Collects what the checks of a page ask about."""

    VOID = frozenset({"meta", "link", "br", "input", "img", "hr", "circle", "use", "path", "rect"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.headings: list[int] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.tables = self.captions = self.scoped = self.heads = self.labelled = self.inputs = self.scripts = 0
        self.foreign: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        if "id" in known:
            self.ids.append(known["id"] or "")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.tables += tag == "table"
        self.captions += tag == "caption"
        self.heads += tag == "th"
        self.scoped += tag == "th" and known.get("scope") in ("col", "row")
        self.inputs += tag in ("input", "select")
        self.labelled += tag in ("input", "select") and "label" in self.open
        self.scripts += tag == "script"
        self.foreign += [
            value for name, value in attrs if name in ("src", "href", "xlink:href") and value and not value.startswith("#")
        ]
        if tag == "svg":
            assert known.get("aria-hidden") == "true", "the words beside a picture are for screen readers"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
            self.open.pop()


def check_page(html: str) -> None:
    """Laws of every page: well formed, no network, ids once, tables and fields named, headings in steps, small."""
    page = Page(html)
    assert page.open == [], "every element is closed"
    assert page.foreign == [], "nothing is fetched"
    assert html.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert [name for name, times in Counter(page.ids).items() if times > 1] == []
    assert page.captions == page.tables
    assert page.scoped == page.heads
    assert page.labelled == page.inputs
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert page.scripts <= 2, "the page's own and the titles"
    assert "window.evil" not in re.sub(r"(?s)&lt;script.*?/script&gt;|\\u003cscript.*?/script\\u003e", "", html)
    assert len(html.encode()) < 5 * 2**20


def shown(html: str) -> str:
    """The page's text."""
    return " ".join(unescape(re.sub(r"(?s)<(style|script)\b.*?</\1>|<[^>]+>", " ", html)).split())
