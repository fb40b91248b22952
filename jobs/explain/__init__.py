"""An item -> where its online vector came from, link by link, digests verified against the bytes; and who its neighbours are."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.lake import partitions
from jobs.lake.items import content_hash, tombstones
from jobs.lake.partitions import digest_file, digest_folder
from jobs.lake.tables import INTERACTIONS
from jobs.run import InputError, Refused, Run
from models.text.prompts import as_policy, render

if TYPE_CHECKING:
    from feature_repo.reader import Answer, Pointer, Reader, Space

Verdict = Literal["verified", "broken", "unknown"]
MARKS: dict[Verdict, str] = {"verified": "ok", "broken": "BROKEN", "unknown": "not checked"}
SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is explained."""

    run: Run
    item: str | int
    """The item's id."""
    neighbours: int = 5
    """Nearest items shown, in the space that serves and in the one before."""
    url: str = ""
    """Reads through Feast's feature server, for example `http://localhost:6566`; empty reads the store itself."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """One step of the chain."""

    step: str
    identity: str
    """Id of an artifact, or the table's partition."""
    digest: str
    """As computed now from the bytes; empty where there are none to read."""
    verdict: Verdict
    """`verified`: the bytes are those that were recorded; `unknown`: nothing was recorded, or it is gone."""
    text: str
    depth: int
    """How far from the vector."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """An item near by."""

    item_id: str
    title: str
    score: float
    """Dot product."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The chain of an item's vector. A broken chain is no result: it ends the job with status 3."""

    item_id: str
    title: str
    space_id: str
    recommender_id: str
    encoder_id: str
    serves_ds: str
    links: tuple[Link, ...]
    """From the vector back to the source."""
    unchecked: int
    """Links of which nothing was recorded."""
    text: str
    """What the LLM read; empty where the encoder or the item's text is gone."""
    vector: list[float]
    """The first numbers of the online vector."""
    norm: float
    neighbours: tuple[Neighbour, ...]
    neighbours_before: tuple[Neighbour, ...]
    """In the space that served before; empty where there is none, or it was collected."""
    kept_neighbours: int
    """How many are in both lists."""
    seconds: float
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Walks from the online vector to the source snapshot.

    Raises InputError for an item that is not served, with the reason; Refused, naming the first broken link, where bytes are not
    those that were recorded.
    """
    started = time.monotonic()
    import_feast()
    from jobs.engines import online

    lake, item_id = config.run.lake, str(config.item)
    reader = open_reader(config)
    pointer = online.served(reader)
    answer = reader.vectors([item_id])
    if not answer.item_ids:
        raise InputError(absent(lake, item_id, pointer, deleted=bool(answer.deleted)))
    row, links = walk(lake, item_id, answer)
    near, before = (neighbours(config, space, item_id) for space in (pointer.space, pointer.previous))
    made_by = online.recommender_of(lake, pointer.space_id)
    names = titles(lake, pointer.ds, [item_id, *(found for found, _ in [*near, *before])])
    result = Result(
        item_id=item_id,
        title=names[item_id],
        space_id=pointer.space_id,
        recommender_id=made_by["recommender_id"] or pointer.recommender_id,
        encoder_id=made_by["encoder_id"],
        serves_ds=pointer.ds,
        links=tuple(links),
        unchecked=sum(link.verdict == "unknown" for link in links),
        text=prompt(lake, made_by["encoder_id"], row),
        vector=[round(float(value), 6) for value in answer.vector_ND[0, :SHOWN]],
        norm=round(float(np.linalg.norm(answer.vector_ND[0])), 6),
        neighbours=named(near, names),
        neighbours_before=named(before, names),
        kept_neighbours=len({found for found, _ in near} & {found for found, _ in before}),
        seconds=round(time.monotonic() - started, 3),
        inputs={link.identity: link.digest for link in links if link.digest},
        outputs={},
        rows={},
    )
    tell(result, pointer)
    if broken := [link for link in links if link.verdict == "broken"]:
        raise Refused(f"the chain of item {item_id!r} is broken at {broken[0].step} {broken[0].identity}: {broken[0].text}")
    return result


# ---------------------------------------------------------------------------------------------------------------- reading


def import_feast() -> None:
    """Imports Feast in 1 s instead of 5: without torch, and without the type checks that it compiles into itself at import.

    An answer within three seconds needs that, and reading a vector needs neither. Does nothing where Feast is loaded already.
    """
    if "feast" in sys.modules:
        return
    import typeguard

    checked, torch = typeguard.typechecked, sys.modules.get("torch")
    typeguard.typechecked = unchecked
    if torch is None:
        sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails, which Feast expects
    try:
        import feast  # noqa: F401
    finally:
        typeguard.typechecked = checked
        if torch is None:
            del sys.modules["torch"]


def unchecked(target: Any = None, **options: Any) -> Any:
    """What `typeguard.typechecked` is under `python -O`: it leaves classes and functions as they are."""
    return (lambda later: later) if target is None else target


def open_reader(config: Config) -> Reader:
    """Reads as a client does."""
    from feature_repo.reader import Reader

    return Reader.over_http(config.url) if config.url else Reader.open(config.run.lake)


def absent(lake: Path, item_id: str, pointer: Pointer, *, deleted: bool) -> str:
    """Why an item has no vector."""
    if deleted or item_id in tombstones(lake):
        return f"explain.item {item_id!r} was forgotten: nothing of it is served, and nothing is left to explain"
    partition = partitions.latest(lake, "items", "9999-12-31")
    if find(lake, "items", partition, "item_id", item_id):
        return f"explain.item {item_id!r} is in items/{partition} but not in what serves, which is of {pointer.ds}: publish first"
    return f"explain.item {item_id!r} is in neither the catalogue items/{partition} nor what serves: take one of its item_id"


Found = tuple[Path, dict[str, Any]]
"""The file that holds a row, and the row."""


def find(lake: Path, table: str, partition: str, column: str, value: str) -> Found | None:
    """The first row with this value; of other rows no more than that column, and only where the value can be, is read."""
    here = partitions.folder(lake, table, partition)
    for name in partitions.read_commit(lake, table, partition).files:
        with pq.ParquetFile(here / name) as file:
            at = file.schema_arrow.get_field_index(column)
            for group in range(file.num_row_groups):
                known = file.metadata.row_group(group).column(at).statistics
                if known is not None and known.has_min_max and not known.min <= value <= known.max:
                    continue
                row = pc.index(file.read_row_group(group, columns=[column])[column], value).as_py()
                if row >= 0:
                    return here / name, file.read_row_group(group).slice(row, 1).to_pylist()[0]
    return None


def origin(lake: Path, jobs: Sequence[str], digest: str) -> dict[str, Any] | None:
    """The newest manifest of these jobs (as file patterns) that recorded `digest` as an output."""
    paths = [path for job in jobs for path in (lake / "manifests").glob(f"ds=*/{job}.json")]
    for path in sorted(paths, key=lambda path: path.parent.name, reverse=True):
        manifest: dict[str, Any] = json.loads(path.read_text())
        if manifest.get("status") == "done" and digest in manifest["result"].get("outputs", {}).values():
            return manifest
    return None


# ------------------------------------------------------------------------------------------------------------------ chain


def walk(lake: Path, item_id: str, answer: Answer) -> tuple[dict[str, Any], list[Link]]:
    """The item's row of `items` (empty where it is gone), and all links."""
    pointer = answer.pointer
    vectors, table_link, project = table_step(
        lake, "item_embeddings", f"space={pointer.space_id}/ds={pointer.ds}", "item_id", item_id, ("project", "forget"), 1
    )
    text_hash = str(vectors.get("content_hash", ""))
    snapshot = snapshot_of(lake, project, pointer.ds)
    row, items_link, extract = table_step(lake, "items", f"ds={snapshot}", "item_id", item_id, ("extract", "forget"), 2)
    ids = ids_of(lake, pointer)
    links = [
        online_step(answer, vectors),
        table_link,
        *recommender_steps(lake, ids, pointer),
        *encoder_steps(lake, ids["encoder_id"], text_hash),
        text_checked(items_link, row, text_hash),
        source_step(extract),
    ]
    return row, links


