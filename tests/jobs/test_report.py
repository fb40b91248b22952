"""report: a page for every night, whatever of it is there; drift against its own history; events for OpenLineage."""

from __future__ import annotations

import dataclasses
import datetime as dt
import http.server
import json
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import axe_core_python
import numpy as np
import pyarrow as pa
import pytest

from jobs import report
from jobs.lake import lineage, manifests, partitions
from jobs.lake.items import bury, content_hash
from jobs.lake.partitions import write_json
from jobs.lake.tables import INTERACTIONS, ITEM_GROUPS, ITEMS, item_embeddings, llm_embeddings
from jobs.report import drift, plots
from jobs.report.drift import Bounds
from jobs.run import InputError, Run, as_json
from models.text.encoder import Lora
from tests.models import tiny

DS = "2026-03-10"
SPACE, ENCODER, BASE = "5" * 16, "e" * 16, "b" * 16
GENRES = ("Drama", "Comedy", "Action")
EVIL = "<script>window.evil = 1</script> & \"quotes\" 'all' $x_1$ </table>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# ---------------------------------------------------------------------------------------------------------- a night to show


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
        },
        "embed": {
            "encoder_id": ENCODER, "embedded": count, "tokens": count * 20, "tokens_per_second": 9.0, "device": "cuda",
        },
        "pretrain": {"history": history, "best_epoch": 3, "validation_ndcg": 0.2, "device": "cuda"},
        "rat": {"history": history, "best_epoch": 2, "validation_ndcg": 0.2, "device": "cuda"},
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


# ------------------------------------------------------------------------------------------------ what holds of every page


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


# ------------------------------------------------------------------------------------------------------------------- tests


def test_a_whole_night_is_good_and_every_part_is_there(tmp_path: Path) -> None:
    whole_night(tmp_path)
    result, html = tell(tmp_path)
    text = shown(html)
    assert (result.state, result.points) == ("good", ())
    assert "All 10 jobs done, nothing to worry about; the challenger became champion; 40 items of 2026-03-10 serve." in text
    assert html.count("can't be drawn") == 0
    for part in (
        "item records seen 43", "items: no attributes 3", "95 % intervals", "SCFT: loss", "NDCG@10 0.2000", "head 10.0%",
        "Base LLM", "After SCFT", "Served", "all 40 items", "coverage of the logs 1.0000", "explain.item=ID",
    ):  # fmt: skip
        assert part in text, part


def test_neighbours_shown_are_those_of_the_vectors(tmp_path: Path) -> None:
    whole_night(tmp_path)
    config = report.Config(run=Run(ds=DS, lake=tmp_path), base_items=0)
    views, layers, _ = report.look(config, report.spaces_of(tmp_path, lineage.read_night(tmp_path, DS), ()))
    assert views is not None
    assert [example.group for example in views.examples] == ["head", "head", "tail", "tail", "cold", "cold"]
    served = next(layer.vectors for layer in layers if layer.name == "Served")
    texts = next(layer.vectors for layer in layers if layer.name == "After SCFT")
    titles = dict(zip(views.sample.item_ids, views.sample.titles, strict=True))
    mean = np.stack(list(texts.values())).mean(0)

    def cosine(one: str, other: str) -> float:
        a, b = texts[one] - mean, texts[other] - mean
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    for example in views.examples:
        others = [item for item in served if item != example.item_id]
        by_dot = sorted(others, key=lambda item: -float(served[item] @ served[example.item_id]))[:5]
        by_cosine = sorted(others, key=lambda item: -cosine(item, example.item_id))[:5]
        assert example.columns["Served"] == [(item, titles[item]) for item in by_dot]
        assert example.columns["After SCFT"] == [(item, titles[item]) for item in by_cosine]


