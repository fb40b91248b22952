"""How the house is built: lines of files and functions, circles of imports, and the files that one item's way leads through.

    python tests/benchmarks/bench_house.py                                       # this checkout
    git worktree add /tmp/old 6fdad22 && python tests/benchmarks/bench_house.py --folder /tmp/old \\
        --way jobs/extract.py,jobs/contracts.py                                  # another one, with its own way

Reads the syntax trees of the five rooms; imports inside functions and for types count too. A circle is
two or more files of which each reaches each. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

import networkx

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("jobs", "models", "feature_repo", "dags", "infra")
WAY = (
    "jobs/extract/__init__.py",
    "jobs/extract/shape.py",
    "jobs/extract/judge.py",
    "jobs/lake/tables.py",
    "jobs/embed/__init__.py",
    "models/text/prompts.py",
    "models/text/packing.py",
    "models/text/encoder.py",
    "models/text/embedding.py",
    "jobs/project.py",
    "models/behaviour/fused.py",
    "jobs/publish/__init__.py",
    "feature_repo/spaces.py",
    "feature_repo/redis_store.py",
)
"""Files to open, in order, to follow one item from its table to its online vector."""


def main() -> int:
    """Measures one folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT)
    parser.add_argument("--way", default=",".join(WAY))
    arguments = parser.parse_args()
    files = {path: path.read_text() for room in ROOMS for path in sorted((arguments.folder / room).rglob("*.py"))}
    lines = {path: len(text.splitlines()) for path, text in files.items()}
    functions = [length for text in files.values() for length in function_lines(text)]
    way = [arguments.folder / name for name in arguments.way.split(",")]
    result = {
        "files": len(files),
        "file_lines": {"longest": max(lines.values()), "median": statistics.median(lines.values())},
        "functions": len(functions),
        "function_lines": {"longest": max(functions), "median": statistics.median(functions)},
        "circles": [sorted(circle) for circle in circles(arguments.folder, files)],
        "way": {"files": len(way), "lines": sum(lines[path] for path in way)},
    }
    print(json.dumps(result))
    return 0


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
