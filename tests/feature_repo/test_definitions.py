"""Definitions: `feast apply` takes them as they are, and history is right at a point in time."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from feast import FeatureView
from feast.cli.cli import cli
from feast.permissions.permission import Permission

from feature_repo import feature_definitions, offline
from feature_repo.reader import Pointer, Space, end_of, open_store

REPOSITORY = Path(feature_definitions.__file__).parent


def test_the_command_line_of_feast_applies_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMB_REGISTRY", f"sqlite:///{tmp_path}/registry.db")
    monkeypatch.setenv("LLMEMB_ONLINE_STORE", json.dumps({"type": "sqlite", "path": str(tmp_path / "online.db")}))
    monkeypatch.setenv("LLMEMB_OFFLINE", str(tmp_path / "offline"))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["-c", str(REPOSITORY), "apply"])
    del sys.modules["feature_definitions"]  # Feast imports the repository's files by their bare names
    assert done.exit_code == 0, done.output
    for name in ("item_embedding", "serving_pointer", "item_tombstone", "item_attributes", "item_codes", "user_history"):
        assert name in done.output


def test_history_is_what_was_true_at_each_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMEMB_OFFLINE", raising=False)
    home = tmp_path / "offline"
    store = open_store(tmp_path)
    store.apply(list(feature_definitions.define(str(home))))
    offline.prepare(home)
    first = Space(space_id="a", recommender_id="r", ds="2026-01-01", width=2, codec="float32", items=2)
    for day, ds in enumerate(("2026-01-01", "2026-01-02", "2026-01-03"), start=1):
        emb_ND = np.full((2, 2), day, np.float32)
        offline.write_vectors(home, dataclasses.replace(first, ds=ds), [(["x", "y"], emb_ND)])
        pointer = Pointer(**dataclasses.asdict(first) | {"ds": ds}, sequence=day, previous=None, written=end_of(ds))
        offline.write_pointer(home, pointer)
    # Feast leaves out entity rows that lie before the first feature row
    moments = pd.to_datetime(["2026-01-09T00:00Z", "2026-01-02T12:00Z", "2026-01-03T00:00Z", "2026-01-02T00:00Z"], utc=True)
    asked = pd.DataFrame({"item_id": "x", "space_id": "a", "catalogue": "items", "event_timestamp": moments})
    features = ["item_embedding:vector", "serving_pointer:sequence"]
    found = store.get_historical_features(entity_df=asked, features=features).to_df().sort_values("event_timestamp")
    assert [list(value) for value in found["vector"]] == [[1, 1], [1, 1], [2, 2], [3, 3]]
    assert found["sequence"].tolist() == [1, 1, 2, 3]


@pytest.mark.parametrize(("given", "owner"), [("search@example.com", "search@example.com"), ("", "llmemb"), (None, "llmemb")])
def test_every_definition_says_what_it_is_and_whose(monkeypatch: pytest.MonkeyPatch, given: str | None, owner: str) -> None:
    if given is None:
        monkeypatch.delenv("LLMEMB_OWNER", raising=False)
    else:
        monkeypatch.setenv("LLMEMB_OWNER", given)
    for found in feature_definitions.define("offline"):
        assert found.tags["system"] == "llmemb", found.name
        if not isinstance(found, Permission):
            assert found.description and found.owner == owner, found.name
        if isinstance(found, FeatureView):
            keys = {column.name for column in found.entity_columns}
            assert found.tags["written_by"] and all(field.description for field in found.schema if field.name not in keys)