def ids_of(lake: Path, pointer: Pointer) -> dict[str, str]:
    """Encoder and recommender of the space that serves; empty texts where the lake does not hold them."""
    from jobs.engines import online

    return online.recommender_of(lake, pointer.space_id)


def snapshot_of(lake: Path, project: dict[str, Any] | None, ds: str) -> str:
    """Date of the `items` that a space was made of: the one whose digest `project` recorded, else the newest up to ds."""
    wanted = project["result"]["inputs"].get("items") if project else None
    dates = [name for name in partitions.committed(lake, "items") if name <= f"ds={ds}"]
    same = [name for name in dates if partitions.read_commit(lake, "items", name).digest == wanted]
    return (same or dates or [f"ds={ds}"])[-1].removeprefix("ds=")


def online_step(answer: Answer, row: dict[str, Any]) -> Link:
    """The vector that a client reads, against the lake's row."""
    from feature_repo.reader import encode

    pointer = answer.pointer
    as_of = f"as of {answer.as_of[0]:%Y-%m-%d %H:%M} UTC"
    text = f"width {pointer.width}, {pointer.codec}, {as_of}, write {pointer.sequence} of the pointer"
    verdict: Verdict = "unknown"
    if row:
        wanted = encode(np.asarray([row["embedding"]], np.float32), pointer.codec)
        same = wanted == encode(answer.vector_ND, pointer.codec)
        verdict = "verified" if same else "broken"
        text += ", equal to the lake's row" if same else ": it differs from the lake's row; publish again"
    return Link(step="online vector", identity=f"space {pointer.space_id}", digest="", verdict=verdict, text=text, depth=0)


