"""Recipes: TOML with a table for each job -> frozen configs; whatever is off is named with its key and the remedy."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from jobs.redaction import redacted, shows_secret
from jobs.run import InputError

C = TypeVar("C")

JOBS = {
    "movielens": "loads MovieLens-100k into Spark tables, as a catalogue to try everything on",
    "pin": "asks the registry once which champion serves -> its ids, which all other jobs of the night use",
    "extract": "Spark tables -> items, interactions, sequences, quarantine",
    "scft": "items -> an encoder (LoRA weights), fine-tuned on the items' own attributes",
    "embed": "items, an encoder -> llm_embeddings (only texts not embedded yet)",
    "pretrain": "sequences -> the collaborative teacher, an ID-only SRS",
    "rat": "sequences, llm_embeddings, the teacher -> a recommender",
    "evaluate": "a recommender, the champion, held-out sequences -> metrics by slice",
    "promote": "the evaluation -> aliases champion and previous, or a refusal that says why",
    "project": "llm_embeddings, a recommender -> item_embeddings of one space",
    "publish": "item_embeddings -> the feature store, verified, then the pointer",
    "lookup": "reads the online store back as a client would; fails on any difference",
    "recommend": "the online store, the champion -> the next items of a user",
    "report": "the manifests of a run -> one HTML page with plots",
    "codes": "item_embeddings or llm_embeddings -> item_codes and their books, published beside the vectors",
    "bakeoff": "sequences, llm_embeddings -> every system of the family on one split, with paired intervals",
    "rerank": "a recommender's lists -> what an LLM that re-ranks them adds, offline",
    "generate": "item_codes, a recommender -> what a model that writes the next item's codes achieves, offline",
    "explain": "an item's online vector -> its chain of origin, digests verified",
    "rollback": "the pointer -> the previous space: one write",
    "collect": "spaces past their grace period -> removed",
    "forget": "an item -> removed from lake, every space, index and cache; stays forgotten",
}
SHARED = {"backbone": ("pretrain", "rat")}
"""Tables of the recipe that several jobs read; a job's own keys of that name go before them."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe's tables, `$NAME` in its texts replaced from the environment, overrides applied.

    Raises InputError for a file that is missing or not TOML, a table that is no job or a value in its place, a lake that is no
    text, an override that is off, or a variable that is not set.
    """
    try:
        recipe: dict[str, Any] = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"--recipe {path} does not exist: the shipped ones are in jobs/recipes/") from error
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", "") or "no text"
        raise InputError(f"--recipe {path} can't be read ({why}): name a TOML file, such as shop/recipe.toml") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--recipe {path} is not TOML: {error}") from error
    for override in overrides:
        apply(recipe, override)
    for table, values in recipe.items():
        if table not in ("run", *SHARED, *JOBS):
            raise InputError(f"recipe {path}: unknown table [{table}]; there are: run, {', '.join([*SHARED, *JOBS])}")
        refuse_value(values, table)
    lake = recipe.get("run", {}).get("lake", "")
    if not isinstance(lake, str):
        raise InputError(f'recipe {path}: run.lake is {lake!r}, no text: write a folder in quotes, lake = "/data/lake"')
    expanded: dict[str, Any] = expand(recipe, str(path))
    return expanded


def refuse_value(values: object, table: str) -> None:
    """Raises InputError where a recipe has a value in the place of a table."""
    if not isinstance(values, Mapping):
        raise InputError(f"recipe: {table} is {values!r}, no table: write [{table}] on a line of its own, and its keys below")


def values_of(recipe: Mapping[str, Any], job: str) -> dict[str, Any]:
    """A job's table of the recipe, with what it shares with others. Raises InputError for a value in place of a shared table."""
    values = dict(recipe.get(job, {}))
    for table, users in SHARED.items():
        if job in users and table in recipe:
            refuse_value(values.get(table, {}), f"{job}.{table}")
            values[table] = {**recipe[table], **values.get(table, {})}
    return values


class Said(str):
    """A text of the command line: what the shell has left of it is meant as it is, a `$` too."""


ODD = re.compile(r"\+[\d_]+|-0|-?\d[\d_]*_[\d_]*|0[xob][\da-fA-F_]+")
"""Whole numbers that TOML reads as another text than was written: an id `1_000` would become 1000."""


