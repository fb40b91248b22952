"""What the installed Redis can do."""

from __future__ import annotations

import re
import subprocess

import pytest


def needs_redis_7() -> None:
    """Skips a test of users that may read some keys and write others, which an older server doesn't know."""
    told = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"v=(\d+)", told)
    assert found, told
    if int(found[1]) < 7:
        pytest.skip(f"Redis {found[1]} knows no rights by key: `apt-get install redis-server` brings a newer one")
