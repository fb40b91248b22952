"""`python -m jobs night --recipe FILE --ds DATE`: the jobs of a night in their order, without a scheduler."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.engines import registry
from jobs.recipe import build, load_recipe
from jobs.run import Refused, Run

log = logging.getLogger(__name__)


class Failed(Exception):
    """A job ended otherwise than well; its own last line has said why."""

    def __init__(self, job: str, status: int) -> None:
        super().__init__(f"{job} ended with status {status}")
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Night:
    """What every job of a night is called with."""

    recipe: Path
    ds: str

    def job(self, name: str, *settings: str) -> dict[str, Any]:
        """The Result of a job, run as a process of its own. Raises Failed."""
        command = [sys.executable, "-m", "jobs", name, "--recipe", str(self.recipe), "--ds", self.ds]
        for setting in settings:
            command += ["--set", setting]
        log.info("$ python %s", " ".join(command[1:]))
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise Failed(name, done.returncode)
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def say_yes(self) -> str:
        """The command by which a person lets a model out that `promote` left to them."""
        return (
            f"python -m jobs promote --recipe {self.recipe} --ds {self.ds} --set promote.approved_by=NAME (and --set "
            "promote.overruled_by=NAME where a floor was not beaten)"
        )


def main(argv: Sequence[str]) -> int:
    """Runs the night and prints what came of it as JSON; the exit status of the first job that failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m jobs night", description=__doc__)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--ds", required=True, help="date of the snapshot, YYYY-MM-DD")
    parser.add_argument(
        "--arriving", action="store_true", help="brings what is new or changed since the snapshot that serves, and nothing else"
    )
    parser.add_argument("--train", action="store_true", help="trains a recommender though no encoder was due")
    arguments = parser.parse_args(argv)
    run = build(Run, {"ds": arguments.ds, **load_recipe(arguments.recipe).get("run", {})}, "run")
    night = Night(recipe=arguments.recipe, ds=arguments.ds)
    try:
        told = run_hour(night) if arguments.arriving else run_night(night, run, train=arguments.train)
    except Failed as error:
        log.error("the night stops here: %s", error)
        return error.status
    print(json.dumps(told))
    return 0


def run_night(night: Night, run: Run, *, train: bool) -> dict[str, Any]:
    """The night and its report, which is written also where the night failed."""
    try:
        served = serve(night, run, train=train)
    except Exception:
        with contextlib.suppress(Failed):
            night.job("report")
        raise
    return {"space_id": served["space_id"], "items": served["items"], "report": night.job("report")["path"]}


def run_hour(night: Night) -> dict[str, Any]:
    """New and changed items, laid over what serves; the Result of `publish`. Safe beside a night."""
    pinned = night.job("pin", "pin.which=serving")
    here = Night(recipe=night.recipe, ds=pinned["ds"])
    here.job("extract", "extract.arriving=true")
    here.job("embed", "embed.arriving=true", f'embed.encoder="{pinned["encoder_id"]}"')
    here.job("project", "project.arriving=true", f'project.recommender="{pinned["recommender_id"]}"')
    return here.job("publish", "publish.arriving=true", f'publish.space="{pinned["space_id"]}"')


def serve(night: Night, run: Run, *, train: bool) -> dict[str, Any]:
    """A snapshot; a challenger where one is due; the champion's space online, read back. The Result of `publish`.

    Raises Refused where there is no champion and only a person can make one.
    """
    night.job("extract")
    due, champion = night.job("scft")["due"], registry.champion(run)
    if due or train or champion is None:
        challenge(night, first=champion is None)
    champion = registry.champion(run)
    if champion is None:
        raise Refused(f"nothing serves yet: a person must say yes, see docs/first-champion.md, then: {night.say_yes()}")
    if champion.get("ds") == night.ds and not champion.get("gated_id"):
        refit(night)
    # asked once: a promotion meanwhile waits for the next night
    pinned = night.job("pin")
    night.job("embed", f'embed.encoder="{pinned["encoder_id"]}"')
    night.job("project", f'project.recommender="{pinned["recommender_id"]}"')
    served = night.job("publish", f'publish.space="{pinned["space_id"]}"')
    night.job("lookup", f'lookup.space="{served["space_id"]}"', f"lookup.sequence={served['sequence']}")
    return served


def challenge(night: Night, *, first: bool) -> None:
    """Trains a recommender and judges it against the champion, which goes on serving where the challenger is refused."""
    night.job("embed", "embed.encoder=latest")
    night.job("pretrain")
    night.job("rat")
    night.job("embed", "embed.encoder=opponent")
    night.job("evaluate")
    try:
        decision = night.job("promote")["decision"]
    except Failed as error:
        if first or error.status != 3:
            raise
        decision = "refused"
    if first:
        return
    if decision == "refused":
        log.warning("the challenger is refused: the champion goes on serving")
    elif decision == "undecided":
        log.warning("the challenger waits for a person, the champion goes on serving; to say yes: %s", night.say_yes())


def refit(night: Night) -> None:
    """Trains a new champion on all events; where that is refused, what was judged serves."""
    try:
        night.job("rat", "rat.stage=refit")
    except Failed as error:
        if error.status != 3:
            raise
        log.warning("trained on all events it is refused: what was judged serves")
