"""Writes docs/recipes.md: every key that a recipe may hold, from the JSON schema of the Config types.

    python docs/generate.py

The meaning of a key is the text under its field, which pydantic reads into the schema. A test holds the page against the types.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from jobs.__main__ import JOBS, SHARED  # noqa: E402 (the checkout's own)

PAGE = ROOT / "docs" / "recipes.md"
HEAD = """# Recipes: every key

<!-- Written by docs/generate.py from the Config types: change the text under a field there and run it. -->

A recipe is one TOML file with a table for each job; shipped ones are `jobs/recipes/starter.toml`, `smoke.toml` and `prod.toml`.
A key that is not here is refused by name. `$NAME` in a text is replaced from the environment. `--set job.key=value` overrides one
value:

    python -m jobs publish --recipe jobs/recipes/smoke.toml --ds 1998-04-22 --set publish.codec=float16

Keys without a default must be given; where the default is "left out", only a recipe without the key has it. A level says who
needs a key: **first** is for everybody, `usual` for most who run it every night, `expert` for those who measure what a change
does.

## Set these first
"""
FIRST = (
    "run.lake", "run.tracking_uri", "extract.items.table", "extract.items.item_id", "extract.items.attributes",
    "extract.interactions.table", "extract.interactions.user_id", "extract.interactions.item_id",
    "extract.interactions.timestamp", "extract.interactions.unit", "scft.base", "scft.policy.domain",
)  # fmt: skip
"""What nobody can leave as it is, in the order in which a new recipe names it."""
USUAL = ("scft.training.steps", "pretrain.training.epochs", "rat.training.epochs")
"""Nested keys that most people set all the same: how long a model trains."""
PLAIN = ("items", "interactions", "policy", "spark", "floors")
"""Nested tables whose keys are no matter for experts."""
WORDS = {"string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None"}
LEFT_OUT = "left out"


@dataclass(frozen=True, kw_only=True)
class Key:
    """One line of the reference."""

    name: str
    """Dotted, without the job."""
    kind: str
    default: str
    """As a recipe would write it; empty where it must be given."""
    text: str


def schema_of(config: Any) -> dict[str, Any]:
    """The JSON schema of a dataclass, with the text under each field as its description."""
    describe(config)
    found: dict[str, Any] = TypeAdapter(config).json_schema()
    return found


def describe(config: Any) -> None:
    """Lets pydantic read the texts under the fields of a dataclass and of those nested in it."""
    config.__pydantic_config__ = {"use_attribute_docstrings": True}
    for hint in typing.get_type_hints(config).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                describe(part)


def config_of(table: str) -> Any:
    """The dataclass that a table of the recipe fills."""
    if table == "run":
        return importlib.import_module("jobs.run").Run
    if table in SHARED:
        config = importlib.import_module(f"jobs.{SHARED[table][0]}").Config
        return typing.get_type_hints(config)[table]
    return importlib.import_module(f"jobs.{table}").Config


def keys(table: str) -> list[Key]:
    """Every key of a table of the recipe, nested ones with dotted names. Raises ValueError for one without a text."""
    config = config_of(table)
    schema = schema_of(config)
    found = list(walk(schema, schema.get("$defs", {}), dict(defaults(config))))
    if silent := [f"{table}.{key.name}" for key in found if not key.text]:
        raise ValueError(f"no text says what these keys mean: {', '.join(silent)}; write one under their fields")
    return found


def defaults(config: Any, given: Any = None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(Dotted name, default) of every key that has one; `given` is the nested config that its owner has as a default.

    The schema lacks what a factory makes, and doesn't know that an owner's default may differ from the nested type's own.
    """
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if given is not None:
            value = getattr(given, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = field.default
        if dataclasses.is_dataclass(hints[field.name]):
            owned = None if value is dataclasses.MISSING else value
            yield from defaults(hints[field.name], owned, f"{prefix}{field.name}.")
        elif value is not dataclasses.MISSING:
            yield f"{prefix}{field.name}", value


def walk(schema: Mapping[str, Any], known: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> Iterator[Key]:
    """Keys of one object of a schema."""
    for field, value in schema["properties"].items():
        if field in ("run", "ds") and not prefix:
            continue
        nested = known.get(str(value.get("$ref", "")).rpartition("/")[2])
        if nested is not None and "properties" in nested:
            yield from walk(nested, known, defaults, f"{prefix}{field}.")
        else:
            name, text = f"{prefix}{field}", " ".join(str(value.get("description", "")).split())
            default = toml(defaults[name]) if name in defaults else ""
            yield Key(name=name, kind=kind(value, known), default=default, text=text)


def kind(value: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """A type as Python writes it."""
    if "$ref" in value:
        return kind(known[value["$ref"].rpartition("/")[2]], known)
    if "anyOf" in value:
        return " | ".join(kind(part, known) for part in value["anyOf"])
    if "enum" in value or "const" in value:
        return f"Literal[{', '.join(json.dumps(choice) for choice in value.get('enum', [value.get('const')]))}]"
    if value.get("type") == "array":
        parts = value.get("prefixItems")
        inner = ", ".join(kind(part, known) for part in parts) if parts else f"{kind(value.get('items', {}), known)}, ..."
        return f"tuple[{inner}]"
    if value.get("type") == "object":
        inside = value.get("additionalProperties")
        return f"dict[str, {kind(inside, known)}]" if isinstance(inside, dict) else "dict[str, Any]"
    return "Path" if value.get("format") == "path" else WORDS.get(str(value.get("type")), "Any")


def toml(value: object) -> str:
    """A default in TOML's words; None, which TOML has no word for, is a key that is left out."""
    if value is None:
        return LEFT_OUT
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return f'"{value}"'
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{name} = {toml(part)}" for name, part in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(toml(part) for part in value)}]"
    return str(value)


def level(table: str, key: Key) -> str:
    """Who needs a key."""
    if f"{table}.{key.name}" in FIRST:
        return "**first**"
    if f"{table}.{key.name}" in USUAL:
        return "usual"
    expert = table in SHARED or ("." in key.name and key.name.partition(".")[0] not in PLAIN)
    return "expert" if expert else "usual"


def cell(text: str) -> str:
    """A text in a Markdown table."""
    return text.replace("|", "\\|")


def shown(text: str) -> str:
    """A default in its cell, cut if it is long."""
    if not text:
        return "must be given"
    if text == LEFT_OUT:
        return text
    return f"`{cell(text if len(text) <= 90 else f'{text[:87]}…')}`"


def section(table: str, purpose: str) -> str:
    """A table's part of the page: the keys to set first stand first."""
    found = sorted(keys(table), key=lambda key: f"{table}.{key.name}" not in FIRST)
    if not found:
        return f"\n## {table}\n\n{purpose}\n\nNo keys.\n"
    rows = [
        f"| `{key.name}` | {level(table, key)} | `{cell(key.kind)}` | {shown(key.default)} | {cell(key.text)} |" for key in found
    ]
    head = "| key | level | type | default | meaning |\n|---|---|---|---|---|\n"
    return f"\n## {table}\n\n{purpose}\n\n{head}" + "\n".join(rows) + "\n"


def first() -> str:
    """The dozen keys that a new recipe names."""
    found = {f"{table}.{key.name}": key for table in ("run", "extract", "scft") for key in keys(table)}
    rows = [f"| `{name}` | {shown(found[name].default)} | {cell(found[name].text)} |" for name in FIRST]
    return "\n| key | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def page() -> str:
    """The whole reference."""
    parts = [HEAD, first(), section("run", "What all jobs of one night share; `ds` is the command line's `--ds`.")]
    for job, purpose in JOBS.items():
        parts.append(section(job, f"{purpose[0].upper()}{purpose[1:]}."))
    for table, users in SHARED.items():
        both = " and ".join(f"`{job}`" for job in users)
        parts.append(section(table, f"Shared by {both}; a table of that name inside one of them goes before it."))
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)} written")
