"""An MLflow of its own for each test, in SQLite; its tables are made once."""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from jobs.engines import registry
from jobs.lake import artifacts
from jobs.run import Run
from models.behaviour.artifact import save_recommender
from models.behaviour.items import MlpAdapter, TextItems
from models.behaviour.recommender import Backbone, Recommender, build_sequence
from models.behaviour.whitening import Whitening


@cache
def template() -> Path:
    """A database with MLflow's tables and nothing in them: making those takes seconds."""
    here = Path(tempfile.mkdtemp())
    registry.champion(Run(ds="2026-01-01", lake=here / "lake", tracking_uri=f"sqlite:///{here}/mlflow.db"))
    return here / "mlflow.db"


def fresh(path: Path, ds: str = "2026-01-01") -> Run:
    """A run with a lake and an empty MLflow below `path`."""
    path.mkdir(parents=True, exist_ok=True)
    shutil.copy(template(), path / "mlflow.db")
    return Run(ds=ds, lake=path / "lake", tracking_uri=f"sqlite:///{path}/mlflow.db", device="cpu")


def kept(run: Run, seed: int = 0, encoder_id: str = "e" * 16) -> Path:
    """A small recommender in the lake, another one for each seed."""
    torch.manual_seed(seed)
    backbone = Backbone(width=8, max_len=5)
    items = TextItems(torch.randn(3, 4), MlpAdapter(4, 8, 8))
    staged = artifacts.stage(run.lake, "recommender")
    save_recommender(
        staged,
        Recommender(items, build_sequence(backbone)),
        item_ids=["a", "b", "c"],
        backbone=backbone,
        items={"kind": "mlp", "hidden": 8},
        whitening=Whitening(torch.zeros(4), torch.eye(4), 1.0),
        meta={"encoder_id": encoder_id},
    )
    return artifacts.find(run.lake, "recommender", artifacts.keep(run.lake, "recommender", staged))
