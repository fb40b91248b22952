"""`extract` into a folder and into a bucket, against DuckDB on the same logs, each with two threads and the same memory.

    python tests/benchmarks/bench_extract.py --interactions 1000000
    python tests/benchmarks/bench_extract.py --interactions 100000000 --nights 1
    python tests/benchmarks/bench_extract.py --interactions 10000000 --engines extract --partition
    python tests/benchmarks/bench_extract.py --nights 1 --engines start extract bucket duckdb extract bucket duckdb
    python tests/benchmarks/bench_extract.py --interactions 100000 --kills 10

With `--kills` it is killed (-9, Java too) at so many random instants, each in an empty lake in a bucket, and run again: it must
end with the objects of a calm run, beside what the killed one had put and no commit names (`left`).

A warehouse's tables are made first: Parquet, one folder a date, one user with 1 % of all events, one item in 10 %, the rest
Zipf-like, 1 % bad records. The second night has one date more. DuckDB cleans, deduplicates, orders and writes the same four
tables, its judged records a table and no view; `equal` says that figures and contents agree (with --partition, contents alone:
the second night `extract` then reads the newest dates and takes the rest from its first snapshot). Peak memory (resident) and
processor seconds are sums over the process tree, Java included; on a machine with other work, processor seconds compare better
than seconds. `bucket` is `extract` whose lake is on an object store of this machine (a server in Python, on the same cores:
`store_cpu_seconds`), with its requests; `start` is Spark's start alone, with the job's imports. What is named twice runs twice.
Needs `pip install -c infra/constraints.txt duckdb`. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

sys.path.insert(0, str(Path(__file__).parent))

from object_server import Server, object_server  # beside this file

from jobs.lake import partitions
from jobs.lake.tables import INTERACTIONS, ITEMS, SEQUENCES

ROOT = Path(__file__).resolve().parents[2]
DAY, DAYS, CHUNK = 86_400, 30, 1_000_000
FIRST = dt.date(2026, 3, 1)
HOT_USER, HOT_ITEM = 0.01, 0.1
BUCKET = 10_000_000
"""DuckDB sorts and gathers histories for about so many events at once: `list` does not spill to disk."""
MAX_HISTORY, VALID_SHARE, TEST_SHARE = 2_000, 0.1, 0.1


def main() -> None:
    """Makes the tables, runs both engines a night at a time, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interactions", type=int, default=1_000_000)
    parser.add_argument("--nights", type=int, choices=(1, 2), default=2)
    parser.add_argument("--engines", nargs="+", choices=("start", "extract", "bucket", "duckdb"), default=("extract", "duckdb"))
    parser.add_argument("--partition", action="store_true", help="extract reads by partition")
    parser.add_argument("--kills", type=int, default=0, help="only this: runs into a bucket that are killed and run again")
    parser.add_argument("--memory-gib", type=int, default=4, help="Java's heap; DuckDB's memory_limit")
    parser.add_argument("--spark", action="append", default=[], metavar="KEY=VALUE", help="a Spark setting more")
    parser.add_argument("--folder", type=Path, default=None, help="where the tables are made and removed again")
    parser.add_argument("--duckdb", nargs=2, metavar=("HOME", "DS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.duckdb:
        print(json.dumps(in_duckdb(Path(arguments.duckdb[0]), arguments.duckdb[1], arguments.memory_gib)))
        return
    with tempfile.TemporaryDirectory(prefix="extract-", dir=arguments.folder) as name, object_server() as server:
        server.make("lake")
        print(json.dumps(measure(Path(name), arguments, server), sort_keys=True))


def measure(home: Path, arguments: argparse.Namespace, server: Server) -> dict[str, Any]:
    """The figures of one size."""
    started = time.monotonic()
    write_items(home, arguments.interactions // 100)
    write_days(home, arguments.interactions, range(DAYS))
    if arguments.kills:
        return killed(home, arguments, server)
    figures: dict[str, Any] = {"interactions": arguments.interactions, "cores": os.cpu_count()}
    figures |= {"memory_gib": arguments.memory_gib, "generate_seconds": round(time.monotonic() - started, 1)}
    for night in range(arguments.nights):
        if night:
            write_days(home, arguments.interactions, range(DAYS, DAYS + 1))
        ds = f"{FIRST + dt.timedelta(days=DAYS - 1 + night)}"
        runs = dict[str, dict[str, Any]]()
        for number, engine in enumerate(arguments.engines):
            name = f"{engine} again" if engine in arguments.engines[:number] else engine
            runs[name] = timed(command(engine, home, ds, arguments), home, server)
            print(name, {key: value for key, value in runs[name].items() if key != "result"}, file=sys.stderr)
        figures[f"night_{night + 1}"] = compared(home, ds, runs, whole=not (night and arguments.partition))
    figures["source_mib"] = round(sum(file.stat().st_size for file in (home / "source").rglob("*.parquet")) / 2**20)
    return figures


def killed(home: Path, arguments: argparse.Namespace, server: Server) -> dict[str, Any]:
    """How many runs into a bucket were killed before they ended, and which of them left other objects when run again."""
    chance, ds = random.Random(1), f"{FIRST + dt.timedelta(days=DAYS - 1)}"
    calm = timed(command("bucket", home, ds, arguments), home, server)
    wanted = server.committed("lake", "here/")
    done: dict[str, Any] = {"kills": 0, "calm_seconds": calm["seconds"], "seconds_to_kill": [], "unequal": [], "left": []}
    while done["kills"] < arguments.kills:
        words = command("bucket", home, ds, arguments, f"killed{done['kills']}")
        seconds = round(chance.uniform(0, calm["seconds"]), 1)
        with subprocess.Popen(
            words, cwd=ROOT, env=environment(home, server), stdout=subprocess.DEVNULL, start_new_session=True
        ) as job:
            time.sleep(seconds)
            ended = job.poll() is not None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
        timed(words, home, server)
        found = server.committed("lake", f"killed{done['kills']}/")
        if found["objects"] != wanted["objects"]:
            done["unequal"].append(seconds)
        if not ended:
            done["kills"] += 1
            done["seconds_to_kill"].append(seconds)
            done["left"].append(found["left"])
    return done


def environment(home: Path, server: Server) -> dict[str, str]:
    """The variables of a job."""
    return os.environ | server.environment | {"LLMEMB_SCRATCH": str(home / "scratch lake")}


def compared(home: Path, ds: str, runs: dict[str, dict[str, Any]], whole: bool) -> dict[str, Any]:
    """One night's figures; with both engines also their ratio, and whether they agree on what both of them read."""
    results = {name: funnel(run.pop("result")) for name, run in runs.items() if run.get("result")}
    first = next(iter(results.values()), {})
    night: dict[str, Any] = {**runs, **first}
    for name in results:
        if "status" not in runs[name]:
            runs[name]["rows_per_s"] = round(first["seen"]["interactions"] / runs[name]["seconds"])
    if {"extract", "duckdb"} <= results.keys():
        same = all(result == first for result in results.values())
        night["equal"] = (same or not whole) and contents(home / "lake", home / "duckdb", ds)
    for name in results.keys() - {"extract"} if "extract" in results else ():
        for what in ("seconds", "cpu_seconds"):
            night[f"extract over {name}, {what}"] = round(runs["extract"][what] / runs[name][what], 2)
    return night


def funnel(result: dict[str, Any]) -> dict[str, Any]:
    """What both engines have to agree on."""
    return {name: result[name] for name in ("rows", "seen", "later", "quarantined", "cuts")}


# ---------------------------------------------------------------------------------------------------------------- source


def write_items(home: Path, items: int) -> None:
    """The catalogue: four attributes, and one in a thousand each without attributes, without id, or there twice."""
    random = np.random.default_rng(1)
    words = pa.array(["".join(random.choice(list("aeioulnrstkmé"), random.integers(3, 10))) for _ in range(4_000)])

    def texts(rows: int, least: int, most: int) -> pa.ListArray:
        ends = np.concatenate(([0], np.cumsum(random.integers(least, most + 1, rows)))).astype(np.int32)
        return pa.ListArray.from_arrays(ends, words.take((4_000 * random.random(ends[-1]) ** 3).astype(np.int64)))

    def rows(numbers: np.ndarray[Any, Any], bare: np.ndarray[Any, Any], nameless: np.ndarray[Any, Any]) -> pa.Table:
        count, no_brand = len(numbers), pa.array(bare | (random.random(len(numbers)) < 0.2))
        ids = pc.if_else(pa.array(nameless), pa.scalar(None, pa.string()), item_ids(numbers))
        title, brand = pc.binary_join(texts(count, 3, 9), " "), pc.binary_join(texts(count, 1, 1), " ")
        text = pc.binary_join(texts(count, 20, 60), " ")
        hide = pa.array(bare)
        return pa.table({
            "item_id": ids, "title": pc.if_else(hide, None, title), "brand": pc.if_else(no_brand, None, brand),
            "categories": pc.if_else(hide, None, texts(count, 1, 4)), "description": pc.if_else(hide, None, text)})  # fmt: skip

    def parts() -> Iterator[pa.Table]:
        for start in range(0, items, CHUNK // 10):
            numbers = np.arange(start, min(start + CHUNK // 10, items))
            yield rows(numbers, numbers % 1_000 == 997, np.zeros(len(numbers), bool))
            again = numbers[numbers % 1_000 == 998]
            # a second record with less in it: which of two is kept is then no matter of taste
            yield rows(again, np.ones(len(again), bool), np.zeros(len(again), bool))
            yield rows(again, np.zeros(len(again), bool), np.ones(len(again), bool))

    write(home / "source" / "items" / "part-0.parquet", parts())


def write_days(home: Path, interactions: int, days: range) -> None:
    """The logs of some dates, a folder each as a warehouse partitions them."""
    users, items, per_day = interactions // 20, interactions // 100, interactions // DAYS

    def parts(day: int) -> Iterator[pa.Table]:
        for start in range(0, per_day, CHUNK):
            yield events(np.random.default_rng([2, day, start]), day, min(CHUNK, per_day - start), users, items)

    for day in days:
        date = FIRST + dt.timedelta(days=day)
        write(home / "source" / "interactions" / f"date={date}" / "part-0.parquet", parts(day))


def events(random: np.random.Generator, day: int, rows: int, users: int, items: int) -> pa.Table:
    """Events of one date in the order of time."""
    start = int(dt.datetime.combine(FIRST, dt.time(), dt.UTC).timestamp()) + day * DAY
    moment = start + np.sort(random.integers(0, DAY, rows))
    user = np.where(random.random(rows) < HOT_USER, 0, (users * random.random(rows) ** 2).astype(np.int64))
    # log-uniform ranks: Zipf's law with exponent 1
    item = np.where(random.random(rows) < HOT_ITEM, 0, np.exp(np.log(items) * random.random(rows)).astype(np.int64))
    fault = (random.random(rows) * 1_000).astype(np.int64)
    again = np.flatnonzero(fault[1:] < 4) + 1
    for column in (user, item, moment):
        column[again] = column[again - 1]
    item = np.where(fault == 4, items + item, item)  # unknown
    moment = np.select([fault == 5, fault == 6, fault == 7], [moment * 1_000, -moment, moment + DAY], moment)
    none = pa.scalar(None, pa.string())
    return pa.table({
        "user_id": pc.if_else(pa.array(fault == 8), none, pc.binary_join_element_wise("u", pa.array(user).cast("string"), "")),
        "item_id": pc.if_else(pa.array(fault == 9), none, item_ids(item)),
        "timestamp": pa.array(moment, mask=fault == 10)})  # fmt: skip


def item_ids(numbers: np.ndarray[Any, Any]) -> pa.Array:
    """Ids of ten characters."""
    return pc.binary_join_element_wise("B", pc.utf8_lpad(pa.array(numbers).cast("string"), 9, "0"), "")


def write(path: Path, parts: Iterator[pa.Table]) -> None:
    """One Parquet file; memory holds one part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = next(parts)
    with pq.ParquetWriter(path, first.schema, compression="zstd") as file:
        file.write_table(first)
        for part in parts:
            file.write_table(part)


# --------------------------------------------------------------------------------------------------------------- engines


def command(engine: str, home: Path, ds: str, arguments: argparse.Namespace, prefix: str = "here") -> list[str]:
    """The engine's command line; its last line of output is its figures as JSON."""
    if engine == "duckdb":
        return [sys.executable, __file__, "--duckdb", str(home), ds, "--memory-gib", str(arguments.memory_gib)]
    if engine == "start":
        return [sys.executable, "-c", START]
    spark = {"spark.master": "local[2]", "spark.driver.memory": f"{arguments.memory_gib}g", "spark.local.dir": f"{home}/scratch"}
    spark |= dict(setting.split("=", 1) for setting in arguments.spark)
    tables = {name: json.dumps(str(home / "source" / name)) for name in ("items", "interactions")}
    recipe, lake = home / "recipe.toml", f"s3://lake/{prefix}" if engine == "bucket" else str(home / "lake")
    recipe.write_text(
        f"[run]\nlake = {json.dumps(lake)}\n"
        f"[extract]\nmax_history = {MAX_HISTORY}\nvalid_share = {VALID_SHARE}\ntest_share = {TEST_SHARE}\n"
        f'[extract.items]\ntable = {tables["items"]}\nattributes = ["title", "brand", "categories", "description"]\n'
        f"[extract.interactions]\ntable = {tables['interactions']}\n"
        + ('partition = "date"\n' if arguments.partition else "")
        + "[extract.spark]\n"
        + "".join(f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in spark.items())
    )
    return [sys.executable, "-m", "jobs", "extract", "--recipe", str(recipe), "--ds", ds]


START = """
import jobs.extract
from jobs.engines.spark import session
spark = session("extract", {"spark.master": "local[2]", "spark.driver.memory": "4g"})
spark.range(1).count()
spark.stop()
print("{}")
"""
"""What every run of `extract` does before and after its own work."""


def timed(arguments: list[str], home: Path, server: Server) -> dict[str, Any]:
    """Seconds of a command, processor seconds and peak of its process tree, MiB: of all, of Python's driver, of Java."""
    started, peak, processors, parts = time.monotonic(), 0, dict[int, float](), Counter[str]()
    server.counts()
    store_s = server.cpu_seconds()
    with (
        (home / "out").open("w+") as out,
        subprocess.Popen(arguments, cwd=ROOT, stdout=out, env=environment(home, server)) as process,
    ):
        while process.poll() is None:
            pages, spent, now = tree(process.pid)
            peak, processors, parts = max(peak, pages), processors | spent, parts | now
            time.sleep(0.2)
        seconds = time.monotonic() - started
        out.seek(0)
        lines = out.read().splitlines()
    # Java is no child that anyone waits for: its processor time is what was last seen of it
    figures: dict[str, Any] = {"seconds": round(seconds, 1), "cpu_seconds": round(sum(processors.values()), 1)}
    figures["peak_mib"] = round(peak / 2**20)
    figures["peak_mib_by"] = {name: round(size / 2**20) for name, size in parts.items()}
    if asked := server.counts():
        figures |= {"requests": asked, "store_cpu_seconds": round(server.cpu_seconds() - store_s, 1)}
    # an engine that ran out of memory is a figure too
    return {**figures, "status": process.returncode} if process.returncode else {**figures, "result": json.loads(lines[-1])}


def tree(root: int) -> tuple[int, dict[int, float], Counter[str]]:
    """Resident bytes of a process and all below it together, the processor seconds of each; bytes of it, of Java, of others."""
    parents, pages, seconds, java = {}, {}, {}, set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # the name in parentheses may hold anything: fields count from behind it
                name, _, rest = (entry / "stat").read_text().rpartition(")")
                fields = rest.split()
            except OSError:  # it has ended meanwhile
                continue
            process = int(entry.name)
            if name.endswith("(java"):
                java.add(process)
            parents[process], pages[process] = int(fields[1]), int(fields[21])
            seconds[process] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    found, below = {root} & set(pages), {root}
    while below:
        below = {process for process, parent in parents.items() if parent in below}
        found |= below
    parts = Counter[str]()
    for process in found:
        kind = "driver" if process == root else "java" if process in java else "workers"
        parts[kind] += pages[process] * os.sysconf("SC_PAGE_SIZE")
    return parts.total(), {process: seconds[process] for process in found}, parts


JUDGED_ITEMS = """
create table items as
with told as (
  select trim(item_id) as item_id,
    list_filter([
      {'name': 'title', 'value': nullif(trim(title), '')}, {'name': 'brand', 'value': nullif(trim(brand), '')},
      {'name': 'categories', 'value': nullif(array_to_string(list_filter(categories, lambda c: length(trim(c)) > 0), ', '), '')},
      {'name': 'description', 'value': nullif(trim(description), '')}], lambda pair: pair.value is not null) as attributes,
    to_json(source)::varchar as record
  from read_parquet('$source/items/*.parquet') as source)
select *, substring(sha256(array_to_string(list_transform(attributes, lambda p:
    length(p.name) || ':' || p.name || length(p.value) || ':' || p.value), '')), 1, 32) as content_hash,
  case when coalesce(item_id, '') = '' then 'item_id is null or empty'
    when row_number() over (partition by item_id order by len(attributes) desc, record) > 1
      then 'duplicate item_id: the fullest record was kept'
    when len(attributes) = 0 then 'no attributes' end as reason
from told"""

JUDGED_EVENTS = """
create table events as
with told as (
  select trim(user_id) as user_id, trim(item_id) as item_id, timestamp, source
  from read_parquet('$source/interactions/*/*.parquet', hive_partitioning = true) as source)
select told.user_id, told.item_id, told.timestamp,
  coalesce(told.timestamp between $end and $now + 86400, false) as later,
  case when later then null
    when coalesce(told.user_id, '') = '' then 'user_id is null or empty'
    when coalesce(told.item_id, '') = '' then 'item_id is null or empty'
    when told.timestamp is null then 'timestamp is null or not a number'
    when told.timestamp < 0 then 'timestamp is before 1970'
    when told.timestamp > 100000000000 then 'timestamp is not in s: set extract.interactions.unit'
    when told.timestamp > $now + 86400 then 'timestamp is in the future'
    when known.item_id is null then 'item is unknown' end as reason,
  case when reason is not null then to_json(source)::varchar end as record
from told left join (select item_id from items where reason is null) as known on told.item_id = known.item_id"""

COPIES = """
create table copies as select user_id, item_id, timestamp, count(*) as copies from events
where reason is null and not later group by all"""

QUARANTINE = """
create table quarantine as
select 'items' as source, item_id as key, reason, record from items where reason is not null
union all select 'interactions', user_id, reason, record from events where reason is not null
union all select 'interactions', user_id, 'duplicate event',
  to_json({'user_id': user_id, 'item_id': item_id, 'timestamp': timestamp, 'copy': unnest(range(2, copies + 1))})::varchar
from copies where copies > 1"""

TABLES = {
    "quarantine": "select * from quarantine order by source, reason, record",
    "items": "select item_id, attributes, content_hash, '$ds' as first_seen_ds from items where reason is null order by item_id",
    "interactions": "select user_id, item_id, timestamp from copies where $mine order by user_id, timestamp, item_id",
    "sequences": """
with users as (
  select user_id, list_slice(list({'at': timestamp, 'item_id': item_id} order by timestamp, item_id), -$history, -1) as events
  from copies where $mine group by user_id)
select user_id, list_transform(events, lambda e: e.item_id) as item_ids, list_transform(events, lambda e: e.at) as timestamps,
  len(list_filter(events, lambda e: e.at < $valid))::int as train_end,
  len(list_filter(events, lambda e: e.at < $test))::int as valid_end
from users order by user_id""",
}


def in_duckdb(home: Path, ds: str, memory_gib: int) -> dict[str, Any]:
    """What `extract` does, in DuckDB."""
    import duckdb  # type: ignore[import-not-found,unused-ignore]

    out = home / "duckdb"
    out.mkdir(exist_ok=True)
    end = int(dt.datetime.combine(dt.date.fromisoformat(ds), dt.time(), dt.UTC).timestamp()) + DAY
    values = {"source": home / "source", "end": end, "now": int(time.time()), "ds": ds, "history": MAX_HISTORY}
    settings = {"threads": 2, "memory_limit": f"{memory_gib}GiB", "temp_directory": str(out / "spill")}
    base = out / f"{ds}.duckdb"
    base.unlink(missing_ok=True)
    with duckdb.connect(str(base), config={**settings, "preserve_insertion_order": False}) as db:

        def ask(query: str) -> list[tuple[Any, ...]]:
            for name, value in values.items():
                query = query.replace(f"${name}", str(value))
            found: list[tuple[Any, ...]] = db.execute(query).fetchall()
            return found

        for statement in (JUDGED_ITEMS, JUDGED_EVENTS, COPIES, QUARANTINE):
            ask(statement)
        hashed = "sum(hash(user_id, item_id, timestamp)::hugeint)"
        ((seen, later, _),) = ask(f"select count_if(not later), count_if(later), {hashed} from events")
        quarantined = ask("select source || ': ' || reason, count(*) from quarantine group by all")
        days = ask("select timestamp // 86400 as day, count(*) from copies group by all order by all")
        cuts = cut_days(days)
        values |= {"valid": cuts["valid"] * DAY, "test": cuts["test"] * DAY}
        buckets = max(1, round(sum(count for _, count in days) / BUCKET))
        rows = dict.fromkeys(TABLES, 0)
        for name, query in TABLES.items():
            for bucket in range(buckets if "$mine" in query else 1):
                file = out / f"{name}-{ds}-{bucket}.parquet"
                values["mine"] = f"hash(user_id) % {buckets} = {bucket}"
                rows[name] += ask(f"copy ({query}) to '{file}' (format parquet, compression zstd)")[0][0]
                with file.open("rb") as stream:
                    hashlib.file_digest(stream, "sha256")
        items = ask("select count(*) from items")[0][0]
    base.unlink()
    return {
        "rows": rows,
        "seen": {"items": items, "interactions": seen},
        "later": later,
        "quarantined": dict(quarantined),
        "cuts": {name: f"{dt.date(1970, 1, 1) + dt.timedelta(days=day)}" for name, day in cuts.items()},
    }


def cut_days(days: list[tuple[Any, ...]]) -> dict[str, int]:
    """The days at whose midnights validation and test begin."""
    counts = np.array([count for _, count in days], np.float64)
    before = (np.cumsum(counts) - counts) / counts.sum()
    shares = {"valid": 1 - TEST_SHARE - VALID_SHARE, "test": 1 - TEST_SHARE}
    return {name: int(days[int(np.abs(before - share).argmin())][0]) for name, share in shares.items()}


def contents(lake: Path, theirs: Path, ds: str) -> bool:
    """Whether both engines wrote the same rows, in any order."""
    import duckdb

    def digest(files: list[str], columns: list[str]) -> object:
        return duckdb.sql(f"select count(*), sum(hash({', '.join(columns)})::hugeint) from read_parquet({files})").fetchall()

    duckdb.sql("set threads = 2")
    for table in (ITEMS, INTERACTIONS, SEQUENCES):
        part = f"ds={ds}"
        here = partitions.folder(lake, table.name, part)
        ours = [str(here / name) for name in partitions.read_commit(lake, table.name, part).files]
        columns = [name for name in table.schema.names if name != "first_seen_ds"]
        if digest(ours, columns) != digest([str(theirs / f"{table.name}-{ds}-*.parquet")], columns):
            return False
    return True


if __name__ == "__main__":
    main()