def table_step(
    lake: Path, table: str, partition: str, column: str, value: str, jobs: Sequence[str], depth: int
) -> tuple[dict[str, Any], Link, dict[str, Any] | None]:
    """A row, the link of its partition, and the manifest of the job that wrote it.

    The file that holds the row is hashed, the commit over all files is checked, and the commit against the manifest.
    """
    link = Link(step=table, identity=f"{table}/{partition}", digest="", verdict="unknown", text="not in the lake", depth=depth)
    try:
        commit = partitions.read_commit(lake, table, partition)
        found = find(lake, table, partition, column, value)
    except InputError:
        return {}, link, None
    except (OSError, ValueError) as error:
        text = f"a file can't be read ({type(error).__name__}: {error}): write the partition again"
        return {}, replace(link, verdict="broken", text=text), None
    manifest = origin(lake, jobs, commit.digest)
    if found is None:
        return {}, replace(link, verdict="broken", text="the row is missing: write the partition again"), manifest
    entries = {entry["name"]: entry["sha256"] for entry in commit_entries(lake, table, partition)}
    verdict: Verdict
    if digest_file(found[0]) != entries[found[0].name]:
        verdict, text = "broken", f"the bytes of {found[0].name} are not those that were committed: write the partition again"
    elif manifest is None:
        verdict, text = "unknown", "the file is as committed, but no manifest names this partition as its output"
    else:
        verdict, text = "verified", f"{written_by(manifest)}; row in {found[0].name}, one of {len(entries)}, {commit.rows:,} rows"
    return found[1], replace(link, digest=commit.digest, verdict=verdict, text=text), manifest


def commit_entries(lake: Path, table: str, partition: str) -> list[dict[str, Any]]:
    """Files of a partition with their digests."""
    value = json.loads((partitions.folder(lake, table, partition) / partitions.COMMIT).read_text())
    return list(value["files"])


def written_by(manifest: dict[str, Any]) -> str:
    """Job, date and code of a manifest."""
    return f"{manifest['job']} of {manifest['ds']}, code {manifest.get('code_revision', 'unknown')}"


def artifact_step(lake: Path, kind: str, identity: str, jobs: Sequence[str], text: str, depth: int) -> Link:
    """An artifact, whose id is the digest of its bytes."""
    path = lake / "models" / kind / identity
    if not identity or not path.is_dir():
        gone = "not in the lake: it can be fetched from the model registry"
        return Link(step=kind, identity=identity or "unknown", digest="", verdict="unknown", text=gone, depth=depth)
    digest = digest_folder(path)
    manifest = origin(lake, jobs, identity)
    by = f"{written_by(manifest)}, {text}" if manifest else text
    same = digest.startswith(identity)
    text = by if same else f"its bytes are {digest[:16]}: remove it and fetch it from the registry, or train again"
    return Link(
        step=kind, identity=identity, digest=digest, verdict="verified" if same else "broken", text=text, depth=depth
    )  # fmt: skip


