"""What an encoder learns from: the texts of a snapshot, and where asked for, pairs of users' items and a teacher's clusters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F

from jobs.lake import artifacts, manifests, partitions
from jobs.lake.items import live_items
from jobs.lake.tables import ITEMS
from jobs.lake.tensors import read_catalogue, read_histories
from jobs.run import InputError
from jobs.scft.config import Config
from models.behaviour.artifact import load_recommender
from models.behaviour.data import followers, held_out, train_counts, without_items
from models.text.prompts import Ints
from models.text.scft_batches import Pairs

Attributes = list[tuple[str, str]]


def read_texts(config: Config, snapshot: str) -> tuple[list[str], list[str], list[Attributes]]:
    """An item, hash and attributes of each different text of the snapshot, by their hashes, without what was forgotten."""
    lake = config.run.lake
    rows = partitions.read_commit(lake, ITEMS.name, snapshot).rows
    bound = f"{min(int(config.max_items / max(rows, 1) * 2**32), 2**32 - 1):08x}"
    found: dict[str, tuple[str, Attributes]] = {}
    for batch in live_items(lake, snapshot, ("item_id", "content_hash", "attributes")):
        sampled = batch.filter(pc.less_equal(pc.utf8_slice_codeunits(batch["content_hash"], 0, 8), bound))
        for row in sampled.to_pylist():
            found[row["content_hash"]] = row["item_id"], [(entry["name"], entry["value"]) for entry in row["attributes"]]
    if not found:
        raise InputError(f"items/{snapshot} holds no item: extract a catalogue first")
    hashes = sorted(found)
    return [found[text][0] for text in hashes], hashes, [found[text][1] for text in hashes]


def user_pairs(config: Config, hashes: Sequence[str]) -> tuple[Pairs | None, dict[str, str]]:
    """The texts of items that users took one after the other, by train rows alone, and the sequences' digest.

    Items that are held out as cold are left out. None where pairs are not asked for. Raises InputError where there are no
    sequences or no such items.
    """
    if not (config.training.steps and config.training.pair_share):
        return None, {}
    catalogue = read_catalogue(config.run)
    events, digest = read_histories(config.run, catalogue.item_ids)
    events = without_items(events, held_out(catalogue.item_ids, config.cold_share, config.run.seed))
    row_I = pc.fill_null(pc.index_in(catalogue.content_hashes, value_set=pa.array(hashes, pa.string())), -1).to_numpy()
    index_P = followers(events)
    pair_P2: Ints = row_I.astype(np.int64)[torch.stack([events.items_N[index_P - 1], events.items_N[index_P]], 1).numpy() - 1]
    kept_P = (pair_P2 >= 0).all(axis=1) & (pair_P2[:, 0] != pair_P2[:, 1])
    if not kept_P.any():
        raise InputError("no user took two items one after the other in the train rows: set training.pair_share to 0")
    return Pairs(pair_P2=pair_P2[kept_P], user_P=events.user_N[index_P].numpy()[kept_P]), {"sequences": digest}


def teacher_clusters(config: Config, item_ids: Sequence[str]) -> Ints | None:
    """The teacher's cluster of each item, -1 for those without a train event; None where the second signal is off.

    k-means on the directions of the teacher's vectors, which stand for train rows alone. Raises InputError without a teacher.
    """
    if not config.training.cluster_weight:
        return None
    from sklearn.cluster import KMeans

    teacher_id = config.teacher
    if teacher_id == "latest":
        teacher_id = manifests.latest(config.run, "pretrain")["teacher_id"]
    teacher = load_recommender(artifacts.find(config.run.lake, "teacher", teacher_id))
    catalogue = read_catalogue(config.run)
    counts_V = train_counts(read_histories(config.run, catalogue.item_ids)[0])
    met = [item for item, count in zip(catalogue.item_ids, counts_V[1:].tolist(), strict=True) if count and item in teacher.row]
    vector_MD = F.normalize(teacher.table()[[teacher.row[item] for item in met]].float(), dim=1).numpy()
    count = min(config.clusters, len(met))
    if count < 2:
        raise InputError(f"teacher {teacher_id} knows {len(met)} items with train events: too few to cluster; run pretrain again")
    cluster_M = KMeans(count, n_init=2, random_state=config.run.seed).fit_predict(vector_MD)
    known = dict(zip(met, cluster_M.tolist(), strict=True))
    return np.asarray([known.get(item, -1) for item in item_ids], dtype=np.int64)
