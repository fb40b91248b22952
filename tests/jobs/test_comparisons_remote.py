"""codes, generate, rerank and bakeoff on a lake in a bucket give what they give in a folder, with nothing left on the machine."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import bakeoff, codes, generate, project, rat, rerank
from jobs.lake import store as stores
from jobs.run import InputError, Run
from models.behaviour.assembly import Fusion
from models.behaviour.codes import Codes
from models.behaviour.generative import Generative
from models.behaviour.recommender import Backbone
from models.behaviour.training import Training
from models.judge.systems import Settings
from models.text.rerank import Distilling
from tests.jobs.small_lake import DS, make, remember
from tests.models import tiny
from tests.object_store import ObjectStore
from tests.object_store import object_server as object_server
from tests.object_store import object_store as object_store

BOOKS = Codes(books=2, entries=4, epochs=2, batch=8)
BACKBONE, TRAINING = Backbone(width=8, max_len=6), Training(epochs=1, batch=8)
Machine = Callable[[str], Run]


@pytest.fixture
def folder(tmp_path: Path) -> Run:
    """A small lake in a folder, after `rat` and `project`."""
    run = make(tmp_path)
    settings = rat.Config(
        run=run, teacher="none", hidden=8, backbone=BACKBONE, fusion=Fusion(parts=("llmemb",)), training=TRAINING
    )
    remember(run, "rat", rat.run(settings))
    project.run(project.Config(run=run, recommender="latest"))
    return run


@pytest.fixture
def machine(folder: Run, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A run on a machine of its own of the same lake in the bucket."""
    shutil.rmtree(object_store.copy_of(folder.lake))

    def of(name: str) -> Run:
        monkeypatch.setenv("LLMEMB_SCRATCH", str(tmp_path / name))
        return Run(ds=DS, lake=Path(object_store.address()), device="cpu")

    return of


def books(run: Run, **more: object) -> codes.Result:
    known = {"recommender": "latest", "training": BOOKS, "publish": False, "controls": False, **more}
    result = codes.run(codes.Config(run=run, **known))  # type: ignore[arg-type]
    remember(run, "codes", result)
    return result


@pytest.mark.parametrize("source", ["item_embeddings", "llm_embeddings"])
def test_codes_and_the_model_that_writes_them(source: str, folder: Run, machine: Machine, object_store: ObjectStore) -> None:
    here, there = books(folder, source=source), books(machine("one"), source=source)
    assert (there.books_id, there.inputs, there.outputs, there.rows) == (here.books_id, here.inputs, here.outputs, here.rows)
    key = f"item_codes/books={here.books_id}/ds={DS}/_commit.json"
    assert object_store.objects()[key] == (folder.lake / key).read_bytes()
    again = books(machine("another"), source=source)
    assert (again.kept, again.outputs) == (here.new, here.outputs)
    before = object_store.objects()
    small = Generative(width=8, layers=1, heads=2, history=3, steps=3, batch=4, beams=6)
    wrote, told = (
        generate.run(generate.Config(run=run, recommender="latest", training=small, user_codes=BOOKS))
        for run in (folder, machine("third"))
    )
    assert (told.ndcg, told.drift, told.inputs) == (wrote.ndcg, 0.0, wrote.inputs)
    assert object_store.objects() == before


def test_codes_go_online_by_a_service_or_not_at_all(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLMEMB_ONLINE_STORE", "LLMEMB_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    run = machine("one")
    with pytest.raises(InputError, match=r"codes with run.lake s3://.*set LLMEMB_ONLINE_STORE and LLMEMB_REGISTRY"):
        books(run, publish=True)
    assert not (run.lake / "feast").exists()


def test_rerank(folder: Run, machine: Machine, tmp_path: Path, object_store: ObjectStore) -> None:
    base = str(tiny.llama(tmp_path / "base", tie_word_embeddings=True))
    asked = {"recommender": "latest", "base": base, "top": 5, "users": 8, "distilling": Distilling(tokens=2, steps=2, batch=2)}
    before = object_store.objects()
    here, there = (rerank.run(rerank.Config(run=run, **asked)) for run in (folder, machine("one")))  # type: ignore[arg-type]
    assert (there.ndcg, there.differences, there.inputs) == (here.ndcg, here.differences, here.inputs)
    assert object_store.objects() == before


def test_bakeoff(folder: Run, machine: Machine, object_store: ObjectStore) -> None:
    small = Settings(backbone=BACKBONE, training=dataclasses.replace(TRAINING, loss="full"), hidden=8, whitened_width=8)
    asked = {"settings": small, "seeds": (1,), "systems": ("id_only", "fused"), "controls": False, "encoder": "e0e0e0e0e0e0e0e0"}
    here, there = (bakeoff.run(bakeoff.Config(run=run, **asked)) for run in (folder, machine("one")))  # type: ignore[arg-type]
    assert (there.values, there.inputs, there.outputs) == (here.values, here.inputs, here.outputs)
    assert f"bakeoff/ds={DS}/_commit.json" in object_store.objects()
    store = stores.of(machine("one").lake)
    assert store is not None and store.folders("bakeoff") == [f"ds={DS}"]
