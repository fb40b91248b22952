"""The command line: one way in, exit statuses that a scheduler can act on, errors that name the remedy."""

from __future__ import annotations

import datetime as dt
import importlib
import io
import json
import logging
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from jobs import __main__ as cli
from jobs import logs
from jobs.lake import manifests
from jobs.run import InputError, Older, Refused, Run, Unavailable


@dataclass(frozen=True, kw_only=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True, kw_only=True)
class Config:
    run: Run
    user: str = ""
    names: tuple[str, ...] = ()
    inner: Inner = Inner()
    free: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Result:
    inputs: dict[str, str]
    outputs: dict[str, str]
    rows: dict[str, int]
    seen: object


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(f'[run]\nlake = "{tmp_path / "lake"}"\n')
    return path


def call(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, *more: str, fails: Exception | None = None, job: str = "recommend"
) -> int:
    def run(config: Config) -> Result:
        print("a library chats")
        if fails:
            raise fails
        return Result(inputs={"a": "1"}, outputs={}, rows={}, seen=[config.user, config.inner.depth, config.names])

    module = types.ModuleType("jobs.recommend")
    module.Config, module.Result, module.run = Config, Result, run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jobs.recommend", module)
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    return cli.main([job, "--recipe", str(recipe), "--ds", "2026-01-01", *more])


def manifest(recipe: Path) -> dict[str, object]:
    value: dict[str, object] = json.loads((recipe.parent / "lake/manifests/ds=2026-01-01/recommend.json").read_text())
    return value


def test_the_result_is_the_only_line_on_standard_output(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--set", "recommend.user=405", "--set", "recommend.inner.depth=3", "--set", 'recommend.names=["a", "b"]']
    assert call(monkeypatch, recipe, *sets) == 2  # an unquoted number is not a text
    sets[1] = 'recommend.user="405"'
    capsys.readouterr()
    assert call(monkeypatch, recipe, *sets) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["seen"] == ["405", 3, ["a", "b"]]
    assert "a library chats" in out.err
    assert manifest(recipe)["status"] == "done"


@pytest.mark.parametrize(
    ("error", "status", "word"),
    [
        (InputError("no such table: name one"), 2, "failed"),
        (ValueError("rank must be positive"), 2, "failed"),
        (Refused("tail lost 3 %"), 3, "refused"),
        (Older("older than what serves"), 5, "refused"),
        (RuntimeError("disk on fire"), 1, "failed"),
    ],
)
def test_each_kind_of_failure_has_its_status_and_its_manifest(
    monkeypatch: pytest.MonkeyPatch,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
    word: str,
) -> None:
    assert call(monkeypatch, recipe, fails=error) == status
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(error) in last
    assert manifest(recipe)["status"] == word


def test_of_answers_the_newest_alone_is_kept(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, recipe, fails=RuntimeError("user 4711"))
    call(monkeypatch, recipe, "--set", "recommend.user=secret")
    call(monkeypatch, recipe)
    (kept,) = (recipe.parent / "lake" / "manifests" / "ds=2026-01-01").iterdir()
    assert "4711" not in kept.read_text() and "secret" not in kept.read_text()


def test_runs_of_a_job_lie_side_by_side_and_a_failure_hides_no_result(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = recipe.parent / "lake"
    for end in ({}, {"fails": RuntimeError("no memory")}, {}):
        call(monkeypatch, recipe, job="rat", **end)
    assert call(monkeypatch, recipe, "--set", "run.variant=wide", job="rat") == 0
    told = [manifests.parsed(path) for path in manifests.runs(lake, "2026-01-01", "rat")]
    assert [one["status"] for one in told] == ["done", "failed", "done", "done"]
    assert [manifests.variant_of(one) for one in told] == ["", "", "", "wide"]
    assert manifests.read(lake, "2026-01-01", "rat") == told[2]
    assert manifests.read(lake, "2026-01-01", "rat", "wide") == told[3]


def test_an_experiment_takes_no_snapshot_of_its_own(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, recipe, "--set", "run.variant=wide", job="extract") == 2
    assert "run.variant" in capsys.readouterr().err.splitlines()[-1]
    assert call(monkeypatch, recipe, "--set", "run.variant=../x", job="rat") == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[recommend]\nuserr = 1", "unknown key recommend.userr; [recommend] has: free, inner, names, user"),
        ("[recommend.inner]\nwidth = 1", "unknown key recommend.inner.width"),
        ("[run]\nlakes = 'x'", "unknown key run.lakes"),
        ("[recomend]\nuser = 'x'", "unknown table [recomend]"),
        ("[recommend.inner]\ndepth = 'deep'", "recommend.inner.depth: Input should be a valid integer"),
        ("[recommend]\nuser = '$NOT_SET_ANYWHERE'", "names an environment variable that is not set"),
        ("not toml", "is not TOML"),
    ],
)
def test_a_fault_in_the_recipe_is_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    lake = recipe.read_text() if "[run]" not in text else ""
    recipe.write_text(f"{lake}\n{text}\n")
    assert call(monkeypatch, recipe) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert complaint in error[0]


