"""bakeoff: a small lake gives the whole table; nothing that serves changes; what is off is told by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jobs import bakeoff
from jobs.__main__ import build
from jobs.bakeoff import TABLE
from jobs.lake import manifests, partitions
from jobs.lake.tables import SEQUENCES
from jobs.run import InputError, Run
from models.behaviour.assembly import Fusion
from models.behaviour.codes import Codes
from models.behaviour.recommender import Backbone
from models.behaviour.training import Training
from models.judge.systems import Settings
from tests.jobs.small_lake import DS, ENCODER, make, sequence_rows

SMALL = Settings(
    backbone=Backbone(width=8, max_len=6), training=Training(loss="full", epochs=1, patience=1, batch=8), hidden=8,
    whitened_width=8, like_users=2, codes=Codes(books=2, entries=4, epochs=1, batch=8),
    fusion=Fusion(text_width=2, counting_width=4, graph_width=4, controls=False),
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The run of a lake in which `extract`, `scft` and `embed` have run."""
    return make(tmp_path)


def config(run: Run, **more: Any) -> bakeoff.Config:
    return bakeoff.Config(run=run, **{"settings": SMALL, "seeds": (1,), "cold_share": 0.0, **more})


def test_every_system_is_in_the_table_and_nothing_that_serves_changes(run: Run) -> None:
    before = {path for path in run.lake.rglob("*") if path.is_file()}
    result = bakeoff.run(config(run, encoders={"other": ENCODER}))
    made = {path.relative_to(run.lake).parts[0] for path in run.lake.rglob("*") if path.is_file() and path not in before}
    assert made == {"bakeoff"}
    rows = partitions.read(run.lake, TABLE, f"ds={DS}").to_pylist()
    names = {row["model"] for row in rows}
    assert {"popularity", "id_only", "llmemb", "llm_esr", "alpha_fuse", "graph", "codes", "fused", "fused_graph", "fused_codes",
            "fused_pq", "fused_rq", "llmemb_other", "fused_other"} <= names  # fmt: skip
    assert {one["model"] for one in result.models} == names == set(result.values)
    assert result.encoder_id == ENCODER and result.rows == {"bakeoff": len(rows)}
    value = result.values["fused"]["overall"]["ndcg@10"]
    found = {(row["model"], row["slice"], row["metric"]): row["value"] for row in rows}
    assert value == found["fused", "overall", "ndcg@10"]
    assert {row["against"] for row in result.differences} == names - {"fused"}
    assert set(result.routing["routes"]) == {"text", "graph", "repeat_markov_popularity"}


def test_a_rerun_leaves_the_same_table(run: Run) -> None:
    some = config(run, systems=("id_only", "text", "fused"), controls=False)
    assert bakeoff.run(some).outputs == bakeoff.run(some).outputs


def test_what_is_off_is_told_by_name(run: Run) -> None:
    with pytest.raises(InputError, match=r"bakeoff.systems \['best'\]: name some of id_only, text"):
        config(run, systems=("best",))
    with pytest.raises(InputError, match="each once"):
        config(run, seeds=(1, 1))
    with pytest.raises(InputError, match=r"cold_share 1.0 is not in"):
        config(run, cold_share=1.0)
    with pytest.raises(InputError, match="encoder beef has no embeddings"):
        bakeoff.run(config(run, encoder="beef"))
    with pytest.raises(ValueError, match=r"bakeoff.champion 'fused' is none of the systems that were made"):
        bakeoff.run(config(run, systems=("text",)))
    with pytest.raises(ValueError, match="19 different vectors, a book has 64 entries"):
        entries = dataclasses.replace(SMALL, codes=dataclasses.replace(SMALL.codes, entries=64))
        bakeoff.run(config(run, systems=("codes",), settings=entries, champion="codes"))
    assert build(bakeoff.Config, {"run": run, "systems": ["text"], "champion": "text"}, "bakeoff").systems == ("text",)


def test_users_without_anything_held_out_are_told(run: Run) -> None:
    rows = sequence_rows().to_pylist()
    for row in rows:
        row["train_end"] = row["valid_end"] = len(row["item_ids"])
    partitions.write(run.lake, SEQUENCES, f"ds={DS}", [SEQUENCES.schema.empty_table().from_pylist(rows, SEQUENCES.schema)])
    with pytest.raises(ValueError, match="no user has an event in the test part"):
        bakeoff.run(config(run))
    assert not list(manifests.history(run.lake, "bakeoff"))
