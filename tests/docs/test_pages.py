"""What the documentation tells people to type is what the command line takes, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jobs.__main__ import COMMANDS, JOBS, SHARED, apply, parse

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NAMES = [page.name for page in PAGES]


def commands(text: str) -> Iterator[list[str]]:
    """Words of each `python -m jobs` (or `python -m jobs.torchrun … -m jobs`) line, continued ones joined."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        found = re.search(r"-m jobs ([a-z]+ --recipe .*)", line)
        if found and not line.lstrip().startswith(("|", "<!--")):
            yield shlex.split(found[1].split("`")[0].rstrip("&; "), comments=True)


def leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of a TOML table's values."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def known(generate: ModuleType, name: str) -> bool:
    """Whether a recipe may hold `job.key`: a key of its Config, or one below a free table such as `spark`."""
    job, _, key = name.partition(".")
    for found in generate.keys(job):
        if key == found.name or (found.kind.startswith("dict") and key.startswith(f"{found.name}.")):
            return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_of_the_documentation_is_one_the_command_line_takes(page: Path, generate: ModuleType) -> None:
    for words in commands(page.read_text()):
        if words[0] in COMMANDS:
            assert words[1] == "--recipe"
            continue
        arguments = parse(words)
        for override in arguments.set:
            apply({}, override)
            assert known(generate, override.partition("=")[0]), override


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_recipe_of_the_documentation_has_only_keys_that_exist(page: Path, generate: ModuleType) -> None:
    for block in re.findall(r"(?s)```toml\n(.*?)```", page.read_text()):
        for name in leaves(tomllib.loads("\n".join(line.strip() for line in block.splitlines()))):
            assert known(generate, name), name


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_key_that_a_page_names_in_passing_exists(page: Path, generate: ModuleType) -> None:
    for job, key in re.findall(r"`([a-z]+)\.([a-z_.]+)`", page.read_text()):
        if job in (*JOBS, *SHARED, "run"):
            assert known(generate, f"{job}.{key}"), f"{job}.{key}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_commands_are_found_at_all() -> None:
    assert sum(len(list(commands(page.read_text()))) for page in PAGES) > 15


def test_every_asset_of_the_dags_is_documented() -> None:
    made = {name for path in (ROOT / "dags").glob("*.py") for name in re.findall(r'asset\("([a-z_]+)"\)', path.read_text())}
    told = set(re.findall(r"`llmemb://([a-z_]+)`", (ROOT / "docs" / "cluster.md").read_text()))
    assert made == told and made