def test_a_date_must_be_a_date(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recommend", "--recipe", str(recipe), "--ds", "22.4.1998"]) == 2
    said = capsys.readouterr().err
    assert "write it as YYYY-MM-DD" in said and "Value error" not in said, "the checking library's words say nothing"


def test_a_date_that_has_not_begun_is_refused_and_leaves_no_manifest(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tomorrow = f"{dt.datetime.now(dt.UTC) + dt.timedelta(days=1):%Y-%m-%d}"
    assert call(monkeypatch, recipe, "--ds", tomorrow) == 2
    assert f"--ds {tomorrow} lies in the future: it is 20" in capsys.readouterr().err
    assert not (recipe.parent / "lake").exists()


def test_the_result_comes_after_all_that_is_logged(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMB_LOG", "json")
    both = io.StringIO()  # as in a pod, whose log has both streams in one
    monkeypatch.setattr(sys, "stdout", both)
    monkeypatch.setattr(sys, "stderr", both)
    assert call(monkeypatch, recipe) == 0
    assert "seen" in json.loads(both.getvalue().splitlines()[-1])


def test_a_wrong_call_is_shown_the_commands_for_people_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["nigth", "--recipe", "recipe.toml", "--ds", "2026-01-01"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert all(name in said for name in (*cli.COMMANDS, *cli.JOBS))


def test_a_command_that_does_not_stand_first_is_told_where(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--recipe", "recipe.toml", "night", "--ds", "2026-01-01"])
    assert "the command night stands first: python -m jobs night --help" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("command", "spoken_for"), [("check", True), ("worth", True), ("new", False), ("night", False)])
def test_commands_that_may_be_silent_give_signs_of_life(monkeypatch: pytest.MonkeyPatch, command: str, spoken_for: bool) -> None:
    seen: list[bool] = []

    def main(_: object) -> int:
        seen.append(any(isinstance(handler, logs.SignsOfLife) for handler in logging.getLogger().handlers))
        return 0

    monkeypatch.setattr(importlib, "import_module", lambda name: types.SimpleNamespace(main=main))
    assert cli.main([command]) == 0
    assert seen == [spoken_for]


def test_a_missing_recipe_names_where_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recommend", "--recipe", str(tmp_path / "none.toml"), "--ds", "2026-01-01"]) == 2
    assert "jobs/recipes/" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, b"\xff\xfe"])
def test_a_recipe_that_can_t_be_read_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: bytes | None
) -> None:
    path = tmp_path
    if text is not None:
        path = tmp_path / "recipe.toml"
        path.write_bytes(text)
    assert cli.main(["night", "--recipe", str(path), "--ds", "2026-01-01"]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert f"--recipe {path} can't be read" in said


@pytest.mark.parametrize("override", ["recommend.user", "user=1", "recommend.=1", "recommend.user.name=1"])
def test_an_override_of_another_form_is_refused(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    recipe.write_text(recipe.read_text() + "[recommend]\nuser = 'x'\n")
    assert call(monkeypatch, recipe, "--set", override) == 2
    assert "--set" in capsys.readouterr().err


def test_every_job_of_the_help_can_be_imported_and_keeps_the_form() -> None:
    for name in cli.JOBS:
        module = importlib.import_module(f"jobs.{name}")
        assert callable(module.run)
        assert module.Config.__dataclass_params__.frozen and module.Result.__dataclass_params__.frozen
        assert {"inputs", "outputs", "rows"} <= set(module.Result.__dataclass_fields__)


def test_a_shared_table_reaches_its_jobs_and_their_own_keys_go_before_it() -> None:
    recipe = {"backbone": {"dropout": 0.3, "width": 64}, "rat": {"backbone": {"dropout": 0.5}}, "pretrain": {}, "scft": {}}
    assert cli.values_of(recipe, "rat") == {"backbone": {"dropout": 0.5, "width": 64}}
    assert cli.values_of(recipe, "pretrain") == {"backbone": {"dropout": 0.3, "width": 64}}
    assert cli.values_of(recipe, "scft") == {}


def test_recipes_that_name_the_backbone_twice_still_read() -> None:
    assert cli.values_of({"rat": {"backbone": {"dropout": 0.5}}}, "rat") == {"backbone": {"dropout": 0.5}}


def test_what_is_busy_or_away_ends_with_a_status_of_its_own(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def busy(config: object) -> None:
        raise Unavailable("promotion is under way already: run again")

    monkeypatch.setattr(importlib.import_module("jobs.recommend"), "run", busy)
    assert cli.main(["recommend", "--recipe", str(recipe), "--ds", "2026-01-01", "--set", "recommend.user=x"]) == 4
    assert "recommend: error: promotion is under way already" in capsys.readouterr().err


@pytest.mark.parametrize("own", ["", "the bucket is away", "no such item"])
def test_a_lake_that_is_away_when_a_run_is_to_be_kept_is_no_other_end(
    monkeypatch: pytest.MonkeyPatch, recipe: Path, capsys: pytest.CaptureFixture[str], own: str
) -> None:
    """A failure stays what it was; a job that was done is asked again, and then finds it done."""

    def run(config: object) -> object:
        if own:
            raise (Unavailable if "away" in own else InputError)(own)
        return types.SimpleNamespace(inputs={}, outputs={}, rows={})

    def away(*_: object) -> None:
        raise Unavailable("s3://bucket/lake failed at manifests")

    monkeypatch.setattr(importlib.import_module("jobs.recommend"), "run", run)
    monkeypatch.setattr(cli, "as_json", lambda value: {})
    monkeypatch.setattr(manifests, "append", away)
    status = cli.main(["recommend", "--recipe", str(recipe), "--ds", "2026-01-01", "--set", "recommend.user=x"])
    told = capsys.readouterr()
    assert status == (2 if own == "no such item" else 4) and not told.out
    assert told.err.splitlines()[-1] == f"recommend: error: {own or 's3://bucket/lake failed at manifests'}"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (Unavailable("MLflow is away"), 4, "error: MLflow is away"),
        (Refused("nothing serves"), 3, "refused: nothing serves"),
        (InputError("no such key"), 2, "error: no such key"),
    ],
)
def test_a_command_ends_as_a_job_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, status: int, said: str
) -> None:
    def main(_: object) -> int:
        raise error

    monkeypatch.setattr(importlib, "import_module", lambda name: types.SimpleNamespace(main=main))
    assert cli.main(["night"]) == status
    assert capsys.readouterr().err.splitlines() == [f"night: {said}"]
