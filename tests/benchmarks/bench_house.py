"""How the house is built: lines of files and functions, circles of imports, and the files that one item's way leads through.

    python tests/benchmarks/bench_house.py                                       # this checkout
    python tests/benchmarks/bench_house.py --lint --write                        # `make lint` timed too; into CONTRIBUTING.md
    git worktree add OLD 6fdad22 && python tests/benchmarks/bench_house.py --folder OLD \\
        --way jobs/extract.py,jobs/contracts.py                                  # another one, with its own way

Reads the syntax trees of the five rooms; imports inside functions and for types count too. A circle is
two or more files of which each reaches each. `--lint` runs what `make lint` runs, without caches: its seconds on the clock, and
those of one core. `--write` puts the figures into the last column of the table in CONTRIBUTING.md. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import ast
import datetime as dt
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("jobs", "models", "feature_repo", "dags", "infra")
PAGE = ROOT / "CONTRIBUTING.md"
WAY = "## One item's way, file by file\n"
"""The part of CONTRIBUTING.md that lists the files to open, in order, to follow one item to its online vector."""
TITLE = "| | before the rooms (commit 6fdad22) | "
"""How the head of the table in CONTRIBUTING.md starts; the date follows."""
LINT = (
    ("ruff", "check", "--no-cache", "."),
    ("ruff", "format", "--check", "--no-cache", "."),
    ("mypy", "--cache-dir", os.devnull),
    ("lint-imports", "--no-cache"),
)
"""What `make lint` runs, without what earlier runs left."""


def main() -> int:
    """Measures one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT)
    parser.add_argument("--way", help="files, with commas; those of CONTRIBUTING.md where not given")
    parser.add_argument("--lint", action="store_true", help="times `make lint` too; run it on a quiet machine")
    parser.add_argument("--write", action="store_true", help="puts the figures into CONTRIBUTING.md")
    arguments = parser.parse_args()
    found = measured(arguments.folder, arguments.way.split(",") if arguments.way else way_of(PAGE.read_text()))
    if arguments.lint:
        found["lint"] = lint(arguments.folder)
    if arguments.write:
        PAGE.write_text(written(PAGE.read_text(), found, f"{dt.datetime.now(dt.UTC):%Y-%m-%d}"))
    print(json.dumps(found))
    return 0


def way_of(page: str) -> list[str]:
    """The files of one item's way as CONTRIBUTING's text lists them. Raises ValueError where the list is gone."""
    found = re.findall(r"`([a-z_/0-9]+\.py)`", page.partition(WAY)[2].partition("\n## ")[0])
    if not found:
        raise ValueError(f"CONTRIBUTING.md has no list of files below {WAY.strip()!r}: write one")
    return found


def measured(folder: Path, way: Sequence[str]) -> dict[str, Any]:
    """All figures but those of `make lint`."""
    files = {path: path.read_text() for room in ROOMS for path in sorted((folder / room).rglob("*.py"))}
    lines = {path: len(text.splitlines()) for path, text in files.items()}
    functions = [length for text in files.values() for length in function_lines(text)]
    return {
        "files": len(files),
        "file_lines": {"longest": max(lines.values()), "median": statistics.median(lines.values())},
        "functions": len(functions),
        "function_lines": {"longest": max(functions), "median": statistics.median(functions)},
        "circles": [sorted(circle) for circle in circles(folder, files)],
        "way": {"files": len(way), "lines": sum(lines[folder / name] for name in way)},
    }


def lint(folder: Path) -> dict[str, float]:
    """Seconds of `make lint` on the clock, and of one core. Raises CalledProcessError where it finds something."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    for command in LINT:
        subprocess.run(
            [Path(sys.executable).parent / command[0], *command[1:]], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    core = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(time.monotonic() - started, 1), "core_seconds": round(core, 1)}


def rows(found: Mapping[str, Any]) -> dict[str, str]:
    """The last column of the table, by the first; `make lint` only where it was timed."""
    longest = {name: f"{found[name]['longest']:g}, {found[name]['median']:g}" for name in ("file_lines", "function_lines")}
    told = {
        "files": f"{found['files']:,}",
        "lines of a file: longest, median": longest["file_lines"],
        "functions": f"{found['functions']:,}",
        "lines of a function: longest, median": longest["function_lines"],
        "circles of files": f"{len(found['circles'])}",
        "files that one item's way leads through, and their lines": f"{found['way']['files']}, {found['way']['lines']:,}",
    }
    if "lint" in found:
        told["`make lint` without a cache"] = (
            f"{found['lint']['seconds']:.0f} s ({found['lint']['core_seconds']:.0f} s of one core)"
        )
    return told


def written(page: str, found: Mapping[str, Any], date: str) -> str:
    """CONTRIBUTING's text with the figures in the last column of its table. Raises ValueError for a row that it lacks."""
    lines = page.splitlines()
    for name, value in {"": date, **rows(found)}.items():
        start = f"| {name} |" if name else TITLE
        at = next((at for at, line in enumerate(lines) if line.startswith(start)), None)
        if at is None:
            raise ValueError(f"CONTRIBUTING.md has no row {start!r}: write one, with three cells")
        lines[at] = f"{lines[at].rstrip('| ').rpartition('|')[0]}| {value} |"
    return "\n".join(lines) + "\n"


def function_lines(text: str) -> Iterator[int]:
    """Lines of each function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def circles(folder: Path, files: Mapping[Path, str]) -> Iterator[set[str]]:
    """Groups of files that import one another, by module name."""
    modules = {".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path for path in files}
    graph = networkx.DiGraph()
    for module, path in modules.items():
        for node in ast.walk(ast.parse(files[path])):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
                # `from package import room` opens the room alone
                names = [name for name in names if name in modules and name != node.module] or [node.module]
            graph.add_edges_from((module, name) for name in names if name in modules and name != module)
    return (found for found in networkx.strongly_connected_components(graph) if len(found) > 1)


if __name__ == "__main__":
    raise SystemExit(main())
