"""The online store, the recommender that fits it -> the next items of a user."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from feature_repo.index import Index
from feature_repo.reader import Pointer, Reader
from jobs.engines import online, registry
from jobs.lake import partitions
from jobs.lake.items import titles
from jobs.lake.tables import SEQUENCES
from jobs.lake.tensors import pick_device
from jobs.run import InputError, Run
from models.behaviour.artifact import Loaded, load_recommender

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config:
    """For whom, and how many."""

    run: Run
    user: str | int
    """A user's id: one of `sequences`, or one whose history was pushed to `user_history`."""
    k: int = 10
    """Items to recommend."""
    index: Literal["exact", "approximate"] = "exact"
    """How candidates are found."""
    breadth: int = 250
    """Candidates while searching the approximate index: more is slower and finds more."""
    exclude_seen: bool | None = None
    """Leaves out items of the user's history. Left out, it is as in validation and gates: `run.exclude_seen`."""
    url: str = ""
    """Reads through Feast's feature server; empty reads the store itself."""
    shown: int = 5
    """Newest items of the history that are shown beside the recommendations."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Recommendations, best first."""

    space_id: str
    recommender_id: str
    history_items: int
    """Events of the history that were found online."""
    recent: list[str]
    """Titles of the newest ones, newest last."""
    item_ids: list[str]
    titles: list[str]
    scores: list[float]
    """Dot products of the user's vector with the items'."""
    carried: list[dict[str, float]]
    """Of each item: what each part of the recommender adds to its score."""
    recall: float
    """Share of the exact recommendations that the index found."""
    seconds: float
    """From the user's id to the recommendations, models and index loaded."""
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]


def run(config: Config) -> Result:
    """Encodes the user's history from online vectors and takes the items nearest to it in the space that serves.

    Raises InputError for an unknown user, a history none of whose items is online, or a space without its recommender or index.
    """
    lake = config.run.lake
    if config.k < 1:
        raise InputError(f"recommend.k is {config.k}: ask for at least one item")
    reader = Reader.over_http(config.url) if config.url else Reader.open(lake)
    pointer = online.served(reader)
    recommender_id, recommender = fitting(config.run, pointer)
    neighbours = online.open_index(lake, pointer.space)
    history = history_of(config, reader)
    started = time.monotonic()
    met, user_BD = encoded(reader, recommender, pointer, history)
    leave_out = config.run.exclude_seen if config.exclude_seen is None else config.exclude_seen
    hidden = set(history) if leave_out else set()
    found, scores = nearest(neighbours, user_BD, config, hidden, config.index)
    seconds = time.monotonic() - started
    exact, _ = nearest(neighbours, user_BD, config, hidden, "exact")
    recent = met[-config.shown :] if config.shown else []
    names = titles(lake, pointer.ds, [*found, *recent])
    result = Result(
        space_id=pointer.space_id,
        recommender_id=recommender_id,
        history_items=len(met),
        recent=[names[item_id] for item_id in recent],
        item_ids=found,
        titles=[names[item_id] for item_id in found],
        scores=[round(float(score), 5) for score in scores],
        carried=carried(recommender, reader, torch.from_numpy(user_BD), found),
        recall=round(len(set(found) & set(exact)) / len(exact), 4) if exact else 1.0,
        seconds=round(seconds, 4),
        inputs={"pointer": online.pointer_text(pointer), "recommender": recommender_id},
        outputs={},
        rows={},
    )
    log_result(result)
    return result


def fitting(run: Run, pointer: Pointer) -> tuple[str, Loaded]:
    """The recommender whose user vectors fit the space that serves, and its id. Raises InputError where there is none."""
    recommender_id = pointer.recommender_id or online.recommender_of(run.lake, pointer.space_id)["recommender_id"]
    if not recommender_id:
        raise InputError(f"no recommender of the lake makes space {pointer.space_id}, which serves: fetch its artifact first")
    return recommender_id, load_recommender(registry.fetch(run, "recommender", recommender_id), pick_device(run))


def carried(recommender: Loaded, reader: Reader, user_BD: torch.Tensor, found: list[str]) -> list[dict[str, float]]:
    """What each part adds to the score of each item."""
    if not found:
        return []
    emb_ND = torch.from_numpy(reader.vectors(found).vector_ND).float()
    by_part = recommender.carried(user_BD.expand(len(emb_ND), -1), emb_ND)
    return [{name: round(float(part_N[number]), 5) for name, part_N in by_part.items()} for number in range(len(emb_ND))]


def encoded(
    reader: Reader, recommender: Loaded, pointer: Pointer, history: Sequence[str]
) -> tuple[list[str], npt.NDArray[np.float32]]:
    """(items of the history that are online, user_BD). Raises InputError where there is none, or the space changed."""
    answer = reader.vectors(history[-recommender.backbone.max_len :])
    if answer.pointer.space_id != pointer.space_id:
        raise InputError("another space began to serve meanwhile: run recommend again")
    if not answer.item_ids:
        raise InputError("no item of the user's history is in the space that serves: has publish run for the newest items?")
    emb_BLD = torch.from_numpy(answer.vector_ND)[None]
    user_BD = recommender.encode(emb_BLD, torch.ones(emb_BLD.shape[:2], dtype=torch.bool)).float().cpu().numpy()
    return answer.item_ids, user_BD


def history_of(config: Config, reader: Reader) -> list[str]:
    """The user's items, oldest first: pushed to `user_history`, else in `sequences`.

    Raises InputError for an unknown user, whose id it does not repeat: errors are logged.
    """
    _, values = reader.transport.read("user_history", {"user_id": [str(config.user)]}, ["item_ids"])[0]
    if values.get("item_ids"):
        return [str(item_id) for item_id in values["item_ids"]]
    lake = config.run.lake
    for batch in partitions.scan(
        lake, SEQUENCES, partitions.latest(lake, SEQUENCES.name, config.run.ds), ("user_id", "item_ids")
    ):
        rows = batch.filter(pc.equal(batch["user_id"], str(config.user)))
        if rows.num_rows:
            return [str(item_id) for item_id in rows["item_ids"][0].as_py()]
    raise InputError(
        f"recommend.user has no history: neither pushed to `user_history`, nor in `sequences` up to {config.run.ds}; "
        "take a user_id of that table"
    )


def nearest(
    neighbours: Index, user_BD: npt.NDArray[np.float32], config: Config, hidden: set[str], kind: str
) -> tuple[list[str], list[float]]:
    """The best `k` items that are not hidden, with their scores: so many more are asked for as might be hidden."""
    wanted = config.k + len(hidden)
    if kind == "exact":
        row_QK, score_QK = neighbours.exact(user_BD, wanted)
    else:
        row_QK, score_QK = neighbours.approximate(user_BD, wanted, config.breadth)
    pairs = [(neighbours.item_ids[row], float(score)) for row, score in zip(row_QK[0], score_QK[0], strict=True)]
    kept = [pair for pair in pairs if pair[0] not in hidden][: config.k]
    return [item_id for item_id, _ in kept], [score for _, score in kept]


def log_result(result: Result) -> None:
    """The recommendations, for a person."""
    lines = ["history, newest last:", *(f"      {title}" for title in result.recent), "recommended next:"]
    best = zip(result.titles, result.scores, result.carried, strict=True)
    for number, (title, score, parts) in enumerate(best, start=1):
        by = f", most by {max(parts, key=lambda name: parts[name])}" if len(parts) > 1 else ""
        lines.append(f"  {number:>2}. {title}  ({score:.3f}{by})")
    log.info("%s", "\n".join(lines))
