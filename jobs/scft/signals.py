"""What an encoder learns from beside texts: pairs of users' items, users' titles, a teacher's clusters and vectors.

Train rows alone teach, and items that are held out as cold (`cold_share`) teach nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from jobs.lake import artifacts, manifests
from jobs.lake.items import title
from jobs.lake.tensors import Catalogue, read_catalogue, read_histories
from jobs.run import InputError
from jobs.scft.config import Config
from jobs.scft.texts import Attributes
from models.behaviour.artifact import load_recommender
from models.behaviour.data import Histories, followers, held_out, train_counts, without_items
from models.text.encoder import Encoder
from models.text.objectives import Signals
from models.text.prompts import Ints
from models.text.scft_batches import Pairs
from models.text.users import Users, users_of

log = logging.getLogger(__name__)


def read_signals(
    config: Config, load: Callable[[], Encoder], item_ids: Sequence[str], hashes: Sequence[str], items: Sequence[Attributes]
) -> tuple[Signals, dict[str, str]]:
    """What the settings ask for, by row of the texts, and the digests of what was read.

    `load` gives the encoder; it is called where its tokenizer is needed, once all that could be missing was found.
    Raises InputError or ValueError where there are no sequences, no teacher, or nothing in them to learn from.
    """
    pairs, inputs = user_pairs(config, hashes)
    taught = read_teacher(config, item_ids)
    users, more = user_titles(config, load, hashes, [title(*one) for one in zip(item_ids, items, strict=True)])
    inputs |= more
    if taught is None:
        return Signals(pairs=pairs, users=users), inputs
    weighs_clusters = config.training.cluster_weight or config.training.user_weight
    cluster_I = teacher_clusters(config, taught) if weighs_clusters else None
    vector_ID = taught.vector_ID if config.training.teacher_weight else None
    return Signals(pairs=pairs, users=users, cluster_I=cluster_I, teacher_ID=vector_ID), inputs | {"teacher": taught.teacher_id}


def without_cold(config: Config) -> tuple[Catalogue, Histories, str]:
    """The catalogue, the histories without items that are held out as cold, and the sequences' digest."""
    catalogue = read_catalogue(config.run)
    events, digest = read_histories(config.run, catalogue.item_ids)
    return catalogue, without_items(events, held_out(catalogue.item_ids, config.cold_share, config.run.seed)), digest


def rows_of(catalogue: Catalogue, hashes: Sequence[str]) -> Ints:
    """row_I: the text of each item of the catalogue among those with these hashes, -1 where it has none there."""
    row_I = pc.fill_null(pc.index_in(catalogue.content_hashes, value_set=pa.array(hashes, pa.string())), -1).to_numpy()
    return np.asarray(row_I, dtype=np.int64)


def user_pairs(config: Config, hashes: Sequence[str]) -> tuple[Pairs | None, dict[str, str]]:
    """The texts of items that users took one after the other, and the sequences' digest.

    None where pairs are not asked for. Raises InputError where there are no sequences or no such items.
    """
    if not (config.training.steps and config.training.pair_share):
        return None, {}
    catalogue, events, digest = without_cold(config)
    index_P = followers(events)
    rows_P2 = torch.stack([events.items_N[index_P - 1], events.items_N[index_P]], 1).numpy() - 1
    pair_P2: Ints = rows_of(catalogue, hashes)[rows_P2]
    kept_P = (pair_P2 >= 0).all(axis=1) & (pair_P2[:, 0] != pair_P2[:, 1])
    if not kept_P.any():
        raise InputError("no user took two items one after the other in the train rows: set training.pair_share to 0")
    return Pairs(pair_P2=pair_P2[kept_P], user_P=events.user_N[index_P].numpy()[kept_P]), {"sequences": digest}


def user_titles(
    config: Config, load: Callable[[], Encoder], hashes: Sequence[str], titles: Sequence[str]
) -> tuple[Users | None, dict[str, str]]:
    """What users had in their train rows, with the titles of all texts, and the sequences' digest.

    None where users' titles are not asked for. Raises InputError where there are no sequences, ValueError for too few events.
    """
    if not config.training.reads_users:
        return None, {}
    catalogue, events, digest = without_cold(config)
    item_N = rows_of(catalogue, hashes)[events.items_N[events.in_train_N].numpy() - 1]
    user_N = events.user_N[events.in_train_N].numpy()[item_N >= 0]
    return users_of(load(), item_N[item_N >= 0], user_N, titles), {"sequences": digest}


@dataclass(frozen=True, kw_only=True)
class Taught:
    """A teacher's vectors of the texts' items."""

    teacher_id: str
    vector_ID: NDArray[np.float32]
    """Not a number where an item has no train event or is held out as cold."""


def read_teacher(config: Config, item_ids: Sequence[str]) -> Taught | None:
    """The teacher's vectors of items; None where nothing is learned from it. Says where it is old, or had seen cold items.

    Raises InputError without a teacher, or where it knows too few items with train events.
    """
    if not config.training.reads_teacher:
        return None
    teacher_id = config.teacher
    if teacher_id == "latest":
        teacher_id = manifests.latest(config.run, "pretrain")["teacher_id"]
    teacher = load_recommender(artifacts.find(config.run.lake, "teacher", teacher_id))
    catalogue, events, _ = without_cold(config)
    counts_V = train_counts(events)
    met = {item for item, count in zip(catalogue.item_ids, counts_V[1:].tolist(), strict=True) if count and item in teacher.row}
    if len(met) < 2:
        raise InputError(f"teacher {teacher_id} knows {len(met)} items with train events: too few to teach; run pretrain again")
    warn(config, teacher_id, teacher.meta, len(set(catalogue.item_ids) - teacher.row.keys()))
    table_VD = teacher.table().float().numpy()
    vector_ID = np.full((len(item_ids), table_VD.shape[1]), np.nan, dtype=np.float32)
    known = [row for row, item in enumerate(item_ids) if item in met]
    vector_ID[known] = table_VD[[teacher.row[item_ids[row]] for row in known]]
    return Taught(teacher_id=teacher_id, vector_ID=vector_ID)


def warn(config: Config, teacher_id: str, meta: dict[str, object], unknown: int) -> None:
    """Says where a teacher is older than the snapshot, or had items in its training that are to be cold."""
    if unknown:
        log.warning("teacher %s of %s is older than the snapshot: %d items have no vector and teach nothing; run pretrain again",
                    teacher_id, meta.get("ds", "an unknown date"), unknown)  # fmt: skip
    if config.cold_share and not held_the_same(config, meta):
        log.warning("teacher %s had items in its training that scft.cold_share holds out as cold: what the encoder is worth for "
                    "cold items is too good; set pretrain.cold_share = %s", teacher_id, config.cold_share)  # fmt: skip


def held_the_same(config: Config, meta: dict[str, object]) -> bool:
    """Whether a teacher was trained without the items that this recipe holds out."""
    return meta.get("cold_share") == config.cold_share and meta.get("seed") == config.run.seed


def teacher_clusters(config: Config, taught: Taught) -> Ints:
    """The cluster of each item, -1 for those without a vector: k-means on the directions of the teacher's vectors."""
    from sklearn.cluster import KMeans

    known_I = np.isfinite(taught.vector_ID[:, 0])
    vector_MD = F.normalize(torch.from_numpy(taught.vector_ID[known_I]), dim=1).numpy()
    cluster_I = np.full(len(known_I), -1, dtype=np.int64)
    count = min(config.clusters, len(vector_MD))
    cluster_I[known_I] = KMeans(count, n_init=2, random_state=config.run.seed).fit_predict(vector_MD)
    return cluster_I
