"""A month of nights replayed by real dates, calm and killed; a night with few new items; an hour between two nights.

    python tests/benchmarks/bench_month.py month --data ../shared/data/ml_latest_small --nights 30 --kills 50 --keep month.jsonl
    python tests/benchmarks/bench_month.py month --data ../shared/data/ml_latest_small --nights 3 --kills 50 --bucket
    python tests/benchmarks/bench_month.py past --data ../shared/data/ml_latest_small --past 1 10 30
    python tests/benchmarks/bench_month.py hour --data ../shared/data/ml_latest_small --new 100 --base embedded --items 2000

`month`: every night's jobs run as the command line runs them, each in a process of its own, over a catalogue that grows as
films are first rated. Every seventh night trains a challenger, which the gates judge unattended. With `--kills` a second lake
goes through the same month, its jobs killed (-9) at random instants and run again: it must end with the same rows online. Then
one night brings `--share` new items. Models are tiny: the figures are of the machinery. Java stays warm between the nights, and
ends with an `extract` that is killed.

Every night is a JSON line at once, also in the file `--keep`: its decision, space, counts, bytes by folder of the lake, seconds
by job, what differs from the same night of the calm month, and strangers: rows of a live space whose item its snapshot doesn't
hold. The last line but one says what differs at the end.

With `--bucket` the lakes and MLflow's artifacts are on an object store, both registries on PostgreSQL, the online stores on
Redis. Each job works on the other of two machines (scratch folders) than the one before: what was killed on one is run again on
the other. Every night then tells its requests to the object store, by job. `past`: nights in such a bucket after so many others;
all but the first few of those are copies of the first night under earlier dates, and each embedded five texts of its own.

`hour`: from a row in the table of items to an answer from the online store, by fresh processes, model start included.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import functools
import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

sys.path.insert(0, str(Path(__file__).parent))

from cluster import cluster  # noqa: E402 — beside this file
from object_server import Server  # noqa: E402

from feature_repo import feature_definitions as views  # noqa: E402
from feature_repo import spaces  # noqa: E402
from feature_repo.keys import key_texts  # noqa: E402
from feature_repo.reader import BATCH, Pointer, Reader, settings  # noqa: E402
from feature_repo.stores import open_writer  # noqa: E402
from jobs import night  # noqa: E402
from jobs.__main__ import main as command_line  # noqa: E402
from jobs.embed.config import Config as EmbedConfig  # noqa: E402
from jobs.engines import registry  # noqa: E402
from jobs.engines.spark import find_java  # noqa: E402
from jobs.lake import partitions  # noqa: E402
from jobs.lake.listing import Place  # noqa: E402
from jobs.lake.parts import commit_parts, part_path, write_part  # noqa: E402
from jobs.lake.tables import ITEMS, llm_embeddings  # noqa: E402
from jobs.night import Failed, Night  # noqa: E402
from jobs.run import Refused, Run  # noqa: E402
from tests.models import tiny  # noqa: E402

TABLES = ("items", "interactions", "sequences", "llm_embeddings", "item_embeddings")
WORK = ("extract", "scft", "pin", "embed", "project", "publish", "lookup")
RECIPE = """
[run]
lake = "{lake}"
tracking_uri = "{tracking}"
device = "cpu"
[extract]
max_row_change = 0
items = {{ table = "{home}/items.parquet", attributes = ["title", "year", "genres"] }}
interactions = {{ table = "{events}" }}
spark = {{ "spark.master" = "local[1]", "spark.sql.shuffle.partitions" = "1", "spark.sql.codegen.wholeStage" = "false" }}
[scft]
base = "{base}"
max_tokens = 128
policy = {{ domain = "The movie has the following attributes:" }}
gates = {{ recall_drop = 1.0, mean_cosine = 1.0, effective_rank = 1.0 }}
training = {{ steps = 0 }}
[backbone]
width = 16
max_len = 20
[pretrain]
training = {{ epochs = 2, patience = 2, batch = 128, validation_users = 100 }}
[rat]
hidden = 32
whitened_width = 16
refit_loss = 1.0
training = {{ epochs = 2, patience = 2, batch = 128, validation_users = 100 }}
fusion = {{ parts = ["llmemb"] }}
[evaluate]
resamples = 100
events_per_user = 2
negatives = 20
[publish]
graph = {{ neighbours = 8 }}
"""


@dataclasses.dataclass(kw_only=True)
class Month:
    """A lake, its tables, and what is done to its jobs."""

    home: Path
    events: Path
    base: str
    items: pd.DataFrame
    """With the date from which each item is in the catalogue."""
    kills: int = 0
    chance: random.Random = dataclasses.field(default_factory=lambda: random.Random(1))
    usual: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Seconds that a job took on each night of the calm month: a first night's are no measure for a second one's."""
    killed: dict[str, int] = dataclasses.field(default_factory=dict)
    left: int = 0
    """Job runs that are still to come, about: kills are spread over them."""
    store: Server | None = None
    services: dict[str, str] = dataclasses.field(default_factory=dict)
    """Variables of its jobs, where its lake is in a bucket."""
    turn: int = 0
    waits: int = 0
    """How often a job ended with status 4, and was tried again."""

    @property
    def lake(self) -> str:
        """Where its lake is."""
        return f"s3://{self.home.name}/lake" if self.services else f"{self.home}/lake"

    @property
    def tracking_uri(self) -> str:
        """Where its models are registered."""
        return self.services.get("MLFLOW_TRACKING_URI", f"sqlite:///{self.home}/mlflow.db")

    def run(self, ds: str) -> Run:
        """What its jobs share."""
        return Run(ds=ds, lake=Path(self.lake), tracking_uri=self.tracking_uri)

    def enter(self) -> None:
        """From here on this process and its copies are on a machine of this month: the other one than before."""
        self.turn += 1
        os.environ.update(self.services | {"LLMEMB_SCRATCH": f"{self.home}/machine {self.turn % 2}"})

    @property
    def recipe(self) -> Path:
        """Where the recipe lies."""
        return self.home / "recipe.toml"

    def prepare(self) -> None:
        """Writes the recipe."""
        self.home.mkdir(parents=True)
        self.recipe.write_text(
            RECIPE.format(home=self.home, lake=self.lake, tracking=self.tracking_uri, events=self.events, base=self.base)
        )

    def tables(self, ds: str, more: int = 0) -> int:
        """The catalogue as it was on a date, with `more` new items; how many it has."""
        now = self.items[self.items["since"] <= ds].drop(columns="since")
        extra = now.head(more).assign(item_id=lambda rows: "new-" + rows["item_id"], title=lambda rows: rows["title"] + ", again")
        both = pd.concat([now, extra]) if more else now
        pq.write_table(pa.Table.from_pandas(both, preserve_index=False), self.home / "items.parquet")
        return len(both)

    def job(self, words: list[str]) -> tuple[int, dict[str, Any], float]:
        """(status, Result, seconds) of a job, killed first where it is its turn, however often."""
        # as many kills on average as are left for each job: none has all of them, also where there are more kills than jobs
        while self.chance.random() < (rate := (self.kills - sum(self.killed.values())) / max(1, self.left)) / (1 + rate):
            self.enter()
            after = self.chance.random() * self.chance.choice(self.usual.get(words[0], [1.0]))
            status, _, _ = forked(words, self.home, after)
            if status == -signal.SIGKILL:
                self.killed[words[0]] = self.killed.get(words[0], 0) + 1
        self.left -= 1
        self.enter()
        status, result, seconds = forked(words, self.home)
        while status == 4:  # the scheduler would try again
            self.waits += 1
            self.enter()
            status, result, seconds = forked(words, self.home)
        return status, result, seconds


