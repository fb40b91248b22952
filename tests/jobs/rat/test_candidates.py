"""rat: an item without train events is never a negative, whether nobody touched it, only later events do, or it is held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import rat
from jobs.run import Run
from models.behaviour.data import Histories, held_out
from tests.jobs.rat.test_rat import config, taught
from tests.jobs.small_lake import ITEM_COUNT, make


class Seen(Exception):
    """Training was asked for; nothing more is wanted."""


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_candidates_of_training_are_the_items_of_train_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    run: Run = make(tmp_path)
    taught(run, cold_share=share)
    given: dict[str, Any] = {}

    def train(recommender: Any, events: Histories, *_: Any, **more: Any) -> None:
        given.update(more, events=events)
        raise Seen

    monkeypatch.setattr(rat, "train", train)
    with pytest.raises(Seen):
        rat.run(config(run, cold_share=share))
    held = held_out([f"i{number:02d}" for number in range(ITEM_COUNT)], share, run.seed)
    # nobody touches the last item, and the walks of the others meet every item in train events
    wanted = [item for item in range(1, ITEM_COUNT) if not held[item]]
    assert given["candidates_M"].tolist() == wanted
    assert bool(torch.isin(held.nonzero().flatten(), given["candidates_M"]).any()) is False
