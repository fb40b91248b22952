"""A folder of a date that a load still writes to is waited for; one that is whole, or has rested, is read."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.engines.spark import session
from jobs.extract import judge
from jobs.extract.window import Reading
from jobs.run import Unavailable
from tests.jobs.extract.test_extract import CATALOGUE, DS, LOGS, config, event_table, item_table
from tests.jobs.extract.test_extract import one_session as one_session  # for pytest, which looks fixtures up here


@pytest.mark.parametrize("side", ["items", "interactions"])
@pytest.mark.parametrize("path", ["dt={ds}", "dt={ds}/*.parquet"])
def test_a_table_of_a_date_whose_load_is_under_way_is_waited_for(tmp_path: Path, side: str, path: str) -> None:
    folder, file, rows = tmp_path / f"dt={DS}", tmp_path / f"dt={DS}" / "part-0.parquet", {"items": 5, "interactions": 20}[side]
    folder.mkdir()
    tables = {"items": item_table(tmp_path / "i.parquet", CATALOGUE), "interactions": event_table(tmp_path / "e.parquet", LOGS)}
    shutil.copy(tables[side], file)
    waits = rf"extract.{side}.table = .* has no _SUCCESS, and a file of 0 minutes ago .*settle_minutes = 10"

    def read(table: str = str(tmp_path / path), **values: Any) -> int:
        spark, given = session("test", {}), tables | {side: table}
        made = config(tmp_path, given["items"], given["interactions"], **values)
        return (
            judge.read_items(spark, made) if side == "items" else judge.read_events(spark, made, Reading(whole_ds=DS))
        ).count()

    with pytest.raises(Unavailable, match=waits):
        read()
    assert read(settle_minutes=0) == rows
    assert read(f"{folder}") == rows, "no date in its name, no waiting"
    assert read(f"{tmp_path}/dt={{ds}}/part-0.parquet") == rows, "a single file ends with what makes it Parquet"
    os.utime(file, (time.time() - 660,) * 2)
    assert read() == rows, "a load that pauses for ten minutes is over"
    if "*" in path:
        return
    (folder / "_temporary" / "0").mkdir(parents=True)
    shutil.copy2(file, folder / "_temporary" / "0")
    with pytest.raises(Unavailable, match="has no _SUCCESS, and files in _temporary"):
        read()
    os.utime(file)
    (folder / "_SUCCESS").touch()
    assert read() == rows
