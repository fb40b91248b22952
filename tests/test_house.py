"""The house stays one that a stranger walks through: short files, short functions, tests where their code is."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("jobs", "models", "feature_repo", "dags", "infra")
FILE_LINES, FUNCTION_LINES = 350, 40
LONG_YET: set[str] = set()
"""Files and functions that are still to be split; a test says when one need stand here no more."""


def sources() -> list[Path]:
    """Every Python file of the program."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", *ROOMS], capture_output=True, text=True, check=False).stdout
    found = [ROOT / path for path in listed.split() if path.endswith(".py") and (ROOT / path).exists()]
    if not found:
        pytest.skip("not a git checkout: there is no list of files to measure")
    return found


def too_long(text: str, name: str) -> Iterator[str]:
    """What is over the limits in a file: `NAME` for the file itself, `NAME:FUNCTION` for a function."""
    if len(text.splitlines()) > FILE_LINES:
        yield name
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
                yield f"{name}:{node.name}"


def test_no_file_has_more_than_350_lines_and_no_function_more_than_40() -> None:
    found = {one for path in sources() for one in too_long(path.read_text(), str(path.relative_to(ROOT)))}
    assert found <= LONG_YET, f"split these: {sorted(found - LONG_YET)}"
    assert found >= LONG_YET, f"short by now, take them out of LONG_YET: {sorted(LONG_YET - found)}"


@pytest.mark.parametrize(
    ("lines", "over"),
    [(350, []), (351, ["f.py"])],
)
def test_a_long_file_is_found(lines: int, over: list[str]) -> None:
    assert list(too_long("x = 1\n" * lines, "f.py")) == over


@pytest.mark.parametrize(("lines", "over"), [(39, []), (40, ["f.py:named"])])
def test_a_long_function_is_found_wherever_it_stands(lines: int, over: list[str]) -> None:
    body = "        x = 1\n" * lines
    assert list(too_long(f"class House:\n    async def named(self):\n{body}", "f.py")) == over


def test_tests_stand_where_the_code_stands() -> None:
    """A package's tests lie in the folder of its name: tests/jobs/scft/ for jobs/scft/."""
    folders = {path.parent.relative_to(ROOT) for path in sources()}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        room = path.parent.relative_to(ROOT / "tests")
        if room.parts and room.parts[0] in ROOMS:
            assert room in folders or room == Path("models"), f"{path}: there is no folder {room}"
            assert room / path.stem.removeprefix("test_") not in folders, f"{path}: its place is {room}/{path.stem[5:]}/"
