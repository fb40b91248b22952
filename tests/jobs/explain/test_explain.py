"""explain: the chain of a served vector, its digests held against the bytes."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import explain, forget, publish
from jobs.lake import arrivals, artifacts, manifests, partitions
from jobs.lake.arrivals import ARRIVING_ITEMS
from jobs.lake.items import content_hash
from jobs.lake.partitions import write_json
from jobs.lake.tables import ITEMS, METRICS, item_embeddings, llm_embeddings, space_of
from jobs.run import InputError, Refused, Run
from tests.jobs.conftest import vectors

DS = "2026-01-01"
ENCODER_FILES = {
    "encoder.json": json.dumps(
        {
            "base": "embedded", "base_sha256": "b" * 64, "lora": {"r": 8}, "pooling": "mean", "width": 4,
            "policy": {"domain": "A film:", "allow": ["title"], "block": [], "admit": [], "cap": 9, "caps": {}},
        }
    ),
    "adapter_model.safetensors": "weights",
}  # fmt: skip


def record(lake: Path, job: str, ds: str = DS, **result: object) -> None:
    """A manifest as the command line writes it."""
    known = {"inputs": {}, "outputs": {}, **result}
    write_json(
        manifests.path_of(lake, ds, job), {"job": job, "ds": ds, "status": "done", "code_revision": "c0de", "result": known}
    )


def publish_all(lake: Path, space: str, ds: str = DS) -> None:
    """Publishes a space and records its chain."""
    items = partitions.read_commit(lake, "items", f"ds={ds}").digest
    vectors = partitions.read_commit(lake, "item_embeddings", f"space={space}/ds={ds}").digest
    record(lake, "extract", ds, inputs={"shop.films": "40:123"}, outputs={f"items/ds={ds}": items})
    record(lake, "project", ds, inputs={"items": items}, outputs={"item_embeddings": vectors})
    publish.run(publish.Config(run=Run(ds=ds, lake=lake), space=space, approximate=False, offline=False, attributes=False))


@pytest.fixture
def served(catalogue: Callable[..., Path], trained: Callable[[Path], tuple[str, str]]) -> tuple[Path, str]:
    """A lake whose whole chain is recorded and published; (lake, space)."""
    lake = catalogue(space="0" * 16)
    staged = artifacts.stage(lake, "encoder")
    for name, text in ENCODER_FILES.items():
        (staged / name).write_text(text)
    encoder_id = artifacts.keep(lake, "encoder", staged)
    _, trained_id = trained(lake)
    recommender = artifacts.find(lake, "recommender", trained_id)
    known = json.loads((recommender / "recommender.json").read_text())
    turned = {"to": "d" * 16, "residual": 0.45}
    (recommender / "recommender.json").write_text(json.dumps({**known, "encoder_id": encoder_id, "rotation": turned}))
    recommender_id = artifacts.keep(lake, "recommender", recommender)
    space = space_of(encoder_id, recommender_id)
    catalogue(space=space)
    embed_texts(lake, encoder_id)
    metrics = partitions.write(lake, METRICS, f"ds={DS}", []).digest
    record(lake, "scft", outputs={"encoder": encoder_id})
    record(lake, "rat", outputs={"recommender": recommender_id})
    reasons = [{"gate": "above popularity", "verdict": "passed", "text": ""}]
    record(
        lake, "promote", recommender_id=recommender_id, decision="promoted", reasons=reasons, approved_by="", version="3",
        inputs={"metrics": metrics},
    )  # fmt: skip
    publish_all(lake, space)
    return lake, space


def embed_texts(lake: Path, encoder_id: str) -> None:
    """LLM embeddings of the catalogue, as `embed` leaves them."""
    hashes = [row for batch in partitions.scan(lake, ITEMS, f"ds={DS}") for row in batch["content_hash"].to_pylist()]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(4 * len(hashes), np.float16)), 4)
    rows = pa.table({"item_id": hashes, "content_hash": hashes, "embedding": vectors})
    partition = f"encoder={encoder_id}/ds={DS}/shard=00000-of-00001"
    commit = partitions.write(lake, llm_embeddings(4), partition, [rows])
    record(lake, "embed", outputs={"llm_embeddings": commit.digest})


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> None:
    """Takes what the job says, as the command line shows it."""
    caplog.set_level(logging.INFO, logger="jobs.explain")


def ask(lake: Path, item: str = "m7", ds: str = DS) -> explain.Result:
    return explain.run(explain.Config(run=Run(ds=ds, lake=lake), item=item))


def test_every_link_of_a_whole_chain_is_verified_against_its_bytes(
    served: tuple[Path, str], caplog: pytest.LogCaptureFixture
) -> None:
    result = ask(served[0])
    verdicts = {link.step: link.verdict for link in result.links}
    assert verdicts.pop("source") == "unknown", "the warehouse's bytes are not ours to read"
    assert set(verdicts.values()) == {"verified"}
    assert set(verdicts) == {"online vector", "item_embeddings", "recommender", "gate", "llm_embeddings", "encoder", "items"}
    assert result.space_id == served[1]
    shown = caplog.text
    assert "promoted on 2026-01-01: 1 of 1 gates passed, version 3" in shown
    assert "the encoder and it make the space; turned towards that of dddddddddddddddd, residual 0.45" in shown
    assert "shop.films: 40:123 (records, order-free hash)" in shown


def test_an_item_that_arrived_between_two_nights_is_walked_back_through_its_own_tables(served: tuple[Path, str]) -> None:
    lake, space = served
    texts = [content_hash([("title", "A late one")])]
    rows = {"item_id": ["late"], "attributes": [[{"name": "title", "value": "A late one"}]], "content_hash": texts,
            "first_seen_ds": [DS]}  # fmt: skip
    items = partitions.write(lake, ARRIVING_ITEMS, f"ds={DS}", [pa.table(rows, ITEMS.schema)])
    emb = partitions.write(lake, arrivals.item_embeddings(16), f"space={space}/ds={DS}", [vectors(space, ["late"], {}, texts)])
    record(lake, "arriving-extract", outputs={f"arriving_items/ds={DS}": items.digest})
    record(lake, "arriving-project", outputs={"arriving_embeddings": emb.digest})
    publish.run(publish.Config(run=Run(ds=DS, lake=lake), space=space, approximate=False, arriving=True))
    result = ask(lake, "late")
    verdicts = {link.step: link.verdict for link in result.links}
    assert verdicts["online vector"] == verdicts["arriving_embeddings"] == verdicts["arriving_items"] == "verified"
    assert result.text == "A film:\ntitle is A late one; "
    assert ask(lake, "m7").links[1].step == "item_embeddings"


def test_the_text_that_the_llm_read_is_told(served: tuple[Path, str]) -> None:
    assert ask(served[0]).text == "A film:\ntitle is Film m7, cut 0; "


def test_neighbours_are_those_of_the_lakes_vectors_with_titles(served: tuple[Path, str]) -> None:
    result = ask(served[0])
    rows = {
        row["item_id"]: np.array(row["embedding"])
        for batch in partitions.scan(served[0], item_embeddings(16), f"space={served[1]}/ds={DS}")
        for row in batch.to_pylist()
    }
    scores = {item: float(vector @ rows["m7"]) for item, vector in rows.items() if item != "m7"}
    best = sorted(scores, key=scores.__getitem__, reverse=True)[:5]
    assert [found.item_id for found in result.neighbours] == best
    assert [found.title for found in result.neighbours] == [f"Film {item}, cut 0" for item in best]
    assert result.neighbours_before == ()


def test_neighbours_in_the_space_before_are_shown_beside(
    served: tuple[Path, str], catalogue: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    lake, space = served
    catalogue(ds="2026-01-02", space="f" * 16)
    publish_all(lake, "f" * 16, "2026-01-02")
    result = ask(lake, ds="2026-01-02")
    assert result.space_id == "f" * 16
    assert len(result.neighbours_before) == 5
    assert result.neighbours_before == tuple(ask_before(lake, space))
    assert f"in space {space}" in caplog.text


def ask_before(lake: Path, space: str) -> list[explain.Neighbour]:
    """Neighbours of m7 in a space that does not serve."""
    rows = [row for batch in partitions.scan(lake, item_embeddings(16), f"space={space}/ds={DS}") for row in batch.to_pylist()]
    mine = np.array(next(row["embedding"] for row in rows if row["item_id"] == "m7"))
    scored = sorted(
        ((float(np.array(row["embedding"]) @ mine), row["item_id"]) for row in rows if row["item_id"] != "m7"), reverse=True
    )
    return [
        explain.Neighbour(item_id=item, title=f"Film {item}, cut 0", score=pytest.approx(score, abs=1e-4))  # type: ignore[arg-type]
        for score, item in scored[:5]
    ]


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("item_embeddings/space=SPACE/ds=*/part-*.parquet", "item_embeddings"),
        ("items/ds=*/part-*.parquet", "items"),
        ("models/recommender/*/recommender.safetensors", "recommender"),
        ("models/encoder/*/adapter_model.safetensors", "encoder"),
        ("llm_embeddings/encoder=*/ds=*/shard=*/part-*.parquet", "llm_embeddings"),
        ("metrics/ds=*/part-*.parquet", "gate"),
    ],
)
def test_one_changed_bit_anywhere_in_the_chain_is_refused_by_name(served: tuple[Path, str], path: str, step: str) -> None:
    lake, space = served
    for file in sorted(lake.glob(path.replace("SPACE", space))):
        whole = bytearray(file.read_bytes())
        # in the middle of a Parquet file are values, or with few rows the footer's texts
        whole[5 if file.suffix == ".parquet" else len(whole) // 2] ^= 1
        file.write_bytes(bytes(whole))
    with pytest.raises(Refused, match=f"broken at {step} "):
        ask(lake)


def test_a_vector_written_online_behind_the_lakes_back_is_refused(
    served: tuple[Path, str], catalogue: Callable[..., Path]
) -> None:
    lake, space = served
    catalogue(space=space, version={"m7": 1}, texts={})
    with pytest.raises(Refused, match="broken at online vector"):
        ask(lake)


def test_an_item_rewritten_by_forget_leaves_other_chains_whole(served: tuple[Path, str]) -> None:
    lake, _ = served
    result = forget.run(forget.Config(run=Run(ds=DS, lake=lake), item="m3", approximate=False))
    record(lake, "forget", outputs=result.outputs)
    assert {link.verdict for link in ask(lake).links if link.step in ("item_embeddings", "items", "llm_embeddings")} == {
        "verified"
    }


@pytest.mark.parametrize(("item", "reason"), [("nobody", "in neither the catalogue"), ("m3", "was forgotten")])
def test_an_item_without_a_vector_is_told_why(served: tuple[Path, str], item: str, reason: str) -> None:
    forget.run(forget.Config(run=Run(ds=DS, lake=served[0]), item="m3", approximate=False))
    with pytest.raises(InputError, match=reason):
        ask(served[0], item)


def test_an_item_of_the_catalogue_that_was_not_published_is_told_so(
    served: tuple[Path, str], catalogue: Callable[..., Path]
) -> None:
    catalogue(ds="2026-01-02", space=served[1], ids=[*(f"m{number}" for number in range(9)), "new"])
    with pytest.raises(InputError, match="publish first"):
        ask(served[0], "new")


def test_before_the_first_publish_explain_says_what_to_do(catalogue: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="run `python -m jobs publish`"):
        ask(catalogue())


def test_a_chain_of_which_little_was_recorded_is_shown_as_not_checked(served: tuple[Path, str]) -> None:
    lake, _ = served
    for name in ("promote", "project", "embed", "extract"):
        manifests.path_of(lake, DS, name).unlink()
    result = ask(lake)
    assert result.unchecked == 5
    assert {link.step for link in result.links if link.verdict == "verified"} == {"online vector", "recommender", "encoder"}


def test_an_item_named_like_a_path_or_markup_is_an_item(catalogue: Callable[..., Path]) -> None:
    lake = catalogue(ids=["../m", "<b>", "m'\"", "é", "m4", "m5", "m6", "m7", "m8"])
    publish_all(lake, "a" * 16)
    for item in ("../m", "<b>", "m'\"", "é"):
        assert ask(lake, item).item_id == item


def test_the_command_prints_its_result_and_imports_feast_whole_with_its_own_type_checks(
    served: tuple[Path, str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[run]\nlake = "{served[0]}"\n')
    words = ["explain", "--recipe", str(recipe), "--ds", DS, "--set", "explain.item=m7"]
    # the command, and then a look at what it has imported
    program = (
        "import runpy, sys, typeguard\n"
        "try: runpy.run_module('jobs', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'feast' in sys.modules\n"
        "import feast\n"
        "try: feast.Entity(name=7)\n"
        "except typeguard.TypeCheckError: print('checked', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["item_id"] == "m7"
    assert done.stderr.strip().endswith("checked"), done.stderr
