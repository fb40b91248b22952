"""The page on security names tests that are there: each attack that it tells of was tried."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()


def test_every_attack_of_the_page_is_a_test() -> None:
    table = PAGE.split("## Attacks tried")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 25
    paths = (ROOT / "tests").rglob("test_*.py")
    tests = {name for path in paths for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        files = re.findall(r"`(tests/\S+\.py)`", row)
        assert named or files, f"names no test: {row}"
        assert not [name for name in named if name not in tests], row
        assert all((ROOT / file).exists() for file in files), row