def test_vectors_in_clusters_of_their_genre_are_told_as_pure_and_random_ones_as_chance(tmp_path: Path) -> None:
    whole_night(tmp_path)
    config = report.Config(run=Run(ds=DS, lake=tmp_path), base_items=0)
    views, _, _ = report.look(config, report.spaces_of(tmp_path, lineage.read_night(tmp_path, DS), ()))
    assert views is not None
    assert views.attribute == "genre"
    assert set(views.categories) == set(GENRES)
    for found in views.maps:
        assert found.purity is not None
        assert found.chance is not None
        assert found.purity > 0.9
        assert 0.25 < found.chance < 0.4
    random = np.random.default_rng(0)
    purity, chance = views.purity(random.normal(size=(300, 8)).astype(np.float32), random.integers(0, 3, 300))
    assert purity is not None
    assert chance is not None
    assert abs(purity - chance) < 0.05


@pytest.mark.parametrize("last", ["extract", "embed", "evaluate", "project", "publish"])
def test_a_night_that_failed_half_way_has_its_page_and_names_the_job(tmp_path: Path, last: str) -> None:
    tables(tmp_path)
    for job, found in results().items():
        if job == last:
            record(tmp_path, job, None, status="failed", error=f"ValueError: {EVIL}")
            break
        record(tmp_path, job, found)
    result, html = tell(tmp_path)
    assert result.state == "bad"
    assert any(point.startswith(f"{last} failed: ValueError") for point in result.points)
    assert "jobs failed" in shown(html)
    assert "can't be drawn" not in html


def test_a_night_whose_extract_failed_in_an_empty_lake_has_its_page(tmp_path: Path) -> None:
    record(tmp_path, "extract", None, status="failed", error="no such table")
    result, html = tell(tmp_path)
    assert result.state == "bad"
    assert "the lake has no items yet" in html


def test_a_refusal_by_a_gate_is_to_be_looked_at_and_says_what_goes_on_serving(tmp_path: Path) -> None:
    whole_night(tmp_path, "2026-03-09")
    whole_night(tmp_path)
    record(tmp_path, "promote", None, status="refused", error="not worse on tail: NDCG -0.03")
    manifests.path_of(tmp_path, DS, "publish").unlink()
    result, _ = tell(tmp_path)
    assert result.state == "look"
    assert "promote was refused by a gate: not worse on tail: NDCG -0.03" in result.points
    assert "the night is unfinished: publish has not run" in result.points
    assert "the snapshot of 2026-03-09 goes on serving" in result.verdict


def test_a_challenger_below_a_floor_is_to_be_looked_at_even_when_promoted(tmp_path: Path) -> None:
    whole_night(tmp_path)
    judged = results()["evaluate"]
    judged["differences"].append(difference("repeat_markov_popularity", "overall", -0.05))
    record(tmp_path, "evaluate", judged)
    result, _ = tell(tmp_path)
    assert result.state == "look"
    assert result.points == ("the challenger is worse than repeat_markov_popularity: NDCG -0.0500 (95 % -0.0700 to -0.0300)",)


def test_after_a_rollback_the_age_is_that_of_the_space_that_serves_again(tmp_path: Path) -> None:
    whole_night(tmp_path)
    record(tmp_path, "rollback", {"serves_ds": "2026-03-07"})
    assert "What serves is the snapshot of 2026-03-07: 3 days behind this night." in shown(tell(tmp_path)[1])


def test_markup_in_titles_errors_and_reasons_stays_text(tmp_path: Path) -> None:
    whole_night(tmp_path, genres=(EVIL, "$\\frac{1}$"))
    extract = results()["extract"]
    extract["quarantined"] = {f"items: {EVIL}": 2}
    record(tmp_path, "extract", extract)
    record(tmp_path, "lookup", None, status="failed", error=EVIL)
    _, html = tell(tmp_path)
    assert "&lt;script&gt;window.evil = 1&lt;/script&gt;" in html
    assert EVIL in json.loads(re.search(r'(?s)id="titles">(.*?)</script>', html)[1])["titles"]  # type: ignore[index]


def test_ten_thousand_categories_and_reasons_are_readable(tmp_path: Path) -> None:
    tables(tmp_path, count=300, genres=tuple(f"genre {number}" for number in range(10_000)))
    for job, result in results(300).items():
        record(tmp_path, job, result)
    extract = results(300)["extract"]
    extract["quarantined"] = {f"items: reason {number}": number for number in range(10_000)}
    extract["fill"] = {f"attribute {number}": 1.0 for number in range(10_000)}
    record(tmp_path, "extract", extract)
    _, html = tell(tmp_path, category="genre", map_items=200)
    assert "The first 30 of 10,000 rows." in html
    assert html.count("<option") == 9, "all, the seven commonest, and the rest"
    assert len(html) < 600_000


