"""The page on security names tests that are there and that could fail: each attack that it tells of was tried."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
ROWS = [line for line in PAGE.split("## Attacks tried")[1].split("\n## ")[0].splitlines() if line.startswith("| ")][1:]
CHECKS = {"raises", "fail"}
"""What of pytest fails a test, besides `assert`."""


def found_in(path: Path) -> dict[str, ast.FunctionDef]:
    """The tests of a file by their names."""
    return {
        node.name: node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@cache
def every_test() -> dict[str, dict[str, ast.FunctionDef]]:
    """The tests of each file."""
    return {path.relative_to(ROOT).as_posix(): found_in(path) for path in (ROOT / "tests").rglob("test_*.py")}


def checks(test: ast.FunctionDef) -> bool:
    """Whether something in a test can fail it, and no mark skips it whatever is installed.

    A fixture or a call may still skip it where PostgreSQL, Redis 7 or an engine is missing: the page says so.
    """
    can_fail = any(
        isinstance(node, ast.Assert) or (isinstance(node, ast.Attribute) and node.attr in CHECKS) for node in ast.walk(test)
    )
    return can_fail and not any("mark.skip" in ast.unparse(decorator) for decorator in test.decorator_list)


def wrong(row: str) -> list[str]:
    """What a row names that is not there, or checks nothing; a file in a row is where its tests are."""
    names, files = re.findall(r"`(test_\w+)`", row), re.findall(r"`(tests/\S+\.py)`", row)
    found = [file for file in files if not every_test().get(file)]
    for name in names:
        places = [tests[name] for file, tests in every_test().items() if name in tests and (file in files or not files)]
        found += [] if places and all(map(checks, places)) else [name]
    return found if names or files else ["no test"]


def test_there_are_attacks() -> None:
    assert len(ROWS) >= 40


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split(" | ")[0].strip("| "))
def test_every_attack_of_the_page_is_a_test_that_can_fail(row: str) -> None:
    assert not wrong(row)


def test_a_row_that_is_stale_is_found() -> None:
    row = "| a user does more than its work | refused | "
    there = "`test_a_redis_user_does_its_work_and_no_more`"
    assert wrong(f"{row}{there} |") == []
    assert wrong(f"{row}{there}, `test_that_was_renamed` |") == ["test_that_was_renamed"]
    assert wrong(f"{row}{there} in `tests/feature_repo/test_stores.py` |") == [there.strip("`")], "it is elsewhere"
    assert wrong(f"{row}`tests/infra/test_gone.py` |") == ["tests/infra/test_gone.py"]
    assert wrong(row) == ["no test"]
    for body in ("lease()", "with suppress(Fenced):\n  lease()"):
        (function,) = ast.parse(f"def test_x():\n {body.replace(chr(10), chr(10) + ' ')}").body
        assert isinstance(function, ast.FunctionDef) and not checks(function)
