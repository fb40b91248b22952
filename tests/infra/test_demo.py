"""The demo: what it runs, what it prints, and that the README shows just that."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from jobs import logs, recommend

ROOT = Path(__file__).parents[2]
FIGURE = r"(\d\.\d{4}|–)"


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """infra/demo.py, which works in a folder of this test."""
    monkeypatch.setenv("LLMEMB_DEMO", str(tmp_path))
    spec = importlib.util.spec_from_file_location("demo", ROOT / "infra" / "demo.py")
    assert spec is not None and spec.loader is not None
    monkeypatch.syspath_prepend(str(ROOT / "infra"))  # as for a script: demo.py reads the file beside it
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ENVIRONMENT", {})
    return module


def readme_block() -> list[str]:
    """The README's block of the demo's last lines; `…` stands for what is left out, a part of a line or lines."""
    found = re.search(r"```\n(━━━ one user.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert found, "README shows what the demo prints"
    return found[1].splitlines()


def record(block: list[str], path: Path) -> dict[str, dict[str, Any]]:
    """The manifests of a run that came to the block's figures, and its outcomes, one event for all but the counts."""
    text = "\n".join(block)
    cells = re.findall(rf"^  (\w+) +{FIGURE} +{FIGURE} +{FIGURE}$", text, re.M)
    models = [row[0] for row in cells]
    assert {"popularity", "id_only", "llmemb"} <= set(models)
    events = re.search(r"^  events +([\d,]+) +([\d,]+) +([\d,]+)$", text, re.M)
    space = re.search(r"^  space (\w{16}) of ([\d-]{10}): ([\d,]+) vectors of width (\d+)", text, re.M)
    assert events and space
    overall, tail, cold = (int(count.replace(",", "")) for count in events.groups())
    slices_SC = torch.zeros(3, overall, dtype=torch.bool)
    slices_SC[0], slices_SC[1, :tail], slices_SC[2, tail : tail + cold] = True, True, True
    assert tail + cold < overall
    ndcg_KC = torch.zeros(len(models), overall, dtype=torch.float64)
    for row_C, (_, *row) in zip(ndcg_KC, cells, strict=True):
        mean, *parts = (0.0 if cell == "–" else float(cell) for cell in row)
        row_C[:tail], row_C[tail : tail + cold] = parts[0], parts[1]
        row_C[tail + cold :] = (mean * overall - row_C.sum()) / (overall - tail - cold)
    folder = path / "lake" / "models" / "outcomes" / "0123"
    folder.mkdir(parents=True)
    save_file({"user_C": torch.zeros(overall).int(), "slices_SC": slices_SC, "ndcg_KC": ndcg_KC}, folder / "outcomes.safetensors")
    names = {"models": models, "slices": ["overall", "tail", "cold"], "metric": "ndcg@10"}
    (folder / "outcomes.json").write_text(json.dumps(names))
    served = {
        "item": "50", "space_id": space[1], "serves_ds": space[2], "compared": int(space[3].replace(",", "")),
        "width": int(space[4]), "read_ms_p50": 7.04, "vector": [0.25, -0.125],
    }  # fmt: skip
    return {"evaluate": {"outcomes_id": "0123"}, "lookup": served, "report": {"path": str(path / "report.html")}}


def printed(demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], block: list[str]) -> str:
    """What `show` prints for such a run, the jobs that it calls stubbed."""
    for job, result in record(block, demo.DEMO).items():
        path = demo.DEMO / "lake" / "manifests" / f"ds={demo.DS}" / f"{job}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"result": result}))
    recent = [line[6:] for line in block if line.startswith("      ") and not line.startswith("       ")]
    titles = [found[1] for line in block if (found := re.match(r"  [ \d]\d\. (.+)  \(.*\)$", line))]
    assert len(recent) == 5 and titles

    def job(name: str, *settings: str) -> tuple[dict[str, Any], float]:
        demo.say(f"$ python -m jobs {name} … {' '.join(settings)}")
        more = [f"film {number}" for number in range(10 - len(titles))]
        if name == "recommend":
            carried = [{"llmemb": 0.3, "text": 0.2}] * 10
            with contextlib.redirect_stderr(sys.stdout):
                logs.start("recommend", demo.DS)
                recommend.log_result(SimpleNamespace(recent=recent, titles=[*titles, *more], scores=[0.5] * 10, carried=carried))  # type: ignore[arg-type]
        return {}, 1.0

    monkeypatch.setattr(demo, "job", job)
    monkeypatch.setattr(demo.serve, "ask_once", lambda lake, user: {
        "space_id": "6c0f516736e11b58", "ds": demo.DS, "history_items": 118, "seconds": 0.0123,
        "items": [{"item_id": "7", "score": 0.5, "attributes": {"title": titles[0]}, "parts": {"llmemb": 0.3, "text": 0.2}}],
    })  # fmt: skip
    capsys.readouterr()
    demo.show([("", "movielens", 12.34), ("rat_training", "rat", 56.78)])
    return capsys.readouterr().out