class Java:
    """A Java that the copies of this process share, so that not every night waits for its start."""

    gateway: Any = None

    @classmethod
    def start(cls) -> None:
        """Starts it, in the place of one that runs."""
        from pyspark.java_gateway import launch_gateway

        for name in ("PYSPARK_GATEWAY_PORT", "PYSPARK_GATEWAY_SECRET"):
            os.environ.pop(name, None)
        if cls.gateway is not None:
            cls.gateway.proc.kill()
            cls.gateway.proc.wait()
        find_java()
        os.environ.update({"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable})
        cls.gateway = launch_gateway()
        known = cls.gateway.gateway_parameters
        os.environ.update({"PYSPARK_GATEWAY_PORT": str(known.port), "PYSPARK_GATEWAY_SECRET": str(known.auth_token)})


def forked(words: list[str], home: Path, kill_after: float | None = None) -> tuple[int, dict[str, Any], float]:
    """Runs the command line in a copy of this process, which has loaded all that jobs need: (status, Result, seconds)."""
    out, began = home / "out", time.monotonic()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        os.setsid()
        with out.open("w") as stream, (home / "log").open("a") as log:
            os.dup2(stream.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        try:
            status = command_line(words)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    while True:
        done, raw = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if kill_after is not None and time.monotonic() - began > kill_after:
            with contextlib.suppress(ProcessLookupError):  # it may not lead its group yet
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            _, raw = os.waitpid(child, 0)
            break
        time.sleep(0.01)
    status = -os.WTERMSIG(raw) if os.WIFSIGNALED(raw) else os.WEXITSTATUS(raw)
    if status < 0 and words[0] == "extract" and Java.gateway is not None:
        Java.start()
    lines = out.read_text().splitlines() if status == 0 else []
    return status, json.loads(lines[-1]) if lines else {}, time.monotonic() - began


def aside(ask: Callable[[], Any]) -> Any:
    """The answer of a copy of this process, as JSON brings it: connections of MLflow and of the object store cross no fork."""
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            with os.fdopen(write, "w") as stream:
                stream.write(json.dumps(ask()))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as stream:
        told = stream.read()
    os.waitpid(child, 0)
    return json.loads(told)


def champion(run: Run) -> dict[str, str] | None:
    """The champion, asked in a copy of this process."""
    found: dict[str, str] | None = aside(lambda: registry.champion(run))
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replayed(Night):
    """A night of the month."""

    month: Month
    results: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    first: bool
    requests: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    """To the object store, of the runs that were killed too."""

    def job(self, name: str, *settings: str) -> dict[str, Any]:
        """See `Night`."""
        if name == "promote" and self.first:
            settings = (*settings, "promote.approved_by=bench", "promote.overruled_by=bench")
        words = [name, "--recipe", str(self.recipe), "--ds", self.ds]
        for setting in settings:
            words += ["--set", setting]
        status, result, seconds = self.month.job(words)
        key = "refit" if "rat.stage=refit" in settings else name
        self.seconds[key] = round(self.seconds.get(key, 0.0) + seconds, 2)
        if self.month.store:
            self.requests[key] = self.requests.get(key, Counter()) + Counter(self.month.store.counts())
        told = result or {"refused": status == 3}
        if name == "embed":
            told["embedded"] = told.get("embedded", 0) + self.results.get(key, {}).get("embedded", 0)
        self.results[key] = told
        if status:
            raise Failed(name, status)
        return result


def replay(month: Month, ds: str, *, train: bool, first: bool, more: int = 0) -> dict[str, Any]:
    """One night; its figures."""
    items = month.tables(ds, more)
    if month.store:
        month.store.counts()  # what was asked since the last night is nobody's
    one = Replayed(recipe=month.recipe, ds=ds, month=month, results={}, seconds={}, first=first)
    run, outcome = month.run(ds), "served"
    try:
        night.serve(one, run, train=train)
    except (Failed, Refused) as error:
        outcome = str(error)
    served = aside(lambda: pointed(run.lake))
    extracted, published = one.results.get("extract", {}), one.results.get("publish", {})
    counts = {
        "catalogue": items,
        **extracted.get("rows", {}),
        "new_items": extracted.get("new_items"),
        "online": served.pop("items"),
    }
    counts |= {"embedded": one.results.get("embed", {}).get("embedded")}
    counts |= {name: published.get(name) for name in ("written", "removed", "attributes_written")}
    return {
        "ds": ds, "outcome": outcome, "decision": decided(one.results), "kind": published.get("kind"), **served, "counts": counts,
        "requests": one.requests | {"night": sum(one.requests.values(), Counter())}, "waits": month.waits,
        "bytes": aside(lambda: sizes(run.lake)),
        "seconds": one.seconds | {"night": round(sum(one.seconds.values()), 2)},
    }  # fmt: skip


def pointed(lake: Path) -> dict[str, Any]:
    """What serves."""
    now = Reader.open(lake).pointer()
    return {"space": now.space_id, "sequence": now.sequence, "serves": now.ds, "items": now.items}


def decided(results: dict[str, dict[str, Any]]) -> str:
    """What came of the night's challenger: `no challenger`, refused, promoted or undecided; and of a refit that was refused."""
    if "promote" not in results:
        return "no challenger"
    told = results["promote"].get("decision") or ("refused" if results["promote"].get("refused") else "failed")
    return f"{told}, refit refused" if results.get("refit", {}).get("refused") else str(told)


def sizes(lake: Path) -> dict[str, int]:
    """Bytes by folder of the lake (files beside them by name), and of all."""
    found: Counter[str] = Counter()
    for key, file in Place.of(lake).files("").items():
        found[key.split("/")[0]] += file.size
    return {**found, "all": found.total()}


def state(month: Month) -> dict[str, str]:
    """What a month must end with, as digests: the pointer, every vector and attribute online, and the lake's tables.

    Also `strangers`, a count, which must be 0.
    """
    lake = month.run("2026-01-01").lake
    reader = Reader.open(lake)
    pointer = reader.pointer()
    ids = snapshot_ids(lake, pointer.ds)
    rows = b"".join(item.encode() + (raw or b"") for item, (_, raw) in zip(ids, reader.rows(pointer.space, ids), strict=True))
    texts = []
    for start in range(0, len(ids), BATCH):
        some = reader.transport.read("item_attributes", {"item_id": ids[start : start + BATCH]}, ["content_hash"])
        texts += [str(values.get("content_hash")) for _, values in some]
    found = {
        "vectors online": hashlib.sha256(rows).hexdigest(),
        "attributes online": hashlib.sha256("".join(texts).encode()).hexdigest(),
        "strangers": str(strangers(lake, pointer)),
        "pointer": f"{pointer.space_id}@{pointer.ds} {pointer.items} {pointer.index}",
    }
    for name in TABLES:
        commits = [(one, partitions.read_commit(lake, name, one).digest) for one in partitions.committed(lake, name)]
        found[name] = hashlib.sha256(
            "".join(one + rows_digest(lake, name, one, digest) for one, digest in commits).encode()
        ).hexdigest()
    return found


@functools.cache
def rows_digest(lake: Path, name: str, partition: str, _commit: str) -> str:
    """Of a partition's rows as pyarrow writes them: in its footers, Spark's Parquet writer orders encodings by chance."""
    written = pa.BufferOutputStream()
    pq.write_table(pa.concat_tables(file.read() for file in partitions.read_files(lake, name, partition)), written)
    return hashlib.sha256(written.getvalue()).hexdigest()


def snapshot_ids(lake: Path, ds: str) -> list[str]:
    """Items of a snapshot, in order."""
    return sorted(
        item_id for batch in partitions.scan(lake, ITEMS, f"ds={ds}", ("item_id",)) for item_id in batch["item_id"].to_pylist()
    )


def strangers(lake: Path, pointer: Pointer) -> int:
    """Rows online of the space that serves, and of the one before, whose item is not in the snapshot of that space.

    All keys of the store are read, not its lists of a space: what a kill left may stand in none.
    """
    held = {space.space_id: set(snapshot_ids(lake, space.ds)) for space in spaces.live(pointer).values()}
    store = open_writer(settings(lake))
    named = (key_texts(views.item_embedding, key) for keys in store.keys(views.item_embedding) for key in set(keys))
    return sum(space_id in held and item_id not in held[space_id] for item_id, space_id in named)


def unlike(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """What differs between two states."""
    return [name for name in one if one[name] != other[name]]


def tell(keep: Path | None, record: dict[str, Any]) -> None:
    """A JSON line, printed and kept."""
    line = json.dumps(record, sort_keys=True)
    print(line, flush=True)
    if keep is not None:
        with keep.open("a") as file:
            file.write(line + "\n")


def days(first: str, count: int) -> Iterator[str]:
    """Dates, one after the other."""
    start = dt.date.fromisoformat(first)
    yield from (f"{start + dt.timedelta(days=number)}" for number in range(count))


def load(data: Path, home: Path, items: int = 0) -> tuple[pd.DataFrame, Path]:
    """Films with the date from which they are in the catalogue, and the logs."""
    events = pq.read_table(data / "interactions.parquet").to_pandas()[["user_id", "item_id", "timestamp"]]
    films = pq.read_table(data / "items.parquet").to_pandas()[["item_id", "title", "year", "genres"]]
    if items:
        films = films[films["item_id"].isin(events["item_id"].value_counts().index[:items])]
        events = events[events["item_id"].isin(films["item_id"])]
    since = pd.to_datetime(events.groupby("item_id")["timestamp"].min(), unit="s").dt.strftime("%Y-%m-%d")
    films["since"] = films["item_id"].map(since).fillna("1990-01-01")
    path = home / "events.parquet"
    pq.write_table(pa.Table.from_pandas(events, preserve_index=False), path)
    return films.sort_values("item_id"), path


def month_of(arguments: argparse.Namespace, home: Path) -> int:
    """The month, calm and killed; the exit status."""
    for name in (*WORK, "pretrain", "rat", "evaluate", "promote"):
        importlib.import_module(f"jobs.{name}")
    import mlflow  # noqa: F401 — loaded once, for every copy of this process

    os.environ["LLMEMB_CACHE"] = str(home / "cache")
    base = str(tiny.llama(home / "base"))
    films, events = load(arguments.data, home)
    names = ("calm", "killed") if arguments.kills else ("calm",)
    with cluster(home, names) if arguments.bucket or arguments.past else contextlib.nullcontext((None, {})) as (store, services):
        calm, rough = (
            Month(home=home / name, events=events, base=base, items=films, store=store, services=services.get(name, {}))
            for name in ("calm", "killed")
        )
        rough.kills = arguments.kills
        return replay_past(arguments, calm) if arguments.past else replay_both(arguments, calm, rough)


def replay_past(arguments: argparse.Namespace, month: Month) -> int:
    """A night each after so many nights."""
    assert month.store is not None
    night.registry = SimpleNamespace(champion=champion)  # type: ignore[assignment]
    month.enter()
    Java.start()
    month.prepare()
    dates = days(arguments.first, 1 + len(arguments.past))
    replay(month, next(dates), train=True, first=True)
    since = 1
    for number, (past, ds) in enumerate(zip(arguments.past, dates, strict=True), 1):
        month.store.repeat("calm", arguments.first, past - number)
        aside(lambda since=since, past=past: embed_more(month.run(arguments.first).lake, range(since, past)))
        since = past
        told = replay(month, ds, train=False, first=False)
        tell(arguments.keep, {"past": past, **{name: told[name] for name in ("requests", "counts", "seconds", "outcome")}})
    return 0


def embed_more(lake: Path, nights: range) -> None:
    """Nights that each embedded a few new texts, as `embed` leaves them."""
    (partition,) = partitions.committed(lake, "llm_embeddings")
    schema = partitions.read_schema(lake, "llm_embeddings", partition)
    table = llm_embeddings(schema.field("embedding").type.list_size)
    for number in nights:
        ids = [hashlib.sha256(f"{number} {text}".encode()).hexdigest()[:32] for text in range(5)]
        columns = {"item_id": ids, "content_hash": ids, "embedding": [[1.0] * schema.field("embedding").type.list_size] * 5}
        write_part(path := part_path(lake, table, partition, ids[0]), pa.table(columns, table.schema))
        commit_parts(lake, table, partition, [path], EmbedConfig.part_items)


def replay_both(arguments: argparse.Namespace, calm: Month, rough: Month) -> int:
    """Both months and the night after, told as they go. 1 where they end differently, or strangers are online after any night."""
    night.registry = SimpleNamespace(champion=champion)  # type: ignore[assignment]
    calm.enter()  # where the object store is, Java's Python is told once
    Java.start()
    dates = list(days(arguments.first, arguments.nights))
    ends: dict[str, list[dict[str, str]]] = {}
    for month in (calm, rough) if arguments.kills else (calm,):
        month.prepare()
        month.left = len(dates) * len(WORK) + 7 * (1 + len(dates) // 7)
        for number, ds in enumerate(dates):
            month.enter()
            told = replay(month, ds, train=number % 7 == 0, first=number == 0)
            if month is calm:
                for name, seconds in told["seconds"].items():
                    rough.usual.setdefault(name, []).append(seconds)
            ends.setdefault(month.home.name, []).append(aside(lambda month=month: state(month)))
            now = ends[month.home.name][-1]
            told |= {"month": month.home.name, "kills": sum(month.killed.values()), "strangers": int(now["strangers"])}
            tell(arguments.keep, told | {"differ": unlike(ends["calm"][number], now)})
    differ = unlike(ends["calm"][-1], ends.get("killed", ends["calm"])[-1])
    strange = sum(int(night["strangers"]) for nights in ends.values() for night in nights)
    end = {
        "nights": len(dates),
        "kills": sum(rough.killed.values()),
        "by_job": rough.killed,
        "differ": differ,
        "strangers": strange,
    }
    tell(arguments.keep, {"end": end, "calm": ends["calm"][-1], "killed": ends.get("killed", [{}])[-1]})
    ds = next(iter(days(f"{dt.date.fromisoformat(dates[-1]) + dt.timedelta(days=1)}", 1)))
    new = int(arguments.share * (calm.items["since"] <= ds).sum())
    calm.enter()
    told = replay(calm, ds, train=False, first=False, more=new)
    tell(arguments.keep, {"night_with_new_items": new, **told})
    return int(bool(differ or strange))


def hour_of(arguments: argparse.Namespace, home: Path) -> int:
    """An hour: 100 new rows in the table until the store answers with them."""
    os.environ["LLMEMB_CACHE"] = os.environ.get("LLMEMB_CACHE") or str(home / "cache")
    base = "embedded" if arguments.base == "embedded" else str(tiny.llama(home / "base"))
    films, events = load(arguments.data, home, arguments.items)
    month = Month(home=home / "hour", events=events, base=base, items=films)
    month.prepare()
    night.registry = SimpleNamespace(champion=champion)  # type: ignore[assignment]
    ds = arguments.first
    first = replay(month, ds, train=True, first=True)
    tell(arguments.keep, {"first_night": first["seconds"], "items": first["counts"]["catalogue"]})
    began = time.monotonic()
    month.tables(ds, arguments.new)
    words = [sys.executable, "-m", "jobs", "night", "--recipe", str(month.recipe), "--ds", ds, "--arriving"]
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    ids = [f"new-{item}" for item in films[films["since"] <= ds]["item_id"].head(arguments.new)]
    answer = Reader.open(month.home / "lake").vectors(ids)
    seconds = time.monotonic() - began
    found = {"base": arguments.base, "new": arguments.new, "answered": len(answer.item_ids), "seconds": round(seconds, 1)}
    tell(arguments.keep, {**found, "written": told["written"], "items": told["items"], "kind": told["kind"]})
    return int(len(answer.item_ids) != arguments.new)


def main() -> int:
    """One of the two; 0 without the data, saying so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("month", "past", "hour"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--first", default="2018-08-26")
    parser.add_argument("--nights", type=int, default=30)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--bucket", action="store_true", help="lakes on an object store, by the services of a cluster")
    parser.add_argument("--past", type=int, nargs="+", default=(), help="nights before each, in rising order")
    parser.add_argument("--share", type=float, default=0.01)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument(
        "--keep", type=Path, help="a file to which every line is added too, so that a run that is ended leaves its nights"
    )
    parser.add_argument("--base", choices=("tiny", "embedded"), default="tiny")
    parser.add_argument("--items", type=int, default=0, help="films of the catalogue, the most rated; 0 takes all")
    arguments = parser.parse_args()
    if not (arguments.data / "items.parquet").exists():
        print(json.dumps({"skipped": f"{arguments.data} holds no items.parquet: give MovieLens latest-small as --data"}))
        return 0
    with tempfile.TemporaryDirectory(prefix="month-") as name:
        return hour_of(arguments, Path(name)) if arguments.what == "hour" else month_of(arguments, Path(name))


if __name__ == "__main__":
    sys.exit(main())
