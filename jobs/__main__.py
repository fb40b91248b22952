"""The only command line: `python -m jobs NAME --recipe FILE --ds DATE [--set job.key=value]`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime as dt
import gc
import hashlib
import importlib
import json
import os
import sys
import time
import tomllib
import traceback
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from jobs import logs
from jobs.lake import lineage
from jobs.lake.manifests import path_of as manifest_path
from jobs.lake.partitions import write_json
from jobs.run import InputError, Refused, Run, as_json, code_revision

C = TypeVar("C")

JOBS = {
    "movielens": "loads MovieLens-100k into Spark tables, as a catalogue to try everything on",
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
    "explain": "an item's online vector -> its chain of origin, digests verified",
    "rollback": "the pointer -> the previous space: one write",
    "collect": "spaces past their grace period -> removed",
    "forget": "an item -> removed from lake, every space, index and cache; stays forgotten",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job; returns the exit status: 0 done, 2 recipe or input at fault, 3 refused, 4 busy or away, 1 else."""
    arguments = parse(argv)
    started, clock = dt.datetime.now(dt.UTC), time.monotonic()
    record: dict[str, Any] = {"job": arguments.job, "ds": arguments.ds, "status": "failed"}
    where: Path | None = None
    try:
        recipe = load_recipe(arguments.recipe, arguments.set)
        run = build(Run, {"ds": arguments.ds, **recipe.get("run", {})}, "run")
        refuse_future(run.ds, started)
        where = manifest_path(run.lake, run.ds, arguments.job)
        # a job's standard output is its Result alone: what its libraries print goes with the logs
        with contextlib.redirect_stdout(sys.stderr):
            module = importlib.import_module(f"jobs.{arguments.job}")
            config = build(module.Config, {"run": run, **recipe.get(arguments.job, {})}, arguments.job)
            # a job that runs more than once for a date, in shards say, names a manifest for each
            where = manifest_path(run.lake, run.ds, getattr(config, "manifest", arguments.job))
            record |= {"config": as_json(config), "recipe_sha256": digest(recipe), "code_revision": code_revision()}
            result = module.run(config)
        record |= {"status": "done", "result": as_json(result)}
        record |= {name: as_json(getattr(result, name)) for name in ("inputs", "outputs", "rows")}
    except Refused as error:
        record |= {"status": "refused", "error": str(error)}
        return complain(arguments.job, error, 3)
    except ConnectionError as error:  # Unavailable, and what a client of a service raises by itself
        record |= {"error": str(error)}
        return complain(arguments.job, error, 4)
    except ValueError as error:
        record |= {"error": str(error)}
        return complain(arguments.job, error, 2)
    except Exception as error:
        record |= {"error": f"{type(error).__name__}: {error}"}
        traceback.print_exc()
        return complain(arguments.job, error, 1)
    finally:
        if where is not None and first_process():
            record |= {"started_at": started.isoformat(), "seconds": round(time.monotonic() - clock, 3)}
            record |= {"earlier": lineage.runs_so_far(where)}
            write_json(where, record)
            if os.environ.get("LLMEMB_LOG") == "json":
                print(logs.line(record), file=sys.stderr, flush=True)
    if first_process():
        # the very last line: a pod's log has both streams in one
        print(json.dumps(record["result"], sort_keys=True), flush=True)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with status 2 and a usage line when it is off."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs",
        description="Runs one job of the nightly path. Jobs, in the order of the data:\n\n"
        + "\n".join(f"  {name:<10} {purpose}" for name, purpose in JOBS.items()),
        epilog="Values of a run stand in the recipe, a table for each job; the keys are documented in the job's Config.\n"
        "Exit status: 0 done, 2 the recipe or its input is at fault, 3 refused by a gate, 4 busy or away (try again),\n"
        "1 anything else.\n\n"
        "  python -m jobs extract --recipe jobs/recipes/smoke.toml --ds 1998-04-22\n"
        "  python -m jobs recommend --recipe jobs/recipes/smoke.toml --ds 1998-04-22 --set recommend.user=405",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", choices=JOBS, metavar="NAME", help="the job to run")
    parser.add_argument("--recipe", type=Path, required=True, help="TOML file with a table for each job")
    parser.add_argument("--ds", required=True, help="date of the snapshot, YYYY-MM-DD")
    parser.add_argument(
        "--set", action="append", default=[], metavar="JOB.KEY=VALUE", help="overrides one value of the recipe (repeatable)"
    )
    return parser.parse_args(argv)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The recipe's tables, `$NAME` in its texts replaced from the environment, overrides applied.

    Raises InputError for a file that is missing or not TOML, a table that is no job, an override that is off, or a
    variable that is not set.
    """
    try:
        recipe: dict[str, Any] = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"--recipe {path} does not exist: the shipped ones are in jobs/recipes/") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--recipe {path} is not TOML: {error}") from error
    for override in overrides:
        apply(recipe, override)
    for table in recipe:
        if table != "run" and table not in JOBS:
            raise InputError(f"recipe {path}: unknown table [{table}]; there are: run, {', '.join(JOBS)}")
    expanded: dict[str, Any] = expand(recipe, str(path))
    return expanded


def apply(recipe: dict[str, Any], override: str) -> None:
    """Sets `job.key=value`; the value is read as TOML, and as plain text where it isn't."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise InputError(f"--set {override!r}: write it as job.key=value, for example --set recommend.user=405")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = recipe
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {override!r}: {key} is a value, not a table")
    table[keys[-1]] = value


def expand(value: Any, where: str) -> Any:
    """Environment variables written `$NAME` or `${NAME}` in the recipe's texts."""
    if isinstance(value, dict):
        return {key: expand(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item, where) for item in value]
    if isinstance(value, str) and "$" in value:
        text = os.path.expandvars(value)
        if "$" in text:
            raise InputError(f"recipe {where}: {value!r} names an environment variable that is not set")
        return text
    return value


def build(cls: type[C], values: Mapping[str, Any], table: str) -> C:
    """A frozen config from one table of the recipe.

    Raises InputError that names the key: unknown (with those there are), missing, or of the wrong type.
    """
    refuse_unknown(cls, values, table)
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([table, *(str(part) for part in first["loc"])])
        raise InputError(f"recipe: {key}: {first['msg']}") from error


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


def refuse_future(ds: str, now: dt.datetime) -> None:
    """Raises InputError for a date that has not begun: it would hold what isn't known yet, and block the nights until then."""
    if ds > f"{now:%Y-%m-%d}":
        clock = f"{now:%Y-%m-%d %H:%M} UTC"
        raise InputError(f"--ds {ds} lies in the future: it is {clock} by this machine's clock; correct one of the two")


def first_process() -> bool:
    """Whether this process speaks for the job: under `torchrun` only rank 0 does."""
    return os.environ.get("RANK", "0") == "0"


def digest(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of the recipe as it was applied."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()


def complain(job: str, error: Exception, status: int) -> int:
    """One line with the remedy on standard error."""
    line = " ".join(str(error).split())
    # in one write: processes of one job share the terminal
    sys.stderr.write(f"{job}: {'refused: ' if status == 3 else 'error: '}{line}\n")
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    ended = main()
    # the process ends anyway: to look for cycles among all that torch and MLflow made would take another second
    gc.freeze()
    sys.exit(ended)
