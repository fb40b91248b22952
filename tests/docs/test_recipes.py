"""docs/recipes.md stays what the Config types say."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def known_keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Keys of a config by its types, as the command line builds it."""
    hints = typing.get_type_hints(config)
    for field in fields(config):
        if field.name == "run":
            continue
        kind = hints[field.name]
        if is_dataclass(kind):
            yield from known_keys(kind, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def test_the_reference_is_what_the_generator_writes(generate: ModuleType) -> None:
    written = (ROOT / "docs" / "recipes.md").read_text()
    assert written == generate.page(), "run `python docs/generate.py`"


@pytest.mark.parametrize("job", ["scft", "pretrain", "rat", "publish", "report", "explain"])
def test_the_generator_finds_every_key_that_the_command_line_knows(job: str, generate: ModuleType) -> None:
    place = generate.find(f"jobs.{job}", "Config")
    found = [key.name for key in generate.keys(place)]
    assert found == list(known_keys(importlib.import_module(f"jobs.{job}").Config))


def test_every_job_of_the_command_line_has_its_part(generate: ModuleType) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    for job in generate.jobs():
        assert f"\n## {job}\n" in page
