"""A small lake with a catalogue, histories, and a recommender whose space can be published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs import logs
from jobs.lake import artifacts, partitions
from jobs.lake.items import content_hash
from jobs.lake.tables import ITEMS, SEQUENCES, item_embeddings, space_of
from models.behaviour.artifact import save_recommender
from models.behaviour.items import MlpAdapter, TextItems
from models.behaviour.recommender import Backbone, Recommender, build_sequence
from models.behaviour.whitening import Whitening
from tests.feature_repo.conftest import postgres as postgres  # for pytest, which looks fixtures up here
from tests.feature_repo.conftest import redis_port as redis_port
from tests.power_cut import cuts as cuts

WIDTH = 16
Catalogue = Callable[..., Path]


@pytest.fixture(autouse=True)
def told() -> None:
    """Logs go to standard error, as the command line sends them."""
    logs.start()


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalogue:
    """Writes items, sequences and the vectors of a space; vectors depend on (space, item, version), texts on `texts`."""
    for name in ("LLMEMB_ONLINE_STORE", "LLMEMB_REGISTRY", "LLMEMB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)

    def write(
        ds: str = "2026-01-01",
        space: str = "a" * 16,
        ids: list[str] | None = None,
        version: dict[str, int] | None = None,
        texts: dict[str, int] | None = None,
    ) -> Path:
        lake, version = tmp_path / "lake", version or {}
        texts = version if texts is None else texts
        ids = ids or [f"m{number}" for number in range(40)]
        names = [f"Film {item}, cut {texts.get(item, 0)}" for item in ids]
        hashes = [content_hash([("title", name)]) for name in names]
        titles = [[{"name": "title", "value": name}] for name in names]
        rows = {"item_id": ids, "attributes": titles, "content_hash": hashes, "first_seen_ds": [ds] * len(ids)}
        partitions.write(lake, ITEMS, f"ds={ds}", [pa.table(rows, ITEMS.schema)])
        users = {
            "user_id": ["u1", "u2"],
            "item_ids": [ids[:5], ids[3:9]],
            "timestamps": [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]],
            "train_end": [3, 4],
            "valid_end": [4, 5],
        }
        partitions.write(lake, SEQUENCES, f"ds={ds}", [pa.table(users, SEQUENCES.schema)])
        partitions.write(lake, item_embeddings(WIDTH), f"space={space}/ds={ds}", [vectors(space, ids, version, hashes)])
        return lake

    return write


def vectors(space: str, ids: list[str], version: dict[str, int], hashes: list[str]) -> pa.Table:
    """Rows of `item_embeddings`."""
    seeds = [[*space.encode(), *item.encode(), version.get(item, 0)] for item in ids]
    emb_ND = np.stack([np.random.default_rng(seed).normal(size=WIDTH) for seed in seeds]).astype(np.float32)
    table = item_embeddings(WIDTH)
    columns = {
        "item_id": pa.array(ids),
        "space_id": pa.repeat(space, len(ids)),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(emb_ND.ravel()), WIDTH),
        "content_hash": pa.array(hashes),
        "group": pa.repeat("head", len(ids)),
    }
    return pa.table(columns).cast(table.schema)


@pytest.fixture
def trained() -> Callable[[Path], tuple[str, str]]:
    """Keeps a small recommender in a lake; gives (space_id, recommender_id)."""

    def keep(lake: Path) -> tuple[str, str]:
        torch.manual_seed(0)
        backbone = Backbone(name="sasrec", width=WIDTH, max_len=5)
        whitening = Whitening(torch.zeros(4), torch.eye(4), 1.0)
        items = TextItems(torch.randn(3, 4), MlpAdapter(4, 8, WIDTH))
        staged = artifacts.stage(lake, "recommender")
        save_recommender(
            staged,
            Recommender(items, build_sequence(backbone)),
            item_ids=["m0", "m1", "m2"],
            backbone=backbone,
            items={"kind": "mlp", "hidden": 8},
            whitening=whitening,
            meta={"encoder_id": "e" * 16},
        )
        recommender_id = artifacts.keep(lake, "recommender", staged)
        return space_of("e" * 16, recommender_id), recommender_id

    return keep