@pytest.mark.parametrize("count", [1, 11])
def test_a_catalogue_of_a_few_items_is_drawn(tmp_path: Path, count: int) -> None:
    whole_night(tmp_path, count=count)
    result, html = tell(tmp_path)
    assert result.state == "good"
    assert html.count("<circle") == 3 * count
    assert "can't be drawn" not in html


def test_items_that_are_all_alike_are_drawn(tmp_path: Path) -> None:
    whole_night(tmp_path)
    rows = partitions.read(tmp_path, item_embeddings(8), f"space={SPACE}/ds={DS}")
    same = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(8 * 40, np.float32)), 8)
    partitions.write(tmp_path, item_embeddings(8), f"space={SPACE}/ds={DS}", [rows.set_column(2, "embedding", same)])
    result, _ = tell(tmp_path)
    assert result.drift[f"served {SPACE}.rank"] == 1.0


def test_the_base_model_is_asked_for_its_map_where_no_encoder_without_lora_has_run(tmp_path: Path) -> None:
    whole_night(tmp_path)
    shutil.rmtree(tmp_path / "llm_embeddings" / f"encoder={BASE}")
    spec = tiny.encoder(tiny.llama(tmp_path / "base"), lora=Lora()).spec
    described = json.dumps(dataclasses.asdict(spec))
    (tmp_path / "models" / "encoder" / ENCODER / "encoder.json").write_text(described)
    _, html = tell(tmp_path, base_items=15)
    assert html.count("<circle") == 15 + 40 + 40
    assert "Map of 15 items: Base LLM" in html


def test_a_base_model_that_is_gone_costs_its_map_not_the_page(tmp_path: Path) -> None:
    whole_night(tmp_path)
    shutil.rmtree(tmp_path / "llm_embeddings" / f"encoder={BASE}")
    result, html = tell(tmp_path, base_items=15)
    assert result.state == "good"
    assert "Base LLM is not shown: the base model could not be asked" in html
    assert html.count("<circle") == 80


def test_a_large_catalogue_is_sampled_alike_in_every_table_and_says_so(tmp_path: Path) -> None:
    whole_night(tmp_path, count=400)
    _, html = tell(tmp_path, map_items=100, pool_items=200)
    text = shown(html)
    drawn = int(re.search(r"a sample of (\d+) of 400 items, taken by content hash", text)[1])  # type: ignore[index]
    assert 60 < drawn < 140
    assert html.count("<circle") == 3 * drawn
    assert "among a sample of 200 of 400 items" in text


def test_a_page_lists_the_ids_of_all_items_it_names(tmp_path: Path) -> None:
    whole_night(tmp_path, count=400)
    _, html = tell(tmp_path, map_items=50)
    data = json.loads(re.search(r'(?s)id="titles">(.*?)</script>', html)[1])  # type: ignore[index]
    named = {f"Film {item[1:]}" for item in data["named"]} | {EVIL}
    assert set(re.findall(r"Film \d+", html)) <= named
    assert len(named) < 200


def test_forgotten_items_are_not_shown(tmp_path: Path) -> None:
    whole_night(tmp_path)
    bury(tmp_path, "i7", DS)
    assert 'Film 7"' not in tell(tmp_path)[1]


@pytest.mark.parametrize(
    "wrong", ["{", "[1]", '{"result": 3}', '{"result": {"seen": 3, "rows": [], "history": "x"}, "status": "done", "seconds": 1}']
)
def test_manifests_of_another_shape_cost_their_part_not_the_page(tmp_path: Path, wrong: str) -> None:
    whole_night(tmp_path)
    for job in ("extract", "evaluate", "rat"):
        manifests.path_of(tmp_path, DS, job).write_text(wrong)
    result, html = tell(tmp_path)
    assert result.state in ("bad", "look", "good")
    assert "Map of the embeddings" in html


