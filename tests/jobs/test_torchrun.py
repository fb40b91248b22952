"""torchrun under our hand: a job in several processes ends with the status that it would have had in one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import __main__ as command_line
from jobs import torchrun
from jobs.engines import registry
from jobs.lake import artifacts, manifests, partitions
from jobs.lake.partitions import write_json
from jobs.lake.tables import SEQUENCES
from models.behaviour.artifact import load_recommender
from tests.jobs import small_lake, small_registry
from tests.models import tiny

ROOT = Path(__file__).parents[2]


def launched(*words: str) -> subprocess.CompletedProcess[str]:
    """Two processes of this machine."""
    command = [sys.executable, "-m", "jobs.torchrun", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_a_job_with_bad_input_ends_with_2_and_its_remedy_is_the_last_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[run]\nlake = "{tmp_path / "lake"}"\ndevice = "cpu"\n')
    done = launched("-m", "jobs", "scft", "--recipe", str(recipe), "--ds", "2026-01-01")
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line]
    assert said[-1].startswith("scft: error: items has no partition at or before 2026-01-01")
    manifest = newest(tmp_path / "lake", "2026-01-01", "scft")
    assert manifest["status"] == "failed" and "items has no partition" in manifest["error"]


def test_where_the_first_process_says_nothing_another_that_failed_writes_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, where = tmp_path / "recipe.toml", manifests.path_of(tmp_path / "lake", "2026-01-01", "pretrain.3000")
    recipe.write_text(f'[run]\nlake = "{tmp_path / "lake"}"\ndevice = "cpu"\n')
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(command_line, "FIRST_SPEAKS_S", 0.1)
    words = ["pretrain", "--recipe", str(recipe), "--ds", "2026-01-01"]
    assert command_line.main(words) == 2
    assert "items has no partition" in newest(tmp_path / "lake", "2026-01-01", "pretrain")["error"]
    monkeypatch.setattr(command_line, "load_recipe", spoken(where, command_line.load_recipe))
    assert command_line.main(words) == 2
    assert newest(tmp_path / "lake", "2026-01-01", "pretrain") == {"of": "the first"}


def newest(lake: Path, ds: str, job: str) -> dict[str, Any]:
    """The manifest of the run that ended last; there is one a run."""
    return manifests.parsed(manifests.runs(lake, ds, job)[-1])


def spoken(where: Path, load: Callable[..., Any]) -> Callable[..., Any]:
    """Lets the first process write its manifest while another one's job begins."""

    def loaded(*given: Any) -> Any:
        write_json(where, {"of": "the first"})
        os.utime(where, (time.time() + 1, time.time() + 1))  # file systems' clocks are coarse
        return load(*given)

    return loaded


RECIPE = """
[run]
lake = "{lake}"
device = "cpu"
[scft]
base = "{base}"
max_tokens = 96
policy = {{ domain = "Item:" }}
lora = {{ r = 2, alpha = 4, dropout = 0.0 }}
gates = {{ recall_drop = 1.0, mean_cosine = 1.0, effective_rank = 1.0 }}
training = {{ steps = 2, batch = 4, validate_every = 2, validation_items = 4, candidates = 10, compile = false }}
[pretrain]
backbone = {{ width = 8, max_len = 6 }}
training = {{ epochs = 2, batch = 8, negatives = 4 }}
[rat]
encoder = "{encoder}"
hidden = 16
whitened_width = 8
backbone = {{ width = 8, max_len = 6 }}
training = {{ epochs = 2, batch = 8, negatives = 4 }}
"""


