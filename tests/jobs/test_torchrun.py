"""torchrun under our hand: a job in several processes ends with the status that it would have had in one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def launched(*words: str) -> subprocess.CompletedProcess[str]:
    """Two processes of this machine."""
    command = [sys.executable, "-m", "jobs.torchrun", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_job_with_bad_input_ends_with_2_and_its_remedy_is_the_last_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[run]\nlake = "{tmp_path / "lake"}"\ndevice = "cpu"\n')
    done = launched("-m", "jobs", "scft", "--recipe", str(recipe), "--ds", "2026-01-01")
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if line]
    assert said[-1].startswith("scft: error: items has no partition at or before 2026-01-01")
    manifest = json.loads((tmp_path / "lake/manifests/ds=2026-01-01/scft.json").read_text())
    assert manifest["status"] == "failed" and "items has no partition" in manifest["error"]


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
def test_an_end_that_is_final_stays_so_and_any_other_is_worth_a_retry(tmp_path: Path, ends: dict[str, str], status: int) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys, time\nexec({ends!r}[os.environ['RANK']])\n")
    done = launched(str(script))
    assert done.returncode == status
    assert ("process 0 ended" in done.stderr) == (status == 1)
