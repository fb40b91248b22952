"""embed: each text once, ever; shards that share nothing; kills that cost one part; bad embeddings named."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import embed
from jobs.embed import parts
from jobs.engines import registry
from jobs.lake import artifacts, partitions
from jobs.lake import parts as finished_parts
from jobs.lake.items import bury, content_hash
from jobs.lake.parts import FEW
from jobs.lake.tables import llm_embeddings
from jobs.lake.tensors import embedding_batches, read_embeddings
from jobs.run import InputError, Run, as_json
from models.text.embedding import embed_items
from models.text.encoder import Encoder, load_encoder, save_encoder
from models.text.packing import Step
from tests.jobs.scft.test_scft import write_items
from tests.jobs.small_lake import remember
from tests.jobs.small_registry import kept
from tests.jobs.waiting import LONG, until
from tests.models import tiny

DS = "2026-03-10"
COUNT = 30


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMEMB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path: Path) -> embed.Config:
    """A zero-shot encoder kept in a lake, and a catalogue of 30 items of which two read the same."""
    lake = tmp_path / "lake"
    items = tiny.items(COUNT)
    items[7] = items[3]
    write_items(lake, DS, items)
    staged = artifacts.stage(lake, "encoder")
    save_encoder(staged, tiny.encoder(tiny.llama(tmp_path / "base")).spec, None)
    run = Run(ds=DS, lake=lake, device="cpu")
    remember(run, "scft", {"encoder_id": artifacts.keep(lake, "encoder", staged)})
    return embed.Config(run=run, encoder="latest", part_items=8)


def changed(config: embed.Config, **more: Any) -> embed.Config:
    return dataclasses.replace(config, **more)


def rows(config: embed.Config) -> pa.Table:
    """All embeddings in the lake."""
    table = llm_embeddings(32, config.dtype)
    found = partitions.committed(config.run.lake, table.name)
    return pa.concat_tables([partitions.read(config.run.lake, table, partition) for partition in found])


def bytes_of(config: embed.Config) -> dict[str, bytes]:
    """Every file of the table, by name."""
    root = config.run.lake / "llm_embeddings"
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_each_text_has_the_encoders_embedding_under_its_own_hash(config: embed.Config) -> None:
    result = embed.run(config)
    found = rows(config)
    assert (result.embedded, result.rows["llm_embeddings"], found.num_rows) == (COUNT - 1, COUNT - 1, COUNT - 1)
    encoder = load_encoder(artifacts.find(config.run.lake, "encoder", result.encoder_id), device=tiny.CPU)
    items = {content_hash(item): item for item in tiny.items(COUNT)}
    wanted = embed_items(encoder, [items[text] for text in found["content_hash"].to_pylist()])
    emb_NE = np.asarray(found["embedding"].to_pylist())
    cosine = (emb_NE * wanted).sum(1) / np.linalg.norm(emb_NE, axis=1) / np.linalg.norm(wanted, axis=1)
    assert cosine.min() > 0.999
    assert result.tokens > 0 and result.cost_per_million_items is not None
    assert json.dumps(as_json(result))


def test_a_rerun_embeds_nothing_loads_no_model_and_leaves_the_same_bytes(
    config: embed.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed.run(config)
    before = bytes_of(config)
    monkeypatch.setattr(embed, "load_encoder", None)
    again = embed.run(config)
    assert (again.embedded, again.known) == (0, COUNT - 1)
    assert bytes_of(config) == before


def test_the_next_night_embeds_only_what_is_new_or_changed(config: embed.Config) -> None:
    embed.run(config)
    items = tiny.items(COUNT)
    write_items(config.run.lake, "2026-03-11", [*items[:-1], [("title", "changed")]])
    result = embed.run(changed(config, run=dataclasses.replace(config.run, ds="2026-03-11")))
    # item 7 has its own text again
    assert (result.embedded, result.rows["llm_embeddings"]) == (2, COUNT + 1)


def test_what_an_older_version_kept_by_date_is_known(config: embed.Config) -> None:
    before = embed.run(config)
    home = config.run.lake / "llm_embeddings" / f"encoder={before.encoder_id}"
    (home / f"ds={DS}").mkdir()
    (home / "shard=00000-of-00001").rename(home / f"ds={DS}" / "shard=00000-of-00001")
    write_items(config.run.lake, DS, tiny.items(COUNT + 1))
    result = embed.run(config)
    assert (result.known, result.embedded, result.rows["llm_embeddings"]) == (COUNT - 1, 2, 2)
    assert rows(config).num_rows == COUNT + 1


def test_nights_of_two_shards_leave_few_parts_to_open_and_every_text_once(config: embed.Config) -> None:
    embeddings = dict[str, Any]()
    for number in range(2 * FEW):
        ds = f"2026-04-{number + 1:02d}"
        write_items(config.run.lake, ds, tiny.items(4 + 4 * number))
        for shard in range(2):
            now = changed(config, run=dataclasses.replace(config.run, ds=ds), shards=2, shard=shard, part_items=1_000)
            result = embed.run(now)
            digest = partitions.read_commit(config.run.lake, "llm_embeddings", result.partition).digest
            assert result.outputs == {"llm_embeddings": digest}, "also where parts were joined"
        told = {row["content_hash"]: row["embedding"] for row in rows(config).to_pylist()}
        assert {text: told[text] for text in embeddings} == embeddings and len(told) == 4 + 4 * number
        embeddings = told
    found = partitions.committed(config.run.lake, "llm_embeddings")
    assert [name.partition("/")[2] for name in found] == ["shard=00000-of-00002", "shard=00001-of-00002"]
    assert all(len(partitions.read_commit(config.run.lake, "llm_embeddings", name).files) <= FEW for name in found)
    assert rows(config).num_rows == len(embeddings)


def test_a_text_of_a_forgotten_item_and_of_a_living_one_is_there_after_parts_are_joined(config: embed.Config) -> None:
    lake = config.run.lake
    for number in range(FEW + 1):
        ds, items = f"2026-04-{number + 1:02d}", tiny.items(4 + number)
        items[1] = items[0]
        write_items(lake, ds, items)
        if number == FEW:
            bury(lake, "i0000", ds)  # as a `forget` that was killed right after
        config = changed(config, run=dataclasses.replace(config.run, ds=ds), part_items=1_000)
        result = embed.run(config)
    texts = pa.array([content_hash(item) for item in items[1:]])
    assert len(read_embeddings(config.run, result.encoder_id, texts)) == len(texts)
    assert len(partitions.read_commit(lake, "llm_embeddings", result.partition).files) == 1


def test_a_part_of_a_killed_run_does_not_bring_a_forgotten_item_back_by_a_text_that_it_shared(
    config: embed.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = tiny.items(COUNT)
    items[4] = items[3]  # one after the other: the part's texts stay the same, in the same order
    write_items(config.run.lake, DS, items)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(embed, "commit_parts", Mock(side_effect=Killed))
        embed.run(config)
    bury(config.run.lake, "i0003", DS)  # on another machine, where the part does not lie
    result = embed.run(config)
    assert "i0003" not in rows(config)["item_id"].to_pylist() and rows(config).num_rows == COUNT - 1
    assert result.resumed > 0, "parts without it are still good"


@pytest.mark.parametrize("kinds", [("float16", "float32"), ("float32", "float16")])
def test_embeddings_of_two_number_types_are_read_in_the_wider_one(config: embed.Config, kinds: tuple[Any, Any]) -> None:
    embed.run(changed(config, dtype=kinds[0]))
    items = tiny.items(COUNT + 5)
    write_items(config.run.lake, DS, items)
    result = embed.run(changed(config, dtype=kinds[1]))
    texts = pa.array([content_hash(item) for item in items])
    llm_NE = read_embeddings(config.run, result.encoder_id, texts)
    stored = {
        text: vector
        for texts_B, emb_BE in embedding_batches(config.run, result.encoder_id)
        for text, vector in zip(texts_B.to_pylist(), emb_BE.tolist(), strict=True)
    }
    assert str(llm_NE.dtype) == "torch.float32" and llm_NE.tolist() == [stored[text] for text in texts.to_pylist()]


def test_an_items_table_that_grew_on_the_same_date_adds_to_the_partition(config: embed.Config) -> None:
    embed.run(config)
    write_items(config.run.lake, DS, tiny.items(COUNT + 5))
    result = embed.run(config)
    assert (result.embedded, result.rows["llm_embeddings"]) == (6, COUNT + 5)
    assert len(set(rows(config)["content_hash"].to_pylist())) == COUNT + 5


def test_shards_share_the_texts_without_overlap_and_give_the_same_embeddings(config: embed.Config) -> None:
    embed.run(config)
    whole = {row["content_hash"]: row["embedding"] for row in rows(config).to_pylist()}
    shutil.rmtree(config.run.lake / "llm_embeddings")
    for shard in range(3):
        embed.run(changed(config, shards=3, shard=shard))
    found = rows(config).to_pylist()
    assert len(found) == len(whole)
    for row in found:
        np.testing.assert_allclose(row["embedding"], whole[row["content_hash"]], atol=2e-2)


def test_a_shard_without_texts_commits_an_empty_partition(config: embed.Config) -> None:
    write_items(config.run.lake, DS, tiny.items(1))
    results = [embed.run(changed(config, shards=4, shard=shard)) for shard in range(4)]
    assert sorted(result.rows["llm_embeddings"] for result in results) == [0, 0, 0, 1]


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("moment", ["model", "write", "commit", "after"])
def test_a_killed_run_goes_on_from_its_finished_parts_and_ends_with_the_same_bytes(
    config: embed.Config, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    embed.run(config)
    wanted = bytes_of(config)
    shutil.rmtree(config.run.lake / "llm_embeddings")
    calls = [0]

    def dying(original: Callable[..., Any], at: int) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                raise Killed
            return original(*given, **named)

        return call

    target, name, at = {
        "model": (parts, "embedded", 3),
        "write": (finished_parts.pq, "write_table", 3),
        "commit": (finished_parts.partitions, "commit_files", 1),
        "after": (finished_parts.shutil, "rmtree", 1),
    }[moment]
    with monkeypatch.context() as patch:
        patch.setattr(target, name, dying(getattr(target, name), at))
        with pytest.raises(Killed):
            embed.run(config)
    if moment != "after":
        assert partitions.committed(config.run.lake, "llm_embeddings") == []
    result = embed.run(config)
    assert result.resumed + result.known == {"model": 16, "write": 16, "commit": COUNT - 1, "after": COUNT - 1}[moment]
    assert bytes_of(config) == wanted


def test_finished_parts_of_another_number_type_are_not_taken_up(config: embed.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(embed, "commit_parts", dies)
        with pytest.raises(Killed):
            embed.run(config)
    assert len(list(config.run.lake.glob("llm_embeddings/**/.parts/*.parquet"))) == 4
    result = embed.run(changed(config, dtype="float32"))
    assert (result.resumed, result.embedded) == (0, COUNT - 1)
    kinds = {
        pq.read_schema(path).field("embedding").type.value_type
        for path in config.run.lake.glob("llm_embeddings/**/part-*.parquet")
    }
    assert kinds == {pa.float32()}


def test_a_shard_whose_worker_is_killed_outright_is_repeated_without_its_finished_parts(
    config: embed.Config, tmp_path: Path
) -> None:
    shard = changed(config, shards=2, shard=1, part_items=2)
    embed.run(shard)
    wanted = {row["content_hash"]: row["embedding"] for row in rows(config).to_pylist()}
    names = {name.rpartition("-")[0] for name in bytes_of(config)}
    shutil.rmtree(config.run.lake / "llm_embeddings")
    program = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from jobs import embed
        from jobs.run import Run
        whole, parts = embed.finished, []
        def finished(*given):
            if len(parts) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            parts.append(whole(*given))
            return parts[-1]
        embed.finished = finished
        run = Run(ds=sys.argv[1], lake=Path(sys.argv[2]), device="cpu")
        embed.run(embed.Config(run=run, encoder="latest", shards=2, shard=1, part_items=2))
    """)
    evicted = subprocess.run([sys.executable, "-c", program, DS, str(config.run.lake)], capture_output=True, check=False)
    assert evicted.returncode == -signal.SIGKILL, evicted.stderr[-2000:]
    assert partitions.committed(config.run.lake, "llm_embeddings") == []
    result = embed.run(shard)
    assert result.resumed == 6 and result.embedded == result.rows["llm_embeddings"] - 6
    found = {row["content_hash"]: row["embedding"] for row in rows(config).to_pylist()}
    assert found.keys() == wanted.keys() and {name.rpartition("-")[0] for name in bytes_of(config)} == names
    # the parts of another process: its threads may round otherwise, by float16's last place
    for text, vector in found.items():
        np.testing.assert_allclose(vector, wanted[text], rtol=2e-3, atol=2e-3)