def recommender_steps(lake: Path, ids: dict[str, str], pointer: Pointer) -> Iterator[Link]:
    """The recommender, and the gate that let it out."""
    identity = ids["recommender_id"] or pointer.recommender_id
    path = lake / "models" / "recommender" / identity / "recommender.json"
    text = ""
    if identity and path.exists():
        known = json.loads(path.read_text())
        backbone = known.get("backbone", {})
        text = f"{backbone.get('name', 'SRS')} of width {backbone.get('width', pointer.width)}; the encoder and it make the space"
        if turned := known.get("rotation"):
            text += f"; turned towards that of {turned['to']}, residual {turned['residual']}"
    yield artifact_step(lake, "recommender", identity, ("rat",), text, 2)
    yield gate_step(lake, identity)


def gate_step(lake: Path, recommender_id: str) -> Link:
    """The promotion of a recommender: the decision, and whether the metrics it rests on are still those bytes."""
    unknown = Link(
        step="gate", identity=recommender_id or "unknown", digest="", verdict="unknown", depth=3,
        text="no promotion is recorded: published by hand, or not under this lake",
    )  # fmt: skip
    for path in sorted((lake / "manifests").glob("ds=*/promote.json"), reverse=True):
        manifest = json.loads(path.read_text())
        result = manifest.get("result", {})
        if result.get("recommender_id") != recommender_id:
            continue
        reasons = result.get("reasons", [])
        passed = sum(reason["verdict"] == "passed" for reason in reasons)
        by = f", approved by {result['approved_by']}" if result.get("approved_by") else ""
        text = (
            f"{result['decision']} on {manifest['ds']}{by}: {passed} of {len(reasons)} gates passed, version {result['version']}"
        )
        wanted = result["inputs"].get("metrics", "")
        try:
            entries = commit_entries(lake, "metrics", f"ds={manifest['ds']}")
            here = partitions.folder(lake, "metrics", f"ds={manifest['ds']}")
            same = partitions.read_commit(lake, "metrics", f"ds={manifest['ds']}").digest == wanted
            whole = all(digest_file(here / entry["name"]) == entry["sha256"] for entry in entries)
        except (InputError, OSError):
            return replace(unknown, text=f"{text}; the metrics it rests on are gone")
        if not same:
            return replace(unknown, text=f"{text}; the metrics were written again since")
        verdict: Verdict = "verified" if whole else "broken"
        text = text if whole else f"{text}; the metrics it rests on are not the bytes that were committed: run evaluate again"
        return Link(step="gate", identity=f"metrics/ds={manifest['ds']}", digest=wanted, verdict=verdict, text=text, depth=3)
    return unknown


def encoder_steps(lake: Path, encoder_id: str, text_hash: str) -> Iterator[Link]:
    """The LLM embedding of the item's text, and its encoder."""
    under = partitions.committed(lake, "llm_embeddings", f"encoder={encoder_id}") if encoder_id else []
    link = Link(
        step="llm_embeddings", identity=f"encoder={encoder_id or 'unknown'}", digest="", verdict="unknown", depth=2,
        text="no embedding of this text is in the lake",
    )  # fmt: skip
    for partition in under:
        row, found, _ = table_step(lake, "llm_embeddings", partition, "content_hash", text_hash, ("embed*", "forget"), 2)
        if row or found.text.startswith("a file"):
            link = found
            break
    yield link
    path = lake / "models" / "encoder" / encoder_id / "encoder.json"
    text = ""
    if encoder_id and path.exists():
        known = json.loads(path.read_text())
        lora = f"LoRA r {known['lora']['r']}" if known.get("lora") else "no LoRA (zero-shot)"
        text = f"{known['base']} ({known['base_sha256'][:12]}), {lora}, pooling {known['pooling']}, width {known['width']}"
    yield artifact_step(lake, "encoder", encoder_id, ("scft",), text, 3)


def text_checked(link: Link, row: dict[str, Any], text_hash: str) -> Link:
    """The link of `items`, with the item's text held against the hash under which it was embedded."""
    if not row or link.verdict == "broken":
        return link
    if content_hash((pair["name"], pair["value"]) for pair in row["attributes"]) != row["content_hash"]:
        return replace(link, verdict="broken", text="the content hash is not that of the attributes: extract again")
    if text_hash and row["content_hash"] != text_hash:
        text = f"the text has changed since it was embedded ({text_hash[:12]}): run embed, project and publish"
        return replace(link, verdict="broken", text=text)
    return replace(link, text=f"{link.text}; text {row['content_hash'][:12]}, first seen {row['first_seen_ds']}")


