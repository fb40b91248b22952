"""The chain of a served vector: from what a client reads back to the source snapshot, link by link."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.explain.artifact_links import encoder_card, encoder_link, gate_link, recommender_link
from jobs.explain.result import Link, Verdict
from jobs.explain.table_link import row_of
from jobs.lake import arrivals, partitions
from jobs.lake.arrivals import ARRIVING_ITEMS
from jobs.lake.items import content_hash
from jobs.lake.tables import INTERACTIONS
from models.text.prompts import as_policy, render

if TYPE_CHECKING:
    from feature_repo.reader import Answer


def chain_of(lake: Path, item_id: str, answer: Answer, made_by: dict[str, str]) -> tuple[dict[str, Any], list[Link]]:
    """(the item's row of `items`, empty where it is gone; all links, from the vector back).

    `made_by` holds the ids of the space's encoder and recommender, empty where the lake does not hold them.
    """
    pointer, encoder_id = answer.pointer, made_by["encoder_id"]
    served = f"space={pointer.space_id}/ds={pointer.ds}"
    vector = row_of(lake, arrivals.VECTORS, served, "item_id", item_id, ("arriving-project", "forget"), 1)
    arrived = bool(vector.values)
    if not arrived:
        vector = row_of(lake, "item_embeddings", served, "item_id", item_id, ("project", "forget"), 1)
    text_hash = str(vector.values.get("content_hash", ""))
    if arrived:
        item = row_of(lake, ARRIVING_ITEMS.name, f"ds={pointer.ds}", "item_id", item_id, ("arriving-extract", "forget"), 2)
    else:
        snapshot = snapshot_of(lake, vector.manifest, pointer.ds)
        item = row_of(lake, "items", f"ds={snapshot}", "item_id", item_id, ("extract", "forget"), 2)
    recommender_id = made_by["recommender_id"] or pointer.recommender_id
    links = [
        online_link(answer, vector.values),
        vector.link,
        recommender_link(lake, recommender_id, pointer),
        gate_link(lake, recommender_id),
        embedding_link(lake, encoder_id, text_hash),
        encoder_link(lake, encoder_id),
        with_text_checked(item.link, item.values, text_hash),
        source_link(item.manifest),
    ]
    return item.values, links


def snapshot_of(lake: Path, project: dict[str, Any] | None, ds: str) -> str:
    """Date of the `items` that a space was made of: the one whose digest `project` recorded, else the newest up to ds."""
    wanted = project["result"]["inputs"].get("items") if project else None
    dates = [name for name in partitions.committed(lake, "items") if name <= f"ds={ds}"]
    same = [name for name in dates if partitions.read_commit(lake, "items", name).digest == wanted]
    return (same or dates or [f"ds={ds}"])[-1].removeprefix("ds=")


def online_link(answer: Answer, row: dict[str, Any]) -> Link:
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


def embedding_link(lake: Path, encoder_id: str, text_hash: str) -> Link:
    """The LLM embedding of the item's text, in whichever shard it is."""
    under = f"encoder={encoder_id}"
    places = [(name, one) for name in ("llm_embeddings", arrivals.LLM) for one in partitions.committed(lake, name, under)]
    for table, partition in places if encoder_id else ():
        found = row_of(lake, table, partition, "content_hash", text_hash, ("embed*", "arriving-embed*", "forget"), 2)
        if found.values or found.unreadable:
            return found.link
    return Link(
        step="llm_embeddings", identity=f"encoder={encoder_id or 'unknown'}", digest="", verdict="unknown", depth=2,
        text="no embedding of this text is in the lake",
    )  # fmt: skip


def with_text_checked(link: Link, row: dict[str, Any], text_hash: str) -> Link:
    """The link of `items`, with the item's text held against the hash under which it was embedded."""
    if not row or link.verdict == "broken":
        return link
    if content_hash((pair["name"], pair["value"]) for pair in row["attributes"]) != row["content_hash"]:
        return replace(link, verdict="broken", text="the content hash is not that of the attributes: extract again")
    if text_hash and row["content_hash"] != text_hash:
        text = f"the text has changed since it was embedded ({text_hash[:12]}): run embed, project and publish"
        return replace(link, verdict="broken", text=text)
    return replace(link, text=f"{link.text}; text {row['content_hash'][:12]}, first seen {row['first_seen_ds']}")


def source_link(extract: dict[str, Any] | None) -> Link:
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
    known = encoder_card(lake, encoder_id)
    if not row or not known:
        return ""
    return render([(pair["name"], pair["value"]) for pair in row["attributes"]], as_policy(known["policy"]))
