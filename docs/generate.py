"""Writes docs/recipes.md: every key that a recipe may hold, from the Config types and the texts under their fields.

    python docs/generate.py

Sources are read, not imported: neither Spark nor torch needs to be there. A test holds the page against the types.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipes.md"
HEAD = """# Recipes: every key

<!-- Written by docs/generate.py from the Config types: change the text under a field there and run it. -->

A recipe is one TOML file with a table for each job; shipped ones are `jobs/recipes/smoke.toml` and `prod.toml`. A key that is
not here is refused by name. `$NAME` in a text is replaced from the environment. `--set job.key=value` overrides one value:

    python -m jobs publish --recipe jobs/recipes/smoke.toml --ds 1998-04-22 --set publish.codec=float16

Keys without a default must be given.
"""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One line of the reference."""

    name: str
    """Dotted, without the job."""
    kind: str
    default: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """A class definition and the module it stands in."""

    module: str
    node: ast.ClassDef


@cache
def parsed(module: str) -> ast.Module:
    """A module's syntax tree."""
    return ast.parse(source_of(module).read_text())


def source_of(module: str) -> Path:
    """The file of a module, or of a package."""
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def find(module: str, name: str) -> Place | str | None:
    """What a name means in a module: a class of ours, the text of an assigned type such as `Literal[…]`, or None."""
    for node in parsed(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Place(module=module, node=node)
        if isinstance(node, ast.Assign) and any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
            return ast.unparse(node.value)
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            source = node.module or ""
            return find(source, name) if source.split(".")[0] in ("jobs", "models", "feature_repo") else None
    return None


def fields(place: Place) -> Iterator[tuple[ast.AnnAssign, str]]:
    """A dataclass's fields, each with the text under it."""
    body = place.node.body
    for number, node in enumerate(body):
        if isinstance(node, ast.AnnAssign):
            after = body[number + 1] if number + 1 < len(body) else None
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            yield node, " ".join(str(text).split())


def keys(place: Place, prefix: str = "") -> Iterator[Key]:
    """Every key of a config, nested ones with dotted names."""
    for node, text in fields(place):
        name = f"{prefix}{ast.unparse(node.target)}"
        if name == "run":
            continue
        kind = find(place.module, node.annotation.id) if isinstance(node.annotation, ast.Name) else None
        if isinstance(kind, Place):
            yield from keys(kind, f"{name}.")
        else:
            yield Key(name=name, kind=kind or ast.unparse(node.annotation), default=default(node.value, place.module), text=text)


def default(value: ast.expr | None, module: str) -> str:
    """A field's default as a recipe would write it; empty where it must be given."""
    if value is None:
        return ""
    if isinstance(value, ast.Call):
        factory = next((word.value for word in value.keywords if word.arg == "default_factory"), None)
        given = next((word.value for word in value.keywords if word.arg == "default"), None)
        return {"dict": "{}", "list": "[]", "tuple": "[]"}.get(ast.unparse(factory), "") if factory else default(given, module)
    if isinstance(value, ast.Name):
        known = find(module, value.id)
        return known if isinstance(known, str) else value.id
    try:
        return toml(ast.literal_eval(value))
    except ValueError:
        return ast.unparse(value)


def toml(value: object) -> str:
    """A default in TOML's words."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple | list):
        return f"[{', '.join(toml(part) for part in value)}]"
    return str(value)


def jobs() -> dict[str, str]:
    """Jobs and their purposes, in the order of the command line."""
    for node in parsed("jobs.__main__").body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "JOBS":
            found: dict[str, str] = ast.literal_eval(node.value)
            return found
    raise ValueError("jobs/__main__.py has no JOBS")


def cell(text: str) -> str:
    """A text in a Markdown table."""
    return text.replace("|", "\\|")


def section(title: str, purpose: str, place: Place) -> str:
    """A job's part of the page."""
    found = list(keys(place))
    if not found:
        return f"\n## {title}\n\n{purpose}\n\nNo keys.\n"
    rows = [f"| `{key.name}` | `{cell(key.kind)}` | {shown(key.default)} | {cell(key.text)} |" for key in found]
    return f"\n## {title}\n\n{purpose}\n\n| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def shown(text: str) -> str:
    """A default in its cell, cut if it is long."""
    if not text:
        return "must be given"
    return f"`{cell(text if len(text) <= 90 else f'{text[:87]}…')}`"


def page() -> str:
    """The whole reference."""
    run = find("jobs.run", "Run")
    assert isinstance(run, Place)
    parts = [HEAD, section("run", "What all jobs of one night share; `ds` is the command line's `--ds`.", run)]
    for job, purpose in jobs().items():
        place = find(f"jobs.{job}", "Config") if source_of(f"jobs.{job}").exists() else None
        if isinstance(place, Place):
            parts.append(section(job, f"{purpose[0].upper()}{purpose[1:]}.", place))
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"{PAGE.relative_to(ROOT)} written")