def apply(recipe: dict[str, Any], override: str) -> None:
    """Sets `job.key=value`; the value is read as TOML, and as plain text where it doesn't begin like TOML's texts and lists.

    Raises InputError for a form of another kind, and for what could be taken for another text than was meant.
    """
    path, equals, text = override.partition("=")
    if shows_secret(path, text):
        raise InputError(
            f"--set {redacted(path)}: a password, token or key in an argument list is seen by every user of this machine: put it "
            "into the environment, and write $NAME in the recipe"
        )
    keys = path.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise InputError(f"--set {override!r}: write it as job.key=value, for example --set recommend.user=405")
    value = parsed_value(override, text)
    table = recipe
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {override!r}: {key} is a value, not a table")
    table[keys[-1]] = value


def parsed_value(override: str, text: str) -> Any:
    """The value of an override. Raises InputError for half a quoted text, and for a number that is written oddly."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text.lstrip()[:1] in ('"', "'", "[", "{"):
            raise InputError(f"--set {override!r} begins like TOML and is none ({error}): mend its quotes and escapes") from error
        parsed = {"value": text}
    value = parsed["value"] if len(parsed) == 1 else text
    if not isinstance(value, str):
        bare = re.sub(r"\"(\\.|[^\"\\])*\"|'[^']*'", "", text)
        if odd := [word for word in re.split(r"[\s,\[\]{}=]+", bare.partition("#")[0]) if ODD.fullmatch(word)]:
            raise InputError(f"--set {override!r}: write {odd[0]} as a plain number, or in quotes if it is a text")
        if "#" in bare:
            raise InputError(f"--set {override!r}: what follows # would be left out; write a text in quotes")
    return marked(value)


def marked(value: Any) -> Any:
    """The same value with its texts as `Said`."""
    if isinstance(value, dict):
        return {key: marked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [marked(item) for item in value]
    return Said(value) if isinstance(value, str) else value


def expand(value: Any, where: str) -> Any:
    """Environment variables written `$NAME` or `${NAME}` in the recipe's texts; those of the command line stay as they are."""
    if isinstance(value, Said):
        return str(value)
    if isinstance(value, dict):
        return {key: expand(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item, where) for item in value]
    if isinstance(value, str) and "$" in value:
        text = os.path.expandvars(value)
        if "$" in text:
            raise InputError(
                f"recipe {where}: {value!r} names an environment variable that is not set (in Airflow a job inherits a recipe's "
                "own variables where LLMEMB_PASS_ENV names them: docs/security.md)"
            )
        return text
    return value


def build(cls: type[C], values: Mapping[str, Any], table: str) -> C:
    """A frozen config from one table of the recipe.

    Raises InputError that names the key: unknown (with those there are), missing, or of the wrong type.
    """
    refuse_unknown(cls, values, table)
    refuse_disguised(cls, values, table)
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([table, *(str(part) for part in first["loc"])])
        raise InputError(f"recipe: {key}: {first['msg'].removeprefix('Value error, ')}") from error


def config_of(recipe: Mapping[str, Any], job: str, run: Any) -> Any:
    """A job's Config from its table of the recipe. Raises InputError as `build` does."""
    return build(importlib.import_module(f"jobs.{job}").Config, {"run": run, **values_of(recipe, job)}, job)


def refuse_unknown(cls: Any, values: Mapping[str, Any], table: str) -> None:
    """Raises InputError for a key that the config, or a config nested in it, does not have."""
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            known = ", ".join(sorted(name for name in hints if name != "run")) or "none"
            raise InputError(f"recipe: unknown key {table}.{key}; [{table}] has: {known}")
        nested = [part for part in (hints[key], *typing.get_args(hints[key])) if dataclasses.is_dataclass(part)]
        if isinstance(value, dict) and nested and not isinstance(hints[key], types.GenericAlias):
            refuse_unknown(nested[0], value, f"{table}.{key}")


def refuse_disguised(cls: Any, values: Mapping[str, Any], table: str) -> None:
    """Raises InputError where an id was read as `true` or as a fraction: `1e3` would be the id 1000."""
    for key, hint in typing.get_type_hints(cls).items():
        found = values.get(key)
        for value in found if isinstance(found, list) else [found]:
            if isinstance(value, bool | float) and text_or_number(hint):
                raise InputError(f"recipe: {table}.{key} is {value}, neither a text nor a whole number: write an id in quotes")


def text_or_number(hint: Any) -> bool:
    """Whether a type takes a text as well as a whole number, as ids do; or several of them."""
    parts = typing.get_args(hint)
    return {str, int} <= set(parts) or any(text_or_number(part) for part in parts)
