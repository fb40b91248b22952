"""The house stays one that a stranger walks through: short files, short functions, tests where their code is."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from jobs.__main__ import COMMANDS
from jobs.recipe import JOBS

ROOT = Path(__file__).parent.parent
ROOMS = ("jobs", "models", "feature_repo", "dags", "infra")
FILE_LINES, FUNCTION_LINES = 350, 40
TEST_LINES = 520
"""Of a file of tests: past that it tests more than one thing, and parts by it."""
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


def test_no_file_of_tests_has_more_than_520_lines() -> None:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    found = [f"{path.relative_to(ROOT)}: {count}" for path in files if (count := len(path.read_text().splitlines())) > TEST_LINES]
    assert not found, f"part these by what they test: {found}"


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


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """tests/benchmarks/bench_house.py."""
    spec = importlib.util.spec_from_file_location("bench_house", ROOT / "tests" / "benchmarks" / "bench_house.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_house_is_at_most_a_tenth_off(bench: ModuleType) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    for name, now in bench.rows(bench.measured(ROOT, bench.way_of(page))).items():
        told = re.search(rf"^\| {re.escape(name)} \|.*\| ([^|]*) \|$", page, re.MULTILINE)
        assert told, name
        pairs = zip(re.findall(r"[\d.]+", told[1].replace(",", "")), re.findall(r"[\d.]+", now.replace(",", "")), strict=True)
        for was, figure in pairs:
            assert abs(float(was) - float(figure)) <= 0.1 * float(figure), (
                f"{name}: the table says {told[1]}, it is {now}: run python tests/benchmarks/bench_house.py --write"
            )


def test_writing_the_table_changes_its_last_column_alone(bench: ModuleType) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    found = bench.measured(ROOT, bench.way_of(page)) | {"lint": {"seconds": 12.4, "core_seconds": 3.6}}
    changed = bench.written(page, found | {"files": 12345}, "2030-01-02")
    assert "| 2030-01-02 |" in changed and "| files | 76 | 12,345 |" in changed
    assert "| `make lint` without a cache | 65 s (37 s of one core) | 12 s (4 s of one core) |" in changed
    assert len(changed.splitlines()) == len(page.splitlines())
    with pytest.raises(ValueError, match="has no row"):
        bench.written(page.replace("| files |", "| file |"), found, "2030-01-02")


def test_one_items_way_is_the_list_in_contributing_and_its_files_are_counted_there(bench: ModuleType) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    way = bench.way_of(page)
    assert len(set(way)) == len(way) and [name for name in way if not (ROOT / name).is_file()] == []
    told = re.search(r"open these (\d+) files in this order", page)
    assert told and int(told[1]) == len(way)
    assert bench.way_of("# Contributing\n\n" + bench.WAY + "1. `jobs/pin.py`: asked.\n\n## Next\n\n`jobs/run.py`") == [
        "jobs/pin.py"
    ]
    with pytest.raises(ValueError, match="has no list of files"):
        bench.way_of(page.replace(bench.WAY, "## Another\n"))


def test_the_command_lints_what_make_lint_lints(bench: ModuleType) -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe
    run = [line.strip().removeprefix("$(BIN)/").split() for line in recipe[1].splitlines()]
    assert run == [[word for word in line if word not in ("--no-cache", "--cache-dir", "/dev/null")] for line in bench.LINT]


def test_no_files_import_one_another_in_a_circle(bench: ModuleType) -> None:
    assert bench.measured(ROOT, ())["circles"] == []


def contract(name: str, part: str) -> set[str]:
    """The modules that a contract of import-linter lists."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (found,) = (one for one in contracts if one["name"] == name)
    return set(found[part])


def modules(folder: str) -> set[str]:
    """The modules and packages that lie in a folder, none below it."""
    home = ROOT / folder
    found = [path.stem for path in home.glob("*.py") if path.stem != "__init__"]
    found += [path.parent.name for path in home.glob("*/__init__.py")]
    return {f"{folder.replace('/', '.')}.{name}" for name in found}


EVERY_JOB = {f"jobs.{name}" for name in JOBS}
COMMAND = {f"jobs.{name}" for name in COMMANDS} | {"jobs.__main__", "jobs.frames"}
SLOW = {"jobs.lake.tensors"}
"""The lake's border with torch."""


def test_every_job_and_every_file_of_the_lake_and_the_feature_repository_stands_in_its_contract() -> None:
    assert contract("a job never imports another job", "modules") == EVERY_JOB
    assert contract("the lake and the engines know no job", "forbidden_modules") == EVERY_JOB
    assert contract("jobs know no command", "source_modules") >= EVERY_JOB
    assert contract("jobs know no command", "forbidden_modules") == COMMAND
    quick = contract("the lake's tables and the command line load in a moment", "source_modules")
    assert {name for name in quick if name.startswith("jobs.lake.")} == modules("jobs/lake") - SLOW
    knows_no_server = contract("the feature repository does not know the serving process", "source_modules")
    assert knows_no_server == modules("feature_repo") - {"feature_repo.serving"}
    here = modules("jobs") - {"jobs.engines"}
    assert here >= EVERY_JOB | COMMAND
    assert contract("MLflow and faiss are called by the engines alone", "source_modules") == here
    spark = contract("Spark is called by the engines and by the jobs that are programs for it", "source_modules")
    assert spark == here - {"jobs.extract"}
