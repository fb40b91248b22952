"""Contracts: a partition is the old one or the new one, and no row breaks its table's laws."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.lake import artifacts, manifests, partitions
from jobs.lake.items import bury, content_hash, tombstones
from jobs.lake.locks import alone
from jobs.lake.partitions import write_json
from jobs.lake.tables import INTERACTIONS, ITEMS, QUARANTINE, SEQUENCES, Table, item_embeddings, llm_embeddings
from jobs.run import InputError, Unavailable


def items(*ids: str) -> pa.Table:
    rows = [
        {
            "item_id": item,
            "attributes": [{"name": "title", "value": f"title of {item}"}],
            "content_hash": content_hash([("title", f"title of {item}")]),
            "first_seen_ds": "2026-01-01",
        }
        for item in ids
    ]
    return pa.Table.from_pylist(rows, ITEMS.schema)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    commit = partitions.write(tmp_path, ITEMS, "ds=2026-01-01", [items("a", "b"), items("c")])
    assert commit.rows == 3
    assert partitions.read(tmp_path, ITEMS, "ds=2026-01-01").to_pylist() == items("a", "b", "c").to_pylist()


def test_equal_rows_leave_an_equal_folder(tmp_path: Path) -> None:
    first = partitions.write(tmp_path, ITEMS, "ds=2026-01-01", [items("a", "b")])
    names = sorted((tmp_path / "items" / "ds=2026-01-01").iterdir())
    second = partitions.write(tmp_path, ITEMS, "ds=2026-01-01", [items("a", "b")])
    assert first == second
    assert names == sorted((tmp_path / "items" / "ds=2026-01-01").iterdir())


def test_a_rewrite_leaves_nothing_of_the_old_partition(tmp_path: Path) -> None:
    partitions.write(tmp_path, ITEMS, "ds=2026-01-01", [items("a"), items("b"), items("c")])
    partitions.write(tmp_path, ITEMS, "ds=2026-01-01", [items("z")])
    assert partitions.read(tmp_path, ITEMS, "ds=2026-01-01")["item_id"].to_pylist() == ["z"]
    assert len(list((tmp_path / "items" / "ds=2026-01-01").glob("*.parquet"))) == 1


def test_an_empty_partition_keeps_its_schema(tmp_path: Path) -> None:
    partitions.write(tmp_path, ITEMS, "ds=2026-01-01", [])
    assert partitions.read(tmp_path, ITEMS, "ds=2026-01-01").schema == ITEMS.schema


@pytest.mark.parametrize(
    ("table", "row", "complaint"),
    [
        (ITEMS, {"item_id": "", "attributes": [], "content_hash": "h", "first_seen_ds": "2026-01-01"}, "empty text in item_id"),
        (ITEMS, {"item_id": None, "attributes": [], "content_hash": "h", "first_seen_ds": "d"}, "null values in item_id"),
        (INTERACTIONS, {"user_id": "u", "item_id": "i", "timestamp": None}, "null values in timestamp"),
        (
            SEQUENCES,
            {"user_id": "u", "item_ids": ["a"], "timestamps": [1, 2], "train_end": 0, "valid_end": 0},
            "differ in length",
        ),
        (
            SEQUENCES,
            {"user_id": "u", "item_ids": ["a"], "timestamps": [1], "train_end": 1, "valid_end": 0},
            "train_end <= valid_end",
        ),
        (
            item_embeddings(2),
            {"item_id": "a", "space_id": "s", "embedding": [1.0, float("nan")], "content_hash": "h", "group": "head"},
            "NaN values in embedding",
        ),
        (
            item_embeddings(2),
            {"item_id": "a", "space_id": "s", "embedding": [1.0, 0.0], "content_hash": "h", "group": "warm"},
            "'warm' is none of cold, tail, head",
        ),
    ],
)
def test_a_broken_law_is_named_and_the_old_partition_stays(
    tmp_path: Path, table: Table, row: dict[str, object], complaint: str
) -> None:
    partitions.write(tmp_path, table, "ds=2026-01-01", [])
    with pytest.raises(InputError, match=complaint):
        partitions.write(tmp_path, table, "ds=2026-01-01", [pa.Table.from_pylist([row], table.schema)])
    assert partitions.read(tmp_path, table, "ds=2026-01-01").num_rows == 0


def test_an_embedding_of_another_width_is_refused(tmp_path: Path) -> None:
    wide = pa.Table.from_pylist([{"item_id": "a", "content_hash": "h", "embedding": [1.0, 2.0, 3.0]}])
    with pytest.raises(InputError, match="does not fit its schema"):
        partitions.write(tmp_path, llm_embeddings(2), "encoder=e/ds=2026-01-01", [wide])


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="column reason is missing"):
        partitions.write(tmp_path, QUARANTINE, "ds=2026-01-01", [pa.table({"source": ["items"], "key": ["k"]})])


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    partitions.write(tmp_path, ITEMS, "ds=2026-01-01", [items("a"), items("a")])
    with pytest.raises(InputError, match="keys more than once"):
        partitions.read(tmp_path, ITEMS, "ds=2026-01-01")


def test_a_partition_never_written_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run the job that writes items"):
        partitions.read(tmp_path, ITEMS, "ds=2026-01-01")


def test_the_latest_partition_is_never_after_ds(tmp_path: Path) -> None:
    for ds in ("2026-01-01", "2026-01-05"):
        partitions.write(tmp_path, ITEMS, f"ds={ds}", [items("a")])
    assert partitions.latest(tmp_path, "items", "2026-01-04") == "ds=2026-01-01"
    with pytest.raises(InputError, match="no partition at or before 2025"):
        partitions.latest(tmp_path, "items", "2025-12-31")


def test_a_hash_tells_texts_apart_that_run_together() -> None:
    assert content_hash([("ab", "c")]) != content_hash([("a", "bc")])
    assert content_hash([("a", "b"), ("c", "d")]) != content_hash([("a", "b2:c1:d")])


def test_artifacts_are_kept_under_the_digest_of_their_bytes(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        staged = artifacts.stage(tmp_path, "encoder")
        (staged / "encoder.json").write_text("{}")
        ids.append(artifacts.keep(tmp_path, "encoder", staged))
    assert ids[0] == ids[1]
    assert [path.name for path in (tmp_path / "models" / "encoder").iterdir()] == [ids[0]]
    assert artifacts.find(tmp_path, "encoder", ids[0]).is_dir()
    with pytest.raises(InputError, match="is not in the lake"):
        artifacts.find(tmp_path, "encoder", "0" * 16)


def test_a_manifest_of_a_failed_run_is_not_built_on(tmp_path: Path) -> None:
    for ds, status in (("2026-01-01", "done"), ("2026-01-02", "failed")):
        write_json(manifests.path_of(tmp_path, ds, "scft"), {"status": status, "ds": ds})
    assert manifests.read(tmp_path, "2026-01-03", "scft")["ds"] == "2026-01-01"
    with pytest.raises(InputError, match="run `python -m jobs rat` first"):
        manifests.read(tmp_path, "2026-01-03", "rat")


def test_tombstones_are_remembered(tmp_path: Path) -> None:
    assert tombstones(tmp_path) == frozenset()
    bury(tmp_path, "odd / id ☃", "2026-01-01")
    assert tombstones(tmp_path) == {"odd / id ☃"}


def test_killed_at_any_instant_a_writer_leaves_one_whole_partition(tmp_path: Path) -> None:
    partitions.write(tmp_path, ITEMS, "ds=2026-01-01", [items("a")])
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from jobs.lake import partitions
        from jobs.lake.tables import ITEMS
        lake = Path(sys.argv[1])
        rows = [partitions.read(lake, ITEMS, "ds=2026-01-01"), None]
        rows[1] = rows[0].set_column(0, "item_id", [["b"]])
        print("ready", flush=True)
        for turn in range(100_000):
            partitions.write(lake, ITEMS, "ds=2026-01-01", [rows[(turn + 1) % 2]])
    """)
    for wait in (0.0, 0.011, 0.023, 0.037, 0.05):
        command = [sys.executable, "-c", program, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(wait or 0.001)
            writer.send_signal(signal.SIGKILL)
        assert partitions.read(tmp_path, ITEMS, "ds=2026-01-01")["item_id"].to_pylist() in (["a"], ["b"])


def test_a_partition_without_its_commit_is_no_partition(tmp_path: Path) -> None:
    for ds in ("2026-01-01", "2026-01-02"):
        partitions.write(tmp_path, ITEMS, f"ds={ds}", [items("a")])
    (tmp_path / "items" / "ds=2026-01-02" / partitions.COMMIT).unlink()
    assert partitions.latest(tmp_path, "items", "2026-01-02") == "ds=2026-01-01"
    with pytest.raises(InputError, match="run the job that writes items"):
        partitions.read(tmp_path, ITEMS, "ds=2026-01-02")
    partitions.write(tmp_path, ITEMS, "ds=2026-01-02", [items("b")])
    assert partitions.read(tmp_path, ITEMS, "ds=2026-01-02")["item_id"].to_pylist() == ["b"]
    assert len(list((tmp_path / "items" / "ds=2026-01-02").iterdir())) == 2, "nothing of the first attempt is left"


def test_a_lock_names_its_holder_and_goes_with_it_however_it_ends(tmp_path: Path) -> None:
    program = "import sys, time; from pathlib import Path; from jobs.lake.locks import alone\n" + textwrap.dedent("""
        with alone(Path(sys.argv[1]), "promotion"):
            print("held", flush=True)
            time.sleep(60)
    """)
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(Unavailable, match=rf"promotion is under way already \(process {holder.pid} on "),
            alone(tmp_path, "promotion", 0),
        ):
            pass
        with alone(tmp_path, "another thing", 0):
            holder.send_signal(signal.SIGKILL)
    with alone(tmp_path, "promotion", 0):
        pass


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
