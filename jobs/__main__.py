"""The only command line: `python -m jobs NAME --recipe FILE --ds DATE [--set job.key=value]`."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import gc
import hashlib
import importlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import logs
from jobs.lake import locks, manifests
from jobs.lake.store import SERVING, refuse_without_services
from jobs.recipe import JOBS as JOBS
from jobs.recipe import SHARED as SHARED
from jobs.recipe import apply as apply
from jobs.recipe import build as build
from jobs.recipe import load_recipe as load_recipe
from jobs.recipe import values_of as values_of
from jobs.redaction import redacted
from jobs.run import InputError, Older, Refused, Run, as_json, code_revision

COMMANDS = {
    "new": "DIR: writes a recipe for your own tables, questions answered",
    "check": "--recipe FILE: tells in seconds what would fail later",
    "worth": "--recipe FILE --ds DATE: is tuning the LLM worth its GPU time on your catalogue and logs",
    "night": "--recipe FILE --ds DATE: runs the jobs of a night in their order",
}
"""What is no job: takes arguments of its own and leaves no manifest."""
SLOW = ("check", "worth")
"""Commands that may be silent for long; `new` asks, and the jobs of `night` speak for themselves."""
UNSEEN = ("forget", "scft", "pretrain", "rat")
"""Jobs that `forget` doesn't wait for: itself, and trainings, whose artifacts may name what they were trained on."""
FIRST_SPEAKS_S = 5.0
"""How long a process that failed waits for the first one's manifest."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job or command; returns the exit status: 0 done, 2 recipe or input at fault, 3 refused, 4 busy, away or not
    there yet, 5 older than what serves, 1 else."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return command(words)
    return run_job(parse(words))


def command(words: Sequence[str]) -> int:
    """Runs one of COMMANDS; returns the exit status."""
    logs.start(words[0])
    try:
        with logs.SignsOfLife(words[0]) if words[0] in SLOW else contextlib.nullcontext():
            status: int = importlib.import_module(f"jobs.{words[0]}").main(words[1:])
    except (ValueError, Refused, ConnectionError) as error:
        status = judged(error, {})[0]
        complain(words[0], redacted(str(error)), status)
    return status


def run_job(arguments: argparse.Namespace) -> int:
    """Runs one job and keeps its manifest; returns the exit status."""
    logs.start(arguments.job, arguments.ds)
    started, clock = dt.datetime.now(dt.UTC), time.monotonic()
    record: dict[str, Any] = {"job": arguments.job, "ds": arguments.ds, "status": "failed"}
    where: Run | None = None
    name, status, complaint = arguments.job, 0, ""
    try:
        recipe = load_recipe(arguments.recipe, arguments.set)
        run = build(Run, {"ds": arguments.ds, **recipe.get("run", {})}, "run")
        refuse_future(run.ds, started)
        if arguments.job in SERVING:
            refuse_without_services(run.lake, arguments.job)
        where = run
        if run.variant and arguments.job == "extract":
            raise InputError("run.variant: experiments read the nights' own snapshots; run extract without it")
        # a job's standard output is its Result alone: what its libraries print goes with the logs
        with contextlib.redirect_stdout(sys.stderr), logs.SignsOfLife(arguments.job):
            module = importlib.import_module(f"jobs.{arguments.job}")
            config = build(module.Config, {"run": run, **values_of(recipe, arguments.job)}, arguments.job)
            # a job that has several parts for a date, shards say, names each
            name = getattr(config, "manifest", arguments.job)
            record |= {"config": as_json(config), "recipe_sha256": digest(recipe), "code_revision": code_revision()}
            with contextlib.nullcontext() if arguments.job in UNSEEN else locks.at_work(run.lake, arguments.job):
                result = module.run(config)
        record |= {"status": "done", "result": as_json(result)}
        record |= {name: as_json(getattr(result, name)) for name in ("inputs", "outputs", "rows")}
    except Exception as error:
        status, complaint = judged(error, record)
    finally:
        if where is not None and (first_process() or (record["status"] != "done" and not first_spoke(where, name, started))):
            record |= {"started_at": started.isoformat(), "seconds": round(time.monotonic() - clock, 3)}
            if (unkept := keep(where, name, record)) and not status:
                status, complaint = 4, unkept
    if status:
        complain(arguments.job, redacted(complaint), status)
    elif first_process():
        # the very last line: a pod's log has both streams in one
        print(json.dumps(record["result"], sort_keys=True), flush=True)
    return status


def judged(error: Exception, record: dict[str, Any]) -> tuple[int, str]:
    """The exit status of a failure and its text, which goes into the record too."""
    if isinstance(error, Refused):
        record |= {"status": "refused", "error": str(error)}
        return 5 if isinstance(error, Older) else 3, str(error)
    if isinstance(error, ConnectionError):  # Unavailable, and what a client of a service raises by itself
        record |= {"error": str(error)}
        return 4, str(error)
    if isinstance(error, ValueError):
        record |= {"error": str(error)}
        return 2, str(error)
    record |= {"error": f"{type(error).__name__}: {error}"}
    sys.stderr.write(redacted("".join(traceback.format_exception(error))))
    return 1, str(error)


def keep(run: Run, name: str, record: dict[str, Any]) -> str:
    """Writes the manifest of a run, and its end into the log. Why it could not be written, where the lake is away: a store that
    ended a job may be away still, and that is no other end."""
    try:
        manifests.append(run.lake, run.ds, name, record | ({"variant": run.variant} if run.variant else {}))
    except ConnectionError as error:
        return str(error)
    if record["status"] == "done" or logs.as_json():  # a person is told of a failure by its one line
        log = logging.getLogger(f"jobs.{record['job']}")
        log.info("%s in %.1f s", record["status"], record["seconds"], extra={"manifest": record})
    return ""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with status 2 and a usage line when it is off."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs",
        usage="python -m jobs NAME --recipe FILE --ds DATE [--set JOB.KEY=VALUE]\n"
        f"       python -m jobs {'|'.join(COMMANDS)} --help\n       python -m jobs --help      (all jobs)",
        description="Runs one job of the nightly path. Jobs, in the order of the data:\n\n"
        + "\n".join(f"  {name:<10} {purpose}" for name, purpose in JOBS.items())
        + "\n\nCommands for people:\n\n"
        + "\n".join(f"  {name:<10} {purpose}" for name, purpose in COMMANDS.items()),
        epilog="Values of a run stand in the recipe, a table for each job; the keys are documented in the job's Config.\n"
        "Exit status: 0 done, 2 the recipe or its input is at fault, 3 refused by a gate, 4 busy, away or not there yet\n"
        "(try again), 5 refused by publish as what serves is newer, 1 anything else.\n\n"
        "  python -m jobs extract --recipe jobs/recipes/smoke.toml --ds 1998-04-22\n"
        "  python -m jobs recommend --recipe jobs/recipes/smoke.toml --ds 1998-04-22 --set recommend.user=405",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # both, so that a typo of a command is answered by the commands too
    parser.add_argument("job", choices=[*COMMANDS, *JOBS], metavar="NAME", help="the job to run")
    parser.add_argument("--recipe", type=Path, required=True, help="TOML file with a table for each job")
    parser.add_argument("--ds", required=True, help="date of the snapshot, YYYY-MM-DD")
    parser.add_argument(
        "--set", action="append", default=[], metavar="JOB.KEY=VALUE", help="overrides one value of the recipe (repeatable)"
    )
    arguments = parser.parse_args(argv)
    if arguments.job in COMMANDS:
        parser.error(f"the command {arguments.job} stands first: python -m jobs {arguments.job} --help")
    return arguments


def refuse_future(ds: str, now: dt.datetime) -> None:
    """Raises InputError for a date that has not begun: it would hold what isn't known yet, and block the nights until then."""
    if ds > f"{now:%Y-%m-%d}":
        clock = f"{now:%Y-%m-%d %H:%M} UTC"
        raise InputError(f"--ds {ds} lies in the future: it is {clock} by this machine's clock; correct one of the two")


