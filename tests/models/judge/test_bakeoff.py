"""The bake-off: every system of the family runs under one harness, floors stand beside them, and differences are paired."""

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from models.behaviour.assembly import Fusion
from models.behaviour.codes import Codes
from models.behaviour.recommender import Backbone
from models.behaviour.training import Training
from models.judge import bakeoff
from models.judge.bakeoff import Outcome
from models.judge.evaluation import SLICES, Cases, make_cases
from models.judge.family import FAMILY
from models.judge.systems import Kit, Settings
from tests.models.behaviour.small_world import ITEMS, events, texts

SMALL = Settings(
    backbone=Backbone(width=8, max_len=6, dropout=0.0), training=Training(loss="full", epochs=2, patience=2), hidden=8,
    whitened_width=12, like_users=3, codes=Codes(books=2, entries=8, epochs=3, batch=64),
    fusion=Fusion(text_width=6, counting_width=8, graph_width=8, controls=False),
)  # fmt: skip


def halved(emb_ND: Tensor, books: int, entries: int) -> Mapping[str, tuple[Tensor, Tensor | None]]:
    """A control that is easy to tell: every vector in its place, and the index as codes."""
    place_N = torch.arange(len(emb_ND))
    return {"plain": (emb_ND, torch.stack([place_N // entries % entries, place_N % entries], 1))}


def cases() -> tuple[Cases, Cases]:
    test, valid = (
        make_cases(events(), part, negatives=1, paper_tail=4, chunk=512, seed=0, unseen=True)  # type: ignore[arg-type]
        for part in ("test", "valid")
    )
    return test, valid


def kit(seed: int = 0, **more: object) -> Kit:
    llm = {"main": texts(), "other": texts(seed=5)}
    ids = [f"i{number}" for number in range(1, ITEMS + 1)]
    return Kit(events(), llm, ids, SMALL, seed=seed, unseen=True, quantise=halved, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found() -> dict[str, Outcome]:
    return bakeoff.held(kit, tuple(FAMILY), (0, 1), *cases(), None)


def test_every_system_and_floor_has_outcomes_of_every_seed_and_case(found: dict[str, Outcome]) -> None:
    assert set(found) == {
        "popularity", "repeat_markov_popularity", "id_only", "text", "graph", "llmemb", "llmemb_graph_teacher", "llm_esr",
        "alpha_fuse", "codes", "codes_plain", "fused", "fused_graph", "fused_codes", "fused_plain", "llmemb_other", "fused_other",
    }  # fmt: skip
    test, valid = cases()
    for name, one in found.items():
        assert [len(ndcg_C) for ndcg_C in one.ndcg_SC] == [len(test.users_C)] * 2, name
        assert [len(ndcg_C) for ndcg_C in one.valid_SC] == [len(valid.users_C)] * 2, name


def test_seconds_of_a_system_count_what_it_needs_and_bytes_are_those_of_an_item(found: dict[str, Outcome]) -> None:
    for seed in range(2):
        seconds = {name: one.seconds[seed] for name, one in found.items()}
        assert seconds["fused"] > seconds["llmemb"] > seconds["id_only"] > 0
        assert seconds["llmemb_graph_teacher"] > seconds["graph"]
        assert seconds["fused_codes"] > seconds["fused"]
    assert found["id_only"].bytes_per_item == 4 * 8
    assert found["codes"].bytes_per_item == found["fused_codes"].bytes_per_item == 2 * 3 / 8
    assert found["fused"].bytes_per_item == 4 * (8 + 8 + 6 + 8) or found["fused"].bytes_per_item % 4 == 0


def test_codes_that_lose_nothing_rank_as_the_champion_does(found: dict[str, Outcome]) -> None:
    for one, other in zip(found["fused_plain"].ndcg_SC, found["fused"].ndcg_SC, strict=True):
        assert torch.equal(one, other)
    assert found["fused_plain"].told[0]["recall_at_10"] == 1.0


def test_what_no_seed_changes_is_the_same_with_every_seed(found: dict[str, Outcome]) -> None:
    for name in ("popularity", "text"):
        assert torch.equal(found[name].ndcg_SC[0], found[name].ndcg_SC[1])
    assert not torch.equal(found["id_only"].ndcg_SC[0], found["id_only"].ndcg_SC[1])


def test_the_table_holds_every_model_and_the_champion_s_lead_over_each(found: dict[str, Outcome]) -> None:
    slices_GC = cases()[0].slices_SC
    values, differences = bakeoff.compare_systems(found, slices_GC)
    assert set(values) == set(found)
    assert {row["against"] for row in differences} == set(found) - {"fused"}
    overall = {row["against"]: row for row in differences if row["slice"] == "overall"}
    expected = values["fused"]["overall"]["ndcg@10"] - values["id_only"]["overall"]["ndcg@10"]
    assert overall["id_only"]["value"] == pytest.approx(expected, abs=2e-5)
    assert overall["id_only"]["low"] <= overall["id_only"]["value"] <= overall["id_only"]["high"]
    lines = list(bakeoff.table(bakeoff.rows(found, values), values, differences, "fused"))
    assert len(lines) == 1 + len(found)
    assert all(any(line.split()[0] == name for line in lines) for name in found)


def test_weak_users_are_routed_and_the_ends_are_the_two_models(found: dict[str, Outcome]) -> None:
    told = bakeoff.routing(found, *cases(), ("text", "fused", "absent"))
    assert set(told["routes"]) == {"text"} and told["without_validation"] == 0
    values, _ = bakeoff.compare_systems(found, cases()[0].slices_SC)
    for row in told["routes"]["text"]:
        if row["share"] in (0.0, 1.0):
            end = values["fused" if row["share"] == 0 else "text"]["overall"]["ndcg@10"]
            assert row["ndcg"] == row["random"] == row["oracle"] == pytest.approx(end, abs=2e-5)
    assert set(told["weak"]) == {"length", "popularity", "sparsity", "validation"}


def outcome(*seeds: Tensor) -> Outcome:
    return Outcome(ndcg_SC=list(seeds), hr_SC=list(seeds), valid_SC=list(seeds))


def test_equal_models_differ_by_nothing_and_a_sure_lead_is_told() -> None:
    ndcg_C = torch.rand(200, generator=torch.Generator().manual_seed(0))
    slices_GC = torch.zeros(len(SLICES), 200, dtype=torch.bool)
    slices_GC[SLICES.index("overall")] = True
    slices_GC[SLICES.index("cold"), :5] = True
    models = {"fused": outcome(ndcg_C, ndcg_C), "twin": outcome(ndcg_C, ndcg_C), "worse": outcome(ndcg_C - 0.1, ndcg_C - 0.1)}
    values, differences = bakeoff.compare_systems(models, slices_GC)
    rows = {(row["against"], row["slice"]): row for row in differences}
    assert (rows["twin", "overall"]["low"], rows["twin", "overall"]["high"]) == (0, 0)
    assert rows["worse", "overall"]["low"] == pytest.approx(0.1, abs=1e-4)
    # five users are too few to tell, and a slice without any has no row
    assert rows["worse", "cold"]["low"] is None and rows["worse", "cold"]["n"] == 5
    assert ("worse", "tail") not in rows and "tail" not in values["fused"]


def test_seeds_are_part_of_the_noise() -> None:
    ndcg_C = torch.rand(400, generator=torch.Generator().manual_seed(0))
    slices_GC = torch.zeros(len(SLICES), 400, dtype=torch.bool)
    slices_GC[0] = True
    steady = {"fused": outcome(ndcg_C, ndcg_C), "other": outcome(ndcg_C - 0.01, ndcg_C - 0.01)}
    shaky = {"fused": outcome(ndcg_C, ndcg_C), "other": outcome(ndcg_C + 0.05, ndcg_C - 0.07)}
    spans = []
    for models in (steady, shaky):
        row = bakeoff.compare_systems(models, slices_GC)[1][0]
        spans.append(row["high"] - row["low"])
    assert spans[1] > 0.05 > spans[0]


def test_unknown_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"bakeoff.systems names 'best': there are id_only, text"):
        bakeoff.held(kit, ("best",), (0,), *cases(), None)
    with pytest.raises(ValueError, match=r"bakeoff.champion 'best' is none of the systems that were made: fused"):
        bakeoff.compare_systems({"fused": outcome(torch.zeros(3))}, torch.ones(len(SLICES), 3, dtype=torch.bool), "best")


def test_a_book_with_more_entries_than_items_is_refused_by_count() -> None:
    large = dataclasses.replace(SMALL, codes=dataclasses.replace(SMALL.codes, entries=256))
    made = Kit(events(), {"main": texts()}, ["x"] * ITEMS, large, seed=0, unseen=True)
    with pytest.raises(ValueError, match="120 items have 120 different vectors, a book has 256 entries"):
        next(iter(FAMILY["codes"](made)))
    assert not math.isnan(made.once("n", lambda: 1.0)[0])
