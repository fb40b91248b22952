"""The README is true: its tree is the real one, its commands exist, its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from jobs.__main__ import COMMANDS, JOBS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def tracked() -> set[str]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False).stdout.split()
    return {path for path in listed if (ROOT / path).exists()}


def tree() -> set[str]:
    """Every path that the README's tree names: folders end in `/`, names of one line share a folder."""
    block = re.search(r"## Layout\n.*?```\n(.*?)```", README, re.S)
    assert block, "README has a section Layout with a tree"
    named = set()
    for line in block[1].splitlines():
        words = line.split("#")[0].split()
        folder = words[0] if words and words[0].endswith("/") else ""
        named |= {folder + word for word in words if word != folder} | ({folder} if folder else set())
    return named


def test_the_tree_is_the_real_one() -> None:
    files = tracked()
    if not files:
        pytest.skip("not a git checkout: there is no list of files to hold the tree against")
    shown = tree()
    for path in shown:
        assert (ROOT / path).exists(), f"README's tree names {path}, which is not there"
    folders = {path for path in shown if path.endswith("/")}
    for path in sorted(files):
        folder = path.rpartition("/")[0] + "/" if "/" in path else ""
        covered = any(path.startswith(outer) for outer in folders if not any(s != outer and s.startswith(outer) for s in shown))
        hidden = path.startswith(".") or path.endswith("__init__.py")
        assert hidden or covered or path in shown or folder.startswith("tests/"), f"README's tree leaves out {path}"


def test_every_make_target_named_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z]+)`?", README)):
        assert re.search(rf"^{target}:", makefile, re.M), f"README names `make {target}`"


def test_every_job_is_in_the_table_and_every_command_names_a_job() -> None:
    table = re.findall(r"^\| `([a-z]+)`", (ROOT / "docs" / "jobs.md").read_text(), re.M)
    assert sorted(table) == sorted(JOBS)
    for job in re.findall(r"python -m jobs ([a-z]+)", README):
        assert job in (*JOBS, *COMMANDS)


def test_every_link_to_a_file_leads_to_one() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), f"README links to {target}"


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(README.splitlines()) <= 115
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in README, f"README does not lead to docs/{page.name}"


def test_the_gate_calls_the_readme_s_test_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text() and "make test" in README


def test_tests_take_one_process_more_than_cores_whatever_threads_each_has() -> None:
    # nproc answers what OMP_NUM_THREADS says where that is set, and the tests set it
    told = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    processes = re.search(r"pytest -n (\$\(.*\)) ", told)
    assert processes
    found = subprocess.run(
        ["bash", "-c", f"echo {processes[1]}"], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    ).stdout
    assert int(found) == len(os.sched_getaffinity(0)) + 1