def first_process() -> bool:
    """Whether this process speaks for the job: under `torchrun` only rank 0 does."""
    return os.environ.get("RANK", "0") == "0"


def first_spoke(run: Run, name: str, started: dt.datetime) -> bool:
    """Whether the first process has written its manifest, waited for in one that failed beside it.

    `torchrun` ends all processes with the first that fails: the others may have had no time to say why, or be stuck.
    """
    end = time.monotonic() + FIRST_SPEAKS_S
    while not any(path.stat().st_mtime >= started.timestamp() for path in manifests.runs(run.lake, run.ds, name)):
        if time.monotonic() >= end:
            return False
        time.sleep(0.05)
    return True


def digest(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of the recipe as it was applied."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()


def complain(job: str, complaint: str, status: int) -> None:
    """One line with the remedy, last on standard error: schedulers show it."""
    line = " ".join(complaint.split())
    # in one write: processes of one job share the terminal
    sys.stderr.write(f"{job}: {'refused: ' if status in (3, 5) else 'error: '}{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    # what Feast and torch make while they are imported stays: to look for cycles among it each time takes a job another second
    gc.set_threshold(20_000)
    ended = main()
    # the process ends anyway: to look for cycles among all that torch and MLflow made would take another second
    gc.freeze()
    sys.exit(ended)