def source_step(extract: dict[str, Any] | None) -> Link:
    """The source tables, as `extract` read them; their bytes are the warehouse's."""
    read = extract["result"]["inputs"] if extract and extract["job"] == "extract" else {}
    earlier = [name for name in read if name.startswith(f"{INTERACTIONS.name}/ds=")]
    read = {table: counted for table, counted in read.items() if table not in earlier}
    text = "; ".join(f"{table}: {counted} (records, order-free hash)" for table, counted in read.items())
    text += "".join(f"; earlier events from {name}" for name in earlier)
    return Link(
        step="source", identity=", ".join(read) or "unknown", digest="", verdict="unknown", depth=3,
        text=text or "the extract that wrote the snapshot is not recorded",
    )  # fmt: skip


def prompt(lake: Path, encoder_id: str, row: dict[str, Any]) -> str:
    """What the encoder reads of an item; empty where either is gone."""
    path = lake / "models" / "encoder" / encoder_id / "encoder.json"
    if not row or not encoder_id or not path.exists():
        return ""
    return render(
        [(pair["name"], pair["value"]) for pair in row["attributes"]], as_policy(json.loads(path.read_text())["policy"])
    )


# ------------------------------------------------------------------------------------------------------------- neighbours


def neighbours(config: Config, space: Space | None, item_id: str) -> list[tuple[str, float]]:
    """The nearest other items of a space, best first; none where the space or its index is gone, or lacks the item."""
    from jobs.engines import online

    if space is None or config.neighbours < 1:
        return []
    try:
        built = online.open_index(config.run.lake, space)
        row = built.item_ids.index(item_id)
    except (InputError, ValueError):
        return []
    row_QK, score_QK = built.exact(np.asarray(built.vector_ND[row : row + 1]), config.neighbours + 1)
    pairs = [(built.item_ids[at], float(score)) for at, score in zip(row_QK[0], score_QK[0], strict=True) if at != row]
    return pairs[: config.neighbours]


def titles(lake: Path, ds: str, item_ids: list[str]) -> dict[str, str]:
    """A name for each item; its id where the catalogue can't be read, which the chain tells of."""
    from jobs.engines import online

    try:
        return online.titles(lake, ds, item_ids)
    except (OSError, ValueError):
        return dict(zip(item_ids, item_ids, strict=True))


def named(pairs: list[tuple[str, float]], names: dict[str, str]) -> tuple[Neighbour, ...]:
    """Neighbours with their titles."""
    return tuple(Neighbour(item_id=item_id, title=names[item_id], score=round(score, 5)) for item_id, score in pairs)


# ---------------------------------------------------------------------------------------------------------------- tell it


def tell(result: Result, pointer: Pointer) -> None:
    """The chain as a tree, for a person, on standard error."""
    print("\n".join(tree(result, pointer)), file=sys.stderr, flush=True)


def tree(result: Result, pointer: Pointer) -> Iterator[str]:
    """Lines of the tree: the chain, the text, the neighbours."""
    yield f"{result.item_id}  {result.title}"
    for link in result.links:
        yield f"{'   ' * link.depth}└─ {link.step} {link.identity}  [{MARKS[link.verdict]}]"
        yield f"{'   ' * link.depth}   {link.text}"
    yield "the LLM read:"
    yield from (f"   {line}" for line in (result.text or "unknown: the encoder or the item's text is gone").splitlines())
    yield f"nearest now, in space {result.space_id}:"
    yield from (f"   {found.score:>9.4f}  {found.title}" for found in result.neighbours)
    if pointer.previous is None:
        yield "no space served before this one"
    elif not result.neighbours_before:
        yield f"space {pointer.previous.space_id} served before: it was collected, or the item was not in it"
    else:
        yield f"nearest before, in space {pointer.previous.space_id} ({result.kept_neighbours} are the same):"
        yield from (f"   {found.score:>9.4f}  {found.title}" for found in result.neighbours_before)
