"""`check` on a lake in a bucket: whether the store answers, and where serving would lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import check
from jobs.run import InputError, Run
from tests.object_store import ObjectStore
from tests.object_store import object_server as object_server
from tests.object_store import object_store as object_store


def test_a_bucket_that_answers_is_told_and_a_store_for_serving_is_asked_for(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LLMEMB_ONLINE_STORE", "LLMEMB_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    findings = check.stores(Run(ds="2026-01-01", lake=Path(object_store.address())))
    told = next(findings)
    assert (told.level, told.text) == ("ok", f"{object_store.address()} answers")
    with pytest.raises(InputError, match="set LLMEMB_ONLINE_STORE and LLMEMB_REGISTRY"):
        next(findings)