def test_the_training_jobs_end_well_in_two_processes_with_one_artifact_one_result_and_one_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))
    run = small_lake.make(tmp_path)
    # the small lake's encoder has no weights: of `scft` nothing has run yet
    for path in manifests.runs(run.lake, run.ds, "scft"):
        path.unlink()
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(lake=run.lake, base=tiny.llama(tmp_path / "base"), encoder=small_lake.ENCODER))
    for job, kind in (("pretrain", "teacher"), ("rat", "recommender"), ("scft", "encoder")):
        before = set((run.lake / "models" / kind).glob("*"))
        done = launched("-m", "jobs", job, "--recipe", str(recipe), "--ds", run.ds)
        assert done.returncode == 0, done.stderr[-3000:]
        (printed,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        (kept,) = set((run.lake / "models" / kind).glob("*")) - before
        assert printed[f"{kind}_id"] == kept.name
        manifest = newest(run.lake, run.ds, job)
        assert (manifest["status"], manifest["result"]) == ("done", printed)
        assert list((run.lake / "checkpoints").glob("*")) == []
        assert "Traceback" not in done.stderr
    assert printed["due"] and printed["steps"] == 2
    rat = newest(run.lake, run.ds, "rat")["result"]
    assert rat["teacher_id"] == newest(run.lake, run.ds, "pretrain")["result"]["teacher_id"]


def test_the_champion_is_trained_on_all_events_by_two_processes_as_by_one(tmp_path: Path) -> None:
    lake = small_lake.make(tmp_path).lake
    partitions.write(lake, SEQUENCES, f"ds={small_lake.DS}", [small_lake.sequence_rows(tested="i19")])
    run = dataclasses.replace(small_registry.fresh(tmp_path, small_lake.DS), lake=lake)
    recipe = tmp_path / "recipe.toml"
    # each process draws dropout and negatives for its own rows: without both, two processes do the arithmetic of one
    text = RECIPE.replace("max_len = 6", "max_len = 6, dropout = 0.0").replace("negatives = 4", 'loss = "full"')
    recipe.write_text(text.format(lake=lake, base="none", encoder=small_lake.ENCODER) + "refit_loss = 9.0\n")
    words = ("--recipe", str(recipe), "--ds", run.ds, "--set", f"run.tracking_uri={run.tracking_uri}")
    for job in ("pretrain", "rat"):
        assert command_line.main([job, *words]) == 0
    judged = newest(lake, run.ds, "rat")["result"]
    registry.set_aliases(run, [("champion", judged["model_version"])])
    shutil.copytree(lake, tmp_path / "one" / "lake")
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "one" / "mlflow.db")

    done = launched("-m", "jobs", "rat", *words, "--set", "rat.stage=refit")
    assert done.returncode == 0, done.stderr[-3000:]
    (printed,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(manifests.runs(lake, run.ds, "rat-refit")) == 1 and newest(lake, run.ds, "rat-refit")["result"] == printed
    champion = registry.champion(run)
    assert champion is not None and printed["promoted"]
    assert (champion["recommender_id"], champion["gated_id"]) == (printed["recommender_id"], judged["recommender_id"])
    assert list((lake / "checkpoints").glob("*")) == []

    alone = (*words, "--set", f"run.lake={tmp_path / 'one' / 'lake'}", "--set", "rat.stage=refit",
             "--set", f"run.tracking_uri=sqlite:///{tmp_path / 'one' / 'mlflow.db'}")  # fmt: skip
    assert command_line.main(["rat", *alone]) == 0
    single = newest(tmp_path / "one" / "lake", run.ds, "rat-refit")["result"]
    assert printed["loss_ratio"] == pytest.approx(single["loss_ratio"], abs=1e-3)
    homes = ((lake, printed), (tmp_path / "one" / "lake", single))
    two, one = (load_recommender(artifacts.find(home, "recommender", told["recommender_id"])) for home, told in homes)
    llm_NE = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    ids = ["i00", "i19", "never seen"]
    torch.testing.assert_close(two.project(llm_NE, ids), one.project(llm_NE, ids), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        ({"0": "sys.exit(3)", "1": "time.sleep(60)"}, 3),
        ({"0": "time.sleep(60)", "1": "sys.exit(2)"}, 2),
        ({"0": "sys.exit(1)", "1": "time.sleep(60)"}, 1),
        ({"0": "os.kill(os.getpid(), 9)", "1": "time.sleep(60)"}, 1),
        ({"0": "sys.exit(0)", "1": "sys.exit(0)"}, 0),
    ],
    ids=["refused by the first", "bad input found by the second", "an error", "killed", "done"],
)
def test_an_end_that_is_final_stays_so_and_any_other_is_worth_a_retry(
    tmp_path: Path, ends: dict[str, str], status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys, time\nexec({ends!r}[os.environ['RANK']])\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun sets it where it is not
    with own_signals():
        assert torchrun.main(["--standalone", "--nproc-per-node", "2", str(script)]) == status
    assert ("process 0 ended" in capsys.readouterr().err) == (status == 1)


@contextmanager
def own_signals() -> Iterator[None]:
    """Gives pytest's process its handlers of signals back, which torchrun replaces."""
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
