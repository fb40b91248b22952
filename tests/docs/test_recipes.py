"""docs/recipes.md stays what the Config types say."""

from __future__ import annotations

import importlib
import tomllib
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jobs.__main__ import JOBS, SHARED

ROOT = Path(__file__).parents[2]


def known_keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Keys of a config by its types, as the command line builds it."""
    hints = typing.get_type_hints(config)
    for known in fields(config):
        if known.name == "run":
            continue
        kind = hints[known.name]
        if is_dataclass(kind):
            yield from known_keys(kind, f"{prefix}{known.name}.")
        else:
            yield f"{prefix}{known.name}"


def test_the_reference_is_what_the_generator_writes(generate: ModuleType) -> None:
    written = (ROOT / "docs" / "recipes.md").read_text()
    assert written == generate.page(), "run `python docs/generate.py`"


@pytest.mark.parametrize("job", ["scft", "pretrain", "rat", "publish", "report", "explain"])
def test_the_generator_finds_every_key_that_the_command_line_knows(job: str, generate: ModuleType) -> None:
    found = [key.name for key in generate.keys(job)]
    assert found == list(known_keys(importlib.import_module(f"jobs.{job}").Config))


def test_every_job_of_the_command_line_has_its_part(generate: ModuleType) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    for job in (*JOBS, *SHARED):
        assert f"\n## {job}\n" in page


def test_the_keys_to_set_first_exist_stand_first_and_are_marked(generate: ModuleType) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    top, _, rest = page.partition("\n## run\n")
    for name in generate.FIRST:
        table, _, key = name.partition(".")
        assert key in [found.name for found in generate.keys(table)]
        assert f"| `{name}` |" in top
        assert f"| `{key}` | **first** |" in rest


@dataclass(frozen=True, kw_only=True)
class Nested:
    """Part of a configuration."""

    told: int = 1
    """How many."""
    riddle: int = 2


@dataclass(frozen=True, kw_only=True)
class Silent:
    """A configuration of which one key has no text."""

    nested: Nested = field(default_factory=Nested)
    plain: str = ""
    """What it says."""


def test_a_key_without_a_text_is_refused_by_name(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "config_of", lambda table: Silent)
    with pytest.raises(ValueError, match=r"mean: scft\.nested\.riddle; write"):
        generate.keys("scft")


def test_how_long_a_model_trains_is_no_matter_for_experts_alone(generate: ModuleType) -> None:
    for name in generate.USUAL:
        table, _, key = name.partition(".")
        found = next(found for found in generate.keys(table) if found.name == key)
        assert generate.level(table, found) == "usual"
    assert generate.level("scft", next(key for key in generate.keys("scft") if key.name == "training.clip")) == "expert"


def test_every_key_of_the_recipes_that_are_shipped_is_on_the_page(generate: ModuleType) -> None:
    for recipe in (ROOT / "jobs" / "recipes").glob("*.toml"):
        for table, values in tomllib.loads(recipe.read_text()).items():
            known = {key.name: key.kind for key in generate.keys(table)}
            for key in values:
                assert any(name == key or name.startswith(f"{key}.") for name in known), f"{recipe.name}: {table}.{key}"


@pytest.mark.parametrize(
    ("table", "key", "default"),
    [
        ("promote", "margins", "{ overall = 0.02, tail = 0.05, cold = 0.1, short = 0.03 }"),  # made by a factory
        ("evaluate", "baselines", "{}"),  # empty in truth
        ("rat", "training.cosine", "0.07"),  # the owner's, not the nested type's
        ("pretrain", "training.cosine", "0.0"),
        ("scft", "base", '"embedded"'),
        ("extract", "interactions.table", ""),
    ],
)
def test_a_default_is_what_a_job_gets_where_the_key_is_left_out(generate: ModuleType, table: str, key: str, default: str) -> None:
    assert {found.name: found.default for found in generate.keys(table)}[key] == default


def test_the_defaults_of_every_job_are_those_of_its_config(generate: ModuleType) -> None:
    for job in JOBS:
        config = importlib.import_module(f"jobs.{job}").Config
        for name, value in typing.get_type_hints(config).items():
            if name in ("run", "ds") or is_dataclass(value):
                continue
            known = next(known for known in fields(config) if known.name == name)
            made = known.default if known.default_factory is MISSING else known.default_factory()
            told = {found.name: found.default for found in generate.keys(job)}[name]
            assert told == ("" if made is MISSING else generate.toml(made)), f"{job}.{name}"