def test_the_readme_shows_what_the_demo_prints(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = readme_block()
    told = printed(demo, monkeypatch, capsys, block)
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "…" else ".*?".join(re.escape(part) for part in line.split("…")) + r"\n"
        for line in block
    )
    assert re.search(pattern, told), f"README's block is not what the demo prints:\n{told}"


def test_the_end_of_the_demo_tells_item_users_figures_times_and_the_report(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = printed(demo, monkeypatch, capsys, readme_block()).splitlines()
    heads = [line.strip("━ ") for line in told if line.startswith("━━━")]
    assert [head.split(",")[0].split(":")[0] for head in heads] == [
        "one item's vector", "one user", "NDCG@10 on every held-out event", "what serves", "the serving process", "time",
    ]  # fmt: skip
    assert "$ python -m jobs explain … explain.item=50" in told
    assert "$ python -m jobs recommend … recommend.user=459" in told
    assert "  item 50: [+0.2500, -0.1250, …]" in told
    assert any(line.endswith("equal to the lake's; a read takes 7.0 ms") for line in told)
    assert f"  report: {demo.DEMO / 'report.html'}" in told
    assert f"  {'':<20} {'movielens':<15}    12.3 s" in told
    assert f"  {'rat_training':<20} {'rat':<15}    56.8 s" in told
    assert re.fullmatch(r"  all +\d+\.\d s", told[-1])


def test_a_slice_without_events_has_dashes(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = [re.sub(r"^(  events .*?)[\d,]+$", r"\g<1>0", line) for line in readme_block()]
    told = printed(demo, monkeypatch, capsys, block)
    assert re.search(r"(?m)^  llmemb +\d\.\d{4} +\d\.\d{4} +–$", told)
    assert re.search(r"(?m)^  events +[\d,]+ +[\d,]+ +0$", told)


def test_the_readme_s_model_is_ahead_of_every_floor_that_it_shows() -> None:
    cells = re.findall(rf"^  (\w+) +{FIGURE} +{FIGURE} +{FIGURE}$", "\n".join(readme_block()), re.M)
    by_model = {model: [float(cell) for cell in row] for model, *row in cells}
    for floor in ("popularity", "repeat_markov_popularity", "tfidf_text", "id_only"):
        assert by_model["llmemb"][0] > by_model[floor][0]


def test_everything_runs_in_order_and_the_data_set_is_fetched_once(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(demo, "job", lambda name: (ran.append(name), ({}, 3.0))[1])
    monkeypatch.setattr(demo, "run_dag", lambda name: (ran.append(name), [(name, "task", 1.0)])[1])
    monkeypatch.setattr(demo, "show", lambda stages: ran.append(stages))

    def process(command: list[str], **_: Any) -> None:
        ran.append(command[2])
        if command[2] == "pip":
            folder = Path(command[command.index("-d") + 1])
            folder.mkdir(parents=True)
            (folder / "recbole-1.2.1-py3-none-any.whl").touch()

    monkeypatch.setattr(demo.subprocess, "run", process)
    stages = [("", "movielens", 3.0), *((name, "task", 1.0) for name in demo.DAGS)]
    rest = ["movielens", "airflow", "scft_refresh", "rat_training", "nightly_embeddings", stages]
    assert demo.main() == 0
    assert ran == ["pip", *rest]
    ran.clear()
    assert demo.main() == 0
    assert ran == rest


def test_a_job_gives_its_result_and_one_that_fails_ends_the_demo(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "a library\'s word"\necho \'{"words": "\'"$*"\'"}\'\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    result, seconds = demo.job("explain", "explain.item=50")
    words = f"-m jobs explain --recipe {demo.RECIPE} --ds 1998-04-22 --set explain.item=50"
    assert result == {"words": words} and seconds >= 0
    assert capsys.readouterr().out == f"\n$ python {words}\n"
    python.write_text("#!/bin/sh\nexit 2\n")
    with pytest.raises(SystemExit, match="explain failed: see the line above"):
        demo.job("explain")


def test_a_job_s_command_opens_its_block_and_every_line_tells_its_second(demo: ModuleType) -> None:
    def line(text: str) -> str:
        return str(demo.Terminal().format(logging.makeLogRecord({"msg": text})))

    assert re.fullmatch(r"\n +\d+ s  \$ python -m jobs rat", line("$ python -m jobs rat"))
    assert re.fullmatch(r" +\d+ s  rat: epoch 3", line("rat: epoch 3"))