def test_of_two_runs_of_a_shard_at_once_the_second_waits_and_finds_all_done(
    config: embed.Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original, begun, go_on, told = parts.embedded, threading.Event(), threading.Event(), [""]

    def slow(*given: Any) -> Any:
        begun.set()
        go_on.wait(LONG)
        return original(*given)

    def waiting() -> bool:
        told.append(capfd.readouterr().err)
        return "waiting for embed" in "".join(told)

    monkeypatch.setattr(parts, "embedded", slow)
    with ThreadPoolExecutor(2) as pool:
        try:
            first = pool.submit(embed.run, config)
            assert begun.wait(LONG)
            begun.clear()
            second = pool.submit(embed.run, changed(config, run=dataclasses.replace(config.run, ds="2026-03-11")))
            # without the lock the second would embed at once
            until(lambda: waiting() or begun.is_set() or second.done(), "the second run's word that it waits")
            assert "waiting for embed" in "".join(told)
        finally:
            go_on.set()  # the pool ends with its threads
        assert (first.result(LONG).embedded, second.result(LONG).embedded) == (COUNT - 1, 0)
    assert rows(config).num_rows == COUNT - 1


def test_the_opponents_encoder_embeds_what_it_has_not_seen_and_keeps_a_manifest_of_its_own(
    config: embed.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, old = config.run, embed.chosen(config)
    spec = tiny.encoder(tiny.llama(run.lake / "base")).spec
    staged = artifacts.stage(run.lake, "encoder")
    save_encoder(staged, dataclasses.replace(spec, policy=dataclasses.replace(spec.policy, domain="Another sentence:")), None)
    new = artifacts.keep(run.lake, "encoder", staged)
    champion, challenger = (kept(run, seed, encoder_id=encoder) for seed, encoder in ((0, old), (1, new)))
    remember(run, "rat", {"recommender_id": challenger.name})
    aliases = {"champion": champion.name}
    monkeypatch.setattr(registry, "by_alias", lambda _, alias: {"recommender_id": aliases[alias]} if alias in aliases else None)
    opponent = changed(config, encoder="opponent")
    result = embed.run(opponent)
    assert (result.encoder_id, result.embedded) == (old, COUNT - 1)
    assert embed.run(opponent).embedded == 0
    aliases |= {"champion": challenger.name, "previous": champion.name}  # the night run again after its promotion
    assert embed.chosen(opponent) == old
    assert opponent.manifest == "embed-opponent"
    assert changed(opponent, shards=16, shard=3).manifest == "embed-opponent-00003-of-00016"
    assert changed(config, shards=16, shard=3).manifest == "embed-00003-of-00016"


def test_on_the_first_night_there_is_no_opponent_and_that_is_said(
    config: embed.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    remember(config.run, "rat", {"recommender_id": "r" * 16})
    result = embed.run(changed(config, encoder="opponent"))
    assert (result.encoder_id, result.embedded, result.outputs) == ("", 0, {})
    assert "none to measure against, so nothing to embed" in capsys.readouterr().err
    assert partitions.committed(config.run.lake, "llm_embeddings") == []


def test_of_two_dates_the_run_s_own_is_embedded(config: embed.Config) -> None:
    write_items(config.run.lake, "2026-03-11", tiny.items(COUNT + 5))
    result = embed.run(config)
    assert result.inputs["items"] == partitions.read_commit(config.run.lake, "items", f"ds={DS}").digest
    assert result.embedded == COUNT - 1
    later = dataclasses.replace(config.run, ds="2026-03-11")
    remember(later, "scft", {"encoder_id": "f" * 16})
    assert embed.chosen(config) == result.encoder_id
    assert embed.run(changed(config, run=later, encoder=result.encoder_id)).embedded == 6


def test_a_half_written_snapshot_is_passed_over(config: embed.Config) -> None:
    later = changed(config, run=dataclasses.replace(config.run, ds="2026-03-11"))
    write_items(config.run.lake, "2026-03-11", tiny.items(COUNT + 5))
    (config.run.lake / "items" / "ds=2026-03-11" / partitions.COMMIT).unlink()  # killed before its last step
    assert embed.run(later).inputs["items"] == partitions.read_commit(config.run.lake, "items", f"ds={DS}").digest
    write_items(config.run.lake, "2026-03-11", tiny.items(COUNT + 5))
    assert embed.run(later).embedded == 6


def test_forgotten_items_are_not_embedded(config: embed.Config) -> None:
    bury(config.run.lake, "i0005", DS)
    embed.run(config)
    assert "i0005" not in rows(config)["item_id"].to_pylist()
    assert rows(config).num_rows == COUNT - 2


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_embeddings_that_are_not_finite_or_zero_fail_the_shard_and_name_their_items(
    config: embed.Config, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    original = parts.embed

    def bad(*given: Any, **named: Any) -> Any:
        emb_BE = original(*given, **named)
        emb_BE[2] = value
        return emb_BE

    monkeypatch.setattr(parts, "embed", bad)
    with pytest.raises(InputError, match="of items i0002"):
        embed.run(config)
    assert partitions.committed(config.run.lake, "llm_embeddings") == []


def test_values_too_large_for_float16_are_refused_and_fit_float32(config: embed.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, step: forward(self, step) * 1e6)
    with pytest.raises(InputError, match=r"set embed\.dtype to float32"):
        embed.run(config)
    assert embed.run(changed(config, dtype="float32")).embedded == COUNT - 1


def test_an_encoder_deleted_in_mid_run_is_a_clear_error_and_loses_no_finished_part(
    config: embed.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, encoders = parts.embedded, config.run.lake / "models" / "encoder"
    kept = config.run.lake / "kept"
    shutil.copytree(encoders, kept)

    def deleting(*given: Any) -> Any:
        shutil.rmtree(encoders, ignore_errors=True)
        return original(*given)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "embedded", deleting)
        with pytest.raises(InputError, match="is not in the lake"):
            embed.run(config)
    assert partitions.committed(config.run.lake, "llm_embeddings") == []
    shutil.copytree(kept, encoders)
    assert embed.run(config).resumed == COUNT - 1


def test_a_full_disk_is_said_and_finished_parts_stay(config: embed.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    written, calls = pq.write_table, [0]

    def full(*given: Any, **named: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(finished_parts.pq, "write_table", full)
        with pytest.raises(InputError, match="make room and run again"):
            embed.run(config)
    assert embed.run(config).resumed == 16


def test_long_prompts_are_cut_and_counted_and_items_without_attributes_too(config: embed.Config) -> None:
    items = [[(f"field {number}", "x" * 60) for number in range(9)], [], [("title", "short")]]
    write_items(config.run.lake, DS, items)
    result = embed.run(config)
    assert (result.cut, result.empty, result.embedded) == (1, 1, 3)


def test_memory_holds_one_part(config: embed.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = parts.embedded
    monkeypatch.setattr(parts, "embedded", lambda part, *rest: (sizes.append(part.num_rows), original(part, *rest))[1])
    embed.run(config)
    assert sizes == [8, 8, 8, 5]


def test_items_that_see_their_neighbours_fail_before_the_first_part(
    config: embed.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Encoder.forward

    def mixing(self: Encoder, step: Step) -> Any:
        emb_BE = forward(self, step)
        return emb_BE.roll(1, 0)

    monkeypatch.setattr(Encoder, "forward", mixing)
    with pytest.raises(ValueError, match="depend on the prompts beside them"):
        embed.run(config)


@pytest.mark.parametrize("wrong", [{"shard": 1}, {"shards": 2, "shard": -1}, {"part_items": 0}])
def test_a_shard_that_is_not_there_is_refused(config: embed.Config, wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="embed"):
        changed(config, **wrong)


def test_without_a_champion_the_remedy_is_named(config: embed.Config) -> None:
    with pytest.raises(InputError, match="set it to 'latest'"):
        embed.run(changed(config, encoder="champion"))
    with pytest.raises(InputError, match="is not in the lake"):
        embed.run(changed(config, encoder="0" * 16))


def test_eight_bits_without_a_gpu_are_refused_with_the_remedy(config: embed.Config) -> None:
    with pytest.raises(ValueError, match="set fp8 to false"):
        embed.run(changed(config, fp8=True))