@pytest.mark.parametrize("job", results())
def test_no_value_of_a_manifest_costs_the_page_or_the_events(tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("forest", "bars", "curves", "over_nights"):
        monkeypatch.setattr(plots, kind, lambda *_, **__: "")
    runs = {
        name: {"job": name, "status": "done", "seconds": 1.0, "config": {}, "result": found} for name, found in results().items()
    }
    for key in (*runs[job]["result"], "status", "seconds", "started_at", "config", "result", "earlier", "error"):
        for odd in ("x", [1], [{"a": 1}], {"a": "b"}, {"items": None}, float("inf"), 10**400):
            own = runs[job]
            changed = {**own, key: odd} if key not in own["result"] else {**own, "result": {**own["result"], key: odd}}
            night = lineage.Night(
                ds=DS,
                runs=tuple(lineage.JobRun(name=name, job=name, manifest=changed if name == job else runs[name]) for name in runs),
            )
            serving_ds, space_id = report.serving([night])
            config = report.Config(run=Run(ds=DS, lake=tmp_path))
            values = report.measure(config, night, report.spaces_of(tmp_path, night, [night]), [], None)
            facts = report.Facts(
                night=night, before=(night,), measures=drift.judge(values, [values] * 6, Bounds()), views=None, why_no_views="",
                gpu_hour_price=1.0, serving_ds=serving_ds, space_id=space_id,
            )  # fmt: skip
            assert "</html>" in report.page(facts)
            assert len(list(lineage.events(night, "llmemb"))) == 2 * len(runs)


def test_shards_are_counted_together_and_hide_nothing(tmp_path: Path) -> None:
    whole_night(tmp_path)
    manifests.path_of(tmp_path, DS, "embed").unlink()
    for shard in range(40):
        record(tmp_path, f"embed-{shard:05d}-of-00040", {**results()["embed"], "embedded": 10})
    record(tmp_path, "embed-00007-of-00040", None, status="failed", error="out of memory")
    result, html = tell(tmp_path)
    text = shown(html)
    assert "texts embedded this night 390" in text
    assert "embed, 39 shards ✓ done 1.6 min" in text
    assert "embed-00007-of-00040 ✗ failed" in text
    assert "publish ✓ done" in text, "behind forty shards"
    assert result.points == ("embed-00007-of-00040 failed: out of memory",)


def test_a_thousand_failed_shards_are_named_by_the_first_few(tmp_path: Path) -> None:
    whole_night(tmp_path)
    for shard in range(1000):
        record(tmp_path, f"embed-{shard:05d}-of-01000", None, status="failed", error="no GPU")
    result, _ = tell(tmp_path)
    assert len(result.points) == 13
    assert result.points[-1] == "and 988 more"


def test_what_a_night_cost_holds_the_runs_that_a_later_one_followed(tmp_path: Path) -> None:
    whole_night(tmp_path)
    first = {"status": "done", "seconds": 60.0, "result": {"embedded": 40, "tokens": 800, "tokens_per_second": 9.0}}
    again = {**results()["embed"], "embedded": 0, "tokens": 0, "tokens_per_second": 0.0}
    record(tmp_path, "embed", again, earlier=[{"status": "failed", "seconds": 20.0}, first])
    text = shown(tell(tmp_path, gpu_hour_price=3600.0)[1])
    assert "embed ✓ done 82.5 s in 3 runs" in text
    assert "texts embedded this night 40" in text
    assert "Embedding, tokens a second 9.000" in text
    assert "Device cost per thousand items embedded 2,062" in text, "82.5 s for 40 texts at 1 a second"


def test_the_age_of_the_space_is_told_beside_that_of_the_snapshot(tmp_path: Path) -> None:
    whole_night(tmp_path, "2026-02-08")
    whole_night(tmp_path)
    assert f"It is in space {SPACE}, which is 30 days old: first filled with 2026-02-08." in shown(tell(tmp_path)[1])


def test_shares_of_the_maps_are_compared_on_the_items_that_all_of_them_show(tmp_path: Path) -> None:
    whole_night(tmp_path)
    rows = partitions.read(tmp_path, llm_embeddings(12, "float32"), f"encoder={BASE}/ds={DS}")
    partitions.write(tmp_path, llm_embeddings(12, "float32"), f"encoder={BASE}/ds={DS}", [rows.slice(0, 15)])
    views, _, _ = report.look(
        report.Config(run=Run(ds=DS, lake=tmp_path), base_items=0),
        report.spaces_of(tmp_path, lineage.read_night(tmp_path, DS), ()),
    )
    assert views is not None
    assert [(len(found.places), found.compared) for found in views.maps] == [(15, 15), (40, 15), (40, 15)]
    assert len({found.chance for found in views.maps}) == 1


def test_a_few_long_texts_embedded_on_a_night_do_not_make_the_encoder_due(tmp_path: Path) -> None:
    whole_night(tmp_path)
    assert not any("token" in name for name in tell(tmp_path)[0].drift), "forty texts are too few"
    record(tmp_path, "embed", {**results()["embed"], "embedded": 200, "tokens": 5000})
    assert tell(tmp_path)[0].drift["embedded.tokens"] == 25.0
    assert not "embedded.tokens".startswith(drift.TEXT)


def test_a_report_written_again_has_the_same_bytes(tmp_path: Path) -> None:
    whole_night(tmp_path)
    first, _ = tell(tmp_path)
    record(tmp_path, "report", as_json(first))
    record(tmp_path, "explain", {})
    assert tell(tmp_path)[0].outputs == first.outputs


def test_a_date_without_any_run_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run `python -m jobs extract` first"):
        tell(tmp_path)


# ------------------------------------------------------------------------------------------------------------------- drift


def nights(lake: Path, count: int) -> str:
    """Nights before DS, each with its report; gives the last one's date."""
    date = ""
    for back in range(count, 0, -1):
        date = f"{dt.date.fromisoformat(DS) - dt.timedelta(days=back)}"
        whole_night(lake, date)
        record(lake, "report", as_json(tell(lake, date)[0]), date)
    return date


def test_an_attribute_that_vanishes_overnight_alarms_and_makes_the_encoder_due(tmp_path: Path) -> None:
    nights(tmp_path, 2)
    whole_night(tmp_path)
    quiet, _ = tell(tmp_path, bounds=Bounds(nights=2))
    assert (quiet.state, quiet.refresh_encoder) == ("good", "")
    extract = results()["extract"]
    extract["fill"]["genre"] = 0.4
    record(tmp_path, "extract", extract)
    loud, html = tell(tmp_path, bounds=Bounds(nights=2))
    assert loud.state == "look"
    assert loud.refresh_encoder == "fill.genre is 0.4, was 0.9 ± 0.01"
    assert "1 of" in loud.points[0]
    assert "! alarm" in html


def test_a_measure_alarms_only_past_what_its_own_history_shows() -> None:
    noisy = [{"x": 1.0 + 0.1 * (-1) ** night} for night in range(8)]
    verdicts = {value: drift.judge({"x": value}, noisy, Bounds())[0].verdict for value in (1.0, 1.3, 1.7)}
    assert verdicts == {1.0: "steady", 1.3: "steady", 1.7: "alarm"}
    assert drift.judge({"x": float("nan")}, noisy, Bounds())[0].verdict == "alarm"
    assert drift.judge({"x": 9.0}, noisy[:4], Bounds())[0].verdict == "too few nights"
    clean = [{"quarantine.items": 0.0}] * 8
    assert drift.judge({"quarantine.items": 0.001}, clean, Bounds())[0].verdict == "steady", "one bad record is no drift"
    assert drift.judge({"quarantine.items": 0.03}, clean, Bounds())[0].verdict == "alarm"
    assert drift.judge({"y": 9.0}, noisy, Bounds())[0].nights == 0


def test_effective_rank_counts_the_directions_that_vectors_use() -> None:
    random = np.random.default_rng(1)
    wide = random.normal(size=(4000, 6)).astype(np.float32)
    assert drift.effective_rank(wide) == pytest.approx(6, abs=0.05)
    assert drift.effective_rank(wide[:, :2] @ random.normal(size=(2, 6)).astype(np.float32)) <= 2.001
    assert drift.effective_rank(wide[:5]) <= 4.001, "five points span four directions"


def test_coverage_is_the_share_of_events_whose_item_has_a_vector(tmp_path: Path) -> None:
    tables(tmp_path)
    ids = pa.array([f"i{number}" for number in range(20)])
    # events i0…i39, then i0…i9 again
    assert drift.coverage(tmp_path, f"ds={DS}", ids, 1000) == pytest.approx(30 / 50)


# ------------------------------------------------------------------------------------------------------------ OpenLineage


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenLineage endpoint, and the events that it received."""
    received: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/api/v1/lineage", received
    server.shutdown()


def test_every_run_is_an_openlineage_event_with_digests_and_the_endpoint_gets_them(
    tmp_path: Path, endpoint: tuple[str, list[dict[str, Any]]]
) -> None:
    whole_night(tmp_path)
    record(tmp_path, "lookup", None, status="failed", error="store is down")
    result, _ = tell(tmp_path, openlineage_url=endpoint[0])
    events = [json.loads(line) for line in Path(result.path).with_name("openlineage.jsonl").read_text().splitlines()]
    assert endpoint[1] == events
    assert result.sent == len(events) == 20
    by_job = {event["job"]["name"]: event for event in events if event["eventType"] != "START"}
    assert by_job["lookup"]["eventType"] == "FAIL"
    assert by_job["lookup"]["run"]["facets"]["errorMessage"]["message"] == "store is down"
    (written,) = by_job["extract"]["outputs"]
    assert written["name"] == "items", "as those name it that read it, whatever the date"
    assert written["facets"]["version"]["datasetVersion"] == "1" * 64
    assert written["outputFacets"]["outputStatistics"]["rowCount"] == 40
    for event in events:
        assert {"eventType", "eventTime", "run", "job", "inputs", "outputs", "producer", "schemaURL"} == set(event)
        assert dt.datetime.fromisoformat(event["eventTime"]).tzinfo is not None
    starts = [event["run"]["runId"] for event in events if event["eventType"] == "START"]
    assert len(set(starts)) == 10


def test_an_endpoint_that_is_down_costs_the_events_there_not_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole_night(tmp_path)
    result, _ = tell(tmp_path, openlineage_url="http://127.0.0.1:9/lineage")
    assert result.sent == 0
    assert "did not take the events" in capsys.readouterr().err


def test_the_page_and_the_digests_of_the_tables_are_logged_to_mlflow(tmp_path: Path) -> None:
    import mlflow

    whole_night(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    report.run(report.Config(run=Run(ds=DS, lake=tmp_path, tracking_uri=uri), base_items=0))
    client = mlflow.MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("llmemb").experiment_id])
    assert {file.path for file in client.list_artifacts(found.info.run_id)} == {"report.html", "openlineage.jsonl"}
    assert [(given.dataset.name, given.dataset.digest) for given in found.inputs.dataset_inputs] == [(f"items/ds={DS}", "1" * 36)]
    assert found.data.metrics["fill.genre"] == 0.9


def test_mlflow_that_is_down_costs_the_record_not_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole_night(tmp_path)
    (tmp_path / "file").touch()
    run = Run(ds=DS, lake=tmp_path, tracking_uri=f"sqlite:///{tmp_path}/file/mlflow.db")
    result = report.run(report.Config(run=run, base_items=0))
    assert Path(result.path).exists()
    assert "not logged" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- a real browser

PROBE = """
<script>
const maps = [...document.querySelectorAll("[data-map]")], svg = maps[0].querySelector("svg");
maps[0].focus();
maps[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
const byKey = document.getElementById("told").textContent, marked = document.querySelectorAll(".on").length;
const circle = svg.querySelector("circle"), at = circle.getBoundingClientRect();
circle.dispatchEvent(new PointerEvent("pointermove", { clientX: at.x + 1, clientY: at.y + 1, bubbles: true }));
const byPointer = document.querySelector(".tip").textContent;
const find = document.getElementById("find");
find.value = "Film 3"; find.dispatchEvent(new Event("input"));
const found = document.getElementById("told").textContent;
const only = document.getElementById("only");
only.value = "0"; only.dispatchEvent(new Event("change"));
const dim = document.querySelectorAll(".dim").length;
const out = document.createElement("pre");
out.id = "probe";
out.textContent = JSON.stringify({ byKey, byPointer, marked, found, dim,
  evil: window.evil === undefined, focused: document.activeElement === maps[0],
  wide: document.documentElement.scrollWidth <= window.innerWidth, errors: window.errors });
parent.document.body.append(out);
</script>
</body>"""
ERRORS = "<script>window.errors = []; window.onerror = message => window.errors.push(message);</script></head>"
AXE = """
<script>{axe}</script>
<script>
axe.run(document, {{ resultTypes: ["violations"] }}).then(found => {{
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify({{ passes: found.passes.length, serious: found.violations.filter(
    one => one.impact === "serious" || one.impact === "critical").map(one => one.id + ": " + one.nodes[0].html) }});
  parent.document.body.append(out);
}});
</script>
</body>"""


def browse(html: str, folder: Path, width: int, *more: str) -> dict[str, Any]:
    """What a script in a page found, as headless Chromium runs it in a frame of this width: no window is as narrow as a phone."""
    page = folder / "framed.html"
    page.write_text(
        f'<!DOCTYPE html><body><iframe style="width: {width}px; height: 900px" srcdoc="{escape(html)}"></iframe></body>'
    )
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--window-size=1300,1000",
        f"--user-data-dir={folder / 'profile'}", *more, "--dump-dom", f"file://{page}",
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found: dict[str, Any] = json.loads(unescape(re.search(r'(?s)<pre id="probe">(.*?)</pre>', dom)[1]))  # type: ignore[index]
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "phone"])
def test_in_a_real_browser_keys_pointer_search_and_filter_work_and_nothing_overflows(tmp_path: Path, width: int) -> None:
    whole_night(tmp_path)
    _, html = tell(tmp_path)
    seen = browse(html.replace("</head>", ERRORS).replace("</body>", PROBE), tmp_path, width)
    assert seen["errors"] == []
    assert seen["evil"], "markup in a title must not run"
    for told in ("byKey", "byPointer"):
        assert re.fullmatch(r"(Film \d+|<script>.*) \((Drama|Comedy|Action)\)", seen[told]), told
    assert seen["marked"] == 3, "the item is marked in all three maps"
    assert seen["found"].startswith("11 items: Film 3")
    assert 70 < seen["dim"] < 90, "two of three genres"
    assert seen["focused"]
    assert seen["wide"], "the page does not scroll sideways"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")
@pytest.mark.parametrize("colours", [[], ["--force-dark-mode"]], ids=["light", "dark"])
def test_axe_finds_nothing_serious_in_light_or_dark(tmp_path: Path, colours: list[str]) -> None:
    whole_night(tmp_path)
    record(tmp_path, "lookup", None, status="failed", error="store is down")
    _, html = tell(tmp_path)
    html = html.replace("<details>", "<details open>")
    axe = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text()
    seen = browse(html.replace("</body>", AXE.format(axe=axe)), tmp_path, 1280, "--virtual-time-budget=60000", *colours)
    assert seen["passes"] > 20, "it looked"
    assert seen["serious"] == []


def test_a_lasting_change_of_texts_makes_an_encoder_due_once_and_not_again_after_it_was_trained(tmp_path: Path) -> None:
    """Twenty nights at 100 characters, then 140 for good: the median of all would say so on ten nights and more."""
    before, trained, due = [{"text.characters": 100.0 + night % 3, "coverage": 0.9} for night in range(20)], 0, []
    for night in range(20, 40):
        tonight = {"text.characters": 140.0 + night % 3, "coverage": 0.9}
        if drift.refresh_reason(drift.judge(tonight, before, drift.Bounds(), before[trained:])):
            due.append(night)
            trained = len(before)
        before.append(tonight)
    assert due == [20]


def test_only_a_training_counts_and_not_a_night_on_which_none_was_due(tmp_path: Path) -> None:
    for ds, due, status in (("2026-01-01", True, "done"), ("2026-01-05", False, "done"), ("2026-01-07", True, "failed")):
        write_json(manifests.path_of(tmp_path, ds, "scft"), {"status": status, "result": {"due": due}})
    assert report.trained_on(tmp_path, "2026-01-09") == "2026-01-01"
    assert report.trained_on(tmp_path, "2025-12-31") == ""
