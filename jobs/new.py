"""`python -m jobs new DIR`: a recipe for your own tables, the starter's with your answers in it."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import logging
import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.recipe import JOBS, apply, build, config_of, expand
from jobs.run import InputError, Run

log = logging.getLogger(__name__)

STARTER = Path(__file__).parent / "recipes" / "starter.toml"
QUESTIONS = {
    "extract.items.table": "Table of your items (a Spark table, or a Parquet path with a /)",
    "extract.items.item_id": "Its column with the item's id",
    "extract.items.attributes": "Its columns that the LLM shall read, by commas, the most telling first",
    "extract.interactions.table": "Table of your events",
    "extract.interactions.user_id": "Its column with the user's id",
    "extract.interactions.item_id": "Its column with the item's id",
    "extract.interactions.timestamp": "Its column with the time",
    "extract.interactions.unit": "Unit of the time, if it is a number: s, ms or us",
    "scft.policy.domain": "A sentence that says what an item is",
    "run.lake": "Folder for all that is made",
}
"""Asked in this order; an empty answer keeps what stands in brackets."""


def main(argv: Sequence[str]) -> int:
    """Writes DIR/recipe.toml and prints its path as JSON. Raises InputError where there is one already, or an answer is off."""
    parser = argparse.ArgumentParser(prog="python -m jobs new", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the recipe goes; made where it is not there")
    parser.add_argument("--set", action="append", default=[], metavar="JOB.KEY=VALUE", help="an answer; asked no more")
    arguments = parser.parse_args(argv)
    target = arguments.folder / "recipe.toml"
    refuse_taken(target)
    home = arguments.folder.absolute()
    known = flat(tomllib.loads(STARTER.read_text())) | {"run.lake": str(home / "lake")}
    given = {
        key: parts(value) if isinstance(value, str) and isinstance(known.get(key), list) else value
        for key, value in flat(overrides(arguments.set)).items()
    }
    known |= given
    answers = known | ask_questions({key: text for key, text in QUESTIONS.items() if key not in given}, known)
    if "run.tracking_uri" not in given:
        # a file, which a bucket can't hold
        place = home if "://" in str(answers["run.lake"]) else answers["run.lake"]
        answers["run.tracking_uri"] = f"sqlite:///{place}/mlflow.db"
    text = filled(STARTER.read_text(), answers)
    refuse_unreadable(text, answers)
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    except OSError as error:
        raise InputError(f"{target} can't be written ({error.strerror}): name a folder where you may write") from error
    log.info("next:  python -m jobs check --recipe %s\n       make night RECIPE=%s DS=YYYY-MM-DD", target, target)
    print(json.dumps({"recipe": str(target)}))
    return 0


def refuse_taken(target: Path) -> None:
    """Raises InputError where there is a recipe already, or a file in the place of its folder: before anything is asked."""
    if target.exists():
        raise InputError(f"{target} is there already: change it, or name another folder")
    taken = next(path for path in target.absolute().parents if path.exists())
    if not taken.is_dir():
        raise InputError(f"{taken} is a file: name a folder, such as shop; it is made where it is not there")


def overrides(settings: Sequence[str]) -> dict[str, Any]:
    """The `--set` answers as tables."""
    tables: dict[str, Any] = {}
    for setting in settings:
        apply(tables, setting)
    return tables


def flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables by dotted names."""
    found: dict[str, Any] = {}
    for name, value in tables.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def ask_questions(questions: Mapping[str, str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Answers to the questions, a line of standard input each; what isn't answered stays as it is."""
    answers: dict[str, Any] = {}
    for key, text in questions.items():
        before = known[key]
        shown = ", ".join(before) if isinstance(before, list) else before
        sys.stderr.write(f"{text} [{shown}]: ")
        sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            sys.stderr.write("\n")
            break
        if line.strip():
            said = line.strip()
            answers[key] = parts(said) if isinstance(before, list) else said
    return answers


def parts(said: str) -> list[str]:
    """Names by commas as a list; one name is a list of one."""
    return [part.strip() for part in said.split(",") if part.strip()]


def refuse_unreadable(text: str, answers: Mapping[str, Any]) -> None:
    """Raises InputError with the question again where a job would not read the recipe: asked before anything is written."""
    for key, value in answers.items():
        if value == []:
            raise InputError(f"{key} is empty; answer it anew: {QUESTIONS[key]}")
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and "$" in os.path.expandvars(one):
                raise InputError(
                    f"{key} = {one!r}: in a recipe $NAME stands for a variable of the environment, and none of that name is set: "
                    "write it without $ (USD 5, say), or set the variable first"
                )
    try:
        recipe = expand(tomllib.loads(text), "of these answers")
        run = build(Run, {"ds": f"{dt.datetime.now(dt.UTC):%Y-%m-%d}", **recipe["run"]}, "run")
        for job in JOBS:
            if job in recipe:
                config_of(recipe, job, run)
    except ValueError as error:
        off = next((key for key in QUESTIONS if f"{key}:" in f"{error}" or f"{key}." in f"{error}"), None)
        raise InputError(f"{error}; answer {off} anew: {QUESTIONS[off]}" if off else f"{error}") from error


def filled(starter: str, answers: Mapping[str, Any]) -> str:
    """The starter's text with the answers as values, its comments kept. Raises InputError for a key that it does not have."""
    lines, table, left = [], "", dict(answers)
    for line in starter.splitlines():
        table = line.strip("[]") if line.startswith("[") else table
        pair = re.match(r"(\w+) = (\"[^\"]*\"|\[.*?\]|[^#]*?)(\s*#.*)?$", line)
        if pair and (value := left.pop(f"{table}.{pair[1]}", None)) is not None:
            line = f"{pair[1]} = {json.dumps(value, ensure_ascii=False)}{pair[3] or ''}"
        lines.append(line)
    if left:
        raise InputError(
            f"--set {next(iter(left))}: the starter asks for {', '.join(QUESTIONS)}; add others to the recipe by hand"
        )
    return "\n".join(lines) + "\n"
