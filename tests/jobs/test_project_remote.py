"""A lake in a folder that is copied to a bucket is the same lake; `project`, killed there at random, ends with equal objects."""

from __future__ import annotations

import random
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from jobs import project, rat
from jobs.run import Run
from models.behaviour.assembly import Fusion
from models.behaviour.recommender import Backbone
from models.behaviour.training import Training
from tests.forked import job, start
from tests.jobs.small_lake import DS, make, remember
from tests.object_store import ObjectStore
from tests.object_store import object_server as object_server
from tests.object_store import object_store as object_store

SMALL = Backbone(width=8, max_len=6)


@pytest.fixture
def folder(tmp_path: Path) -> Run:
    """A lake in a folder, after `rat`."""
    run = make(tmp_path)
    config = rat.Config(run=run, teacher="none", hidden=16, backbone=SMALL, fusion=Fusion(parts=("llmemb",)),
                        training=Training(epochs=1, batch=8))  # fmt: skip
    remember(run, "rat", rat.run(config))
    return run


def test_a_folder_that_is_copied_to_a_bucket_is_the_same_lake(folder: Run, object_store: ObjectStore) -> None:
    lake = object_store.copy_of(folder.lake)
    here = project.run(project.Config(run=folder, recommender="latest"))
    there = project.run(project.Config(run=Run(ds=DS, lake=lake, device="cpu"), recommender="latest"))
    assert (there.inputs, there.outputs, there.rows) == (here.inputs, here.outputs, here.rows)
    key = f"item_embeddings/space={here.space_id}/ds={DS}/_commit.json"
    assert object_store.objects()[key] == (folder.lake / key).read_bytes()


def test_killed_at_random_instants_and_run_again_it_ends_with_the_same_objects(
    folder: Run, object_store: ObjectStore, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'[run]\nlake = "{object_store.address()}"\ndevice = "cpu"\n[project]\nrecommender = "latest"\nbatch_rows = 4\n'
    )
    object_store.copy_of(folder.lake)
    before = object_store.objects()
    words = ["project", "--recipe", str(recipe), "--ds", DS]
    earlier = len(object_store.seen)
    whole(words)
    wanted = tables(object_store)
    requests = len(object_store.seen) - earlier
    for draw in random.Random(7).sample(range(requests), 4):
        for key in object_store.objects().keys() - before.keys():
            object_store.client.delete_object(Bucket=object_store.bucket, Key=f"lake/{key}")
        killed: list[BaseProcess] = []
        left = [draw + 1]

        def fault(method: str, path: str, killed: list[BaseProcess] = killed, left: list[int] = left) -> str:
            left[0] -= 1
            if left[0] == 0:
                killed[0].kill()
            return "hang up" if left[0] == 0 else ""

        killed.append(start(job, words))
        object_store.fault = fault
        killed[0].join()
        object_store.fault = lambda method, path: ""
        whole(words)
        assert tables(object_store) == wanted, draw


def whole(words: list[str]) -> None:
    """A run to its end."""
    process = start(job, words)
    process.join()
    assert process.exitcode == 0


def tables(object_store: ObjectStore) -> dict[str, bytes]:
    """What the job commits."""
    return {key: data for key, data in object_store.objects().items() if key.startswith("item_embeddings/")}
