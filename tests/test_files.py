"""`jobs/lake` is the room that touches files: whoever else does stands here, with the reason."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAKE = "jobs/lake/"
MAY = {
    # what a person writes, or what is shipped
    "jobs/recipe.py": "reads the recipe",
    "jobs/new.py": "reads the starter and writes the copy that a person asked for",
    "jobs/report/page.py": "reads its own style sheet and script",
    "jobs/check/__init__.py": "reads how much memory is free",
    "jobs/frames.py": "a temporary lake, and the two frames as its source tables",
    # borders with other systems, which take folders and files
    "jobs/engines/java.py": "the script that starts Java, and Java's archive of its classes, in this machine's caches",
    "jobs/engines/spark.py": "Spark's folder of settings",
    "jobs/engines/spark_parts.py": "runs on Spark's executors: writes their files aside, and packs the code that they need",
    "jobs/engines/registry.py": "takes an artifact from MLflow, which downloads into a folder",
    "jobs/engines/online.py": "stages an index, which faiss writes as files; removes old ones; Feast's offline folder",
    # jobs that work on the lake's bytes and not on its tables
    "jobs/extract/__init__.py": "removes what Spark staged and did not commit",
    "jobs/forget/home.py": "copies a lake from an object store, and puts back what changed",
    "jobs/forget/names.py": "reads Parquet files of any version, for the ids that they name",
    "jobs/forget/proof.py": "searches every file of the lake for an id, whatever wrote it, and removes what was said of it",
    "jobs/forget/tables.py": "rewrites Parquet files of any version without some rows",
    "jobs/pretrain.py": "removes its checkpoint once its artifact is kept",
    "jobs/rat/__init__.py": "removes its checkpoint once its artifact is kept",
    "jobs/rat/refit.py": "removes its checkpoints once its artifact is kept",
    "jobs/scft/__init__.py": "removes its checkpoint once its artifact is kept",
    # models know folders and no lake: an artifact is written and read where its classes are
    "models/checkpoint.py": "the state of a training",
    "models/text/base_model.py": "a base model's files: unpacked once, hashed",
    "models/text/encoder.py": "the artifact of an encoder",
    "models/text/scft.py": "reads a checkpoint in one process for all",
    "models/behaviour/artifact.py": "the artifact of a recommender",
    "models/behaviour/codes.py": "the artifact of books",
    # the serving side stands alone: it may not import the lake
    "feature_repo/index.py": "the index of a space: its files, mapped",
    "feature_repo/offline.py": "Feast's offline tables, Parquet",
    "feature_repo/reader.py": "finds the lake's stores without the lake's code",
    "feature_repo/sqlite_store.py": "the file of the embedded store and its lease",
    "feature_repo/serving/__main__.py": "a folder for the counts of several workers",
    "feature_repo/serving/app.py": "reads its page",
    "feature_repo/serving/artifacts.py": "copies artifacts to this machine, verified, and removes old ones",
    "feature_repo/serving/metrics.py": "reads which workers live",
}
METHODS = {"write_text", "write_bytes", "read_text", "read_bytes", "mkdir", "unlink", "touch", "symlink_to", "rmdir"}
FUNCTIONS = {"open", "save_file", "load_file", "safe_open"}
MODULES = {
    "os": {"open", "link", "replace", "rename", "remove", "unlink", "makedirs", "mkdir"},
    "shutil": {"rmtree", "copytree", "copy", "copyfile", "copyfileobj", "move"},
    "tempfile": {"mkdtemp", "mkstemp", "TemporaryDirectory", "NamedTemporaryFile", "TemporaryFile"},
    "pq": {"write_table", "read_table", "ParquetWriter", "ParquetFile", "read_metadata"},
    "np": {"save", "load", "memmap"},
}


def touches(text: str) -> Iterator[str]:
    """The calls of a file that open, write or remove files."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS:
            yield node.func.id
        elif isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            method = node.func.attr in METHODS or (node.func.attr == "open" and not owner[:1].isupper())
            if owner == "partitions" or (owner in MODULES and node.func.attr not in MODULES[owner]):
                continue  # partitions.write_text is the lake's own
            if method or node.func.attr in MODULES.get(owner, ()):
                yield f"{owner}.{node.func.attr}"


def test_whoever_touches_files_outside_the_lake_s_room_stands_in_the_list_with_a_reason() -> None:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "jobs", "models", "feature_repo"], capture_output=True, text=True, check=False
    ).stdout.split()
    files = [name for name in listed if name.endswith(".py") and (ROOT / name).exists()]
    if not files:
        pytest.skip("not a git checkout: there is no list of files")
    found = {name: calls for name in files if (calls := sorted(set(touches((ROOT / name).read_text()))))}
    outside = {name: calls for name, calls in found.items() if not name.startswith(LAKE)}
    more = {name: calls for name, calls in outside.items() if name not in MAY}
    assert not more, f"let jobs/lake do this, or say here why not: {more}"
    assert not MAY.keys() - outside.keys(), f"these touch no file any more: {sorted(MAY.keys() - outside.keys())}"


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("path.write_text('x')", ["path.write_text"]),
        ("with open('a') as file: pass", ["open"]),
        ("(home / 'a').open('rb')", [".open"]),
        ("shutil.rmtree(home); os.replace(a, b); os.getcwd()", ["shutil.rmtree", "os.replace"]),
        ("pq.write_table(rows, path); pa.table({})", ["pq.write_table"]),
        ("Reader.open(lake); partitions.write_text(path, text); shutil.disk_usage(home); 'a'.replace('a', 'b')", []),
    ],
)
def test_a_call_that_touches_files_is_found_and_others_are_not(text: str, calls: list[str]) -> None:
    assert list(touches(text)) == calls
