"""A recommender of parts: one vector, one dot product, and each part can be told from the sum."""

from pathlib import Path

import pytest
import torch

from models.behaviour.artifact import load_recommender, save_fused
from models.behaviour.assembly import Fusion, Material, centres, part_options
from models.behaviour.fused import BANDS, FusedRecommender, Weights
from tests.models.behaviour.small_world import COLD, ITEMS, material, texts

GATES = (2.0, 0.5, 1.0, 1.4)
SCALE = {"collaborative": 1.5, "llmemb": 0.7, "text": 2.0, "counting": 0.3}


def kept(path: Path, given: Material, weights: Weights | None = None) -> FusedRecommender:
    """All four parts with weights of the test's own, through the artifact."""
    config = Fusion(text_width=5, counting_width=4)
    parts = [next(iter(part_options(config, given, name, given.white_NK).values())) for name in SCALE]
    path.mkdir(exist_ok=True)
    save_fused(path, parts, weights or Weights(scale=SCALE, gates=GATES), item_ids=given.item_ids, counts_V=given.counts_V,
               whitening=given.whitening, centres={}, meta={"encoder_id": "e"})  # fmt: skip
    loaded = load_recommender(path)
    assert isinstance(loaded, FusedRecommender)
    return loaded


@pytest.fixture
def given() -> Material:
    return material()


def test_the_vector_is_the_parts_side_by_side_and_the_score_is_the_sum_of_theirs(tmp_path: Path, given: Material) -> None:
    fused = kept(tmp_path / "kept", given)
    emb_ND = fused.project(texts(), given.item_ids)
    assert emb_ND.shape == (ITEMS, fused.width)
    history_BL = torch.tensor([[0, 0, 3, 9, 4, 7], [21, 22, 23, 24, 25, 26]])
    table_VD = torch.nn.functional.pad(emb_ND, (0, 0, 1, 0))
    user_BD = fused.encode(table_VD[history_BL], history_BL != 0)
    carried = fused.carried(user_BD, emb_ND[:2])
    assert set(carried) == {part.name for part in fused.parts}
    torch.testing.assert_close(sum(carried.values()), (user_BD * emb_ND[:2]).sum(1))
    for number, (part, member) in enumerate(zip(fused.parts, fused.members, strict=True)):
        alone_BD = member.encode(table_VD[history_BL][..., part.start : part.stop], history_BL != 0)
        torch.testing.assert_close(user_BD[:, part.start : part.stop], fused.scale[number] * alone_BD)
        some_BD = fused.encode_some(table_VD[history_BL], history_BL != 0, part.start, part.stop)
        torch.testing.assert_close((some_BD * emb_ND[:2]).sum(1), carried[part.name])


def test_other_weights_change_users_and_leave_every_item_vector(tmp_path: Path, given: Material) -> None:
    one = kept(tmp_path / "one", given)
    two = kept(tmp_path / "two", given, Weights(scale={name: 3 * value for name, value in SCALE.items()}, gates=GATES))
    assert torch.equal(one.project(texts(), given.item_ids), two.project(texts(), given.item_ids))


def test_gates_go_by_train_events_and_turn_no_history(tmp_path: Path, given: Material) -> None:
    gated = kept(tmp_path / "gated", given)
    plain = kept(tmp_path / "plain", given, Weights(scale=SCALE))
    text = next(part for part in gated.parts if part.name == "text")
    emb, without = (one.project(texts(), given.item_ids)[:, text.start : text.stop] for one in (gated, plain))
    bands = torch.bucketize(given.counts_V[1:], torch.tensor(BANDS), right=True)
    torch.testing.assert_close(emb, without * torch.tensor(GATES)[bands][:, None])
    assert int(bands[COLD[0] - 1]) == 0
    whole = [torch.nn.functional.pad(one.project(texts(), given.item_ids), (0, 0, 1, 0)) for one in (gated, plain)]
    history_BL = torch.tensor([[2, 3, COLD[0], 5, 6, 7]])
    one_BD, two_BD = (
        one.encode(table_VD[history_BL], history_BL != 0)[:, text.start : text.stop]
        for one, table_VD in zip((gated, plain), whole, strict=True)
    )
    torch.testing.assert_close(one_BD, two_BD)


def test_an_item_that_was_never_met_has_its_text_its_prediction_and_no_counts(tmp_path: Path, given: Material) -> None:
    fused = kept(tmp_path / "kept", given)
    spans = {part.name: slice(part.start, part.stop) for part in fused.parts}
    known, new = (fused.project(texts()[COLD[0] - 1 : COLD[0]], [name]) for name in (given.item_ids[COLD[0] - 1], "never met"))
    for name, columns in spans.items():
        torch.testing.assert_close(known[:, columns], new[:, columns], msg=name)
    assert not new[:, spans["counting"]].any()


def test_an_item_that_turned_warm_since_keeps_its_prediction_until_the_next_training(tmp_path: Path, given: Material) -> None:
    fused = kept(tmp_path / "kept", given)
    twice = [fused.project(texts()[:1], ["came later"]) for _ in range(2)]
    assert torch.equal(*twice) and bool(twice[0].isfinite().all())


def test_texts_of_another_width_are_refused_by_name(tmp_path: Path, given: Material) -> None:
    fused = kept(tmp_path / "kept", given)
    with pytest.raises(ValueError, match="LLM embeddings are 7 wide, the recommender reads 16: embed with its encoder e"):
        fused.project(torch.randn(2, 7), ["a", "b"])
    with pytest.raises(ValueError, match="not finite"):
        fused.project(torch.full((1, 16), torch.nan), ["a"])


def test_a_part_whose_tensors_do_not_fit_is_damage_and_said(tmp_path: Path, given: Material) -> None:
    kept(tmp_path / "kept", given)
    meta = tmp_path / "kept" / "recommender.json"
    meta.write_text(meta.read_text().replace('"width": 5', '"width": 4'))
    with pytest.raises(ValueError, match="is damaged"):
        load_recommender(tmp_path / "kept")


def test_a_fused_recommender_has_no_table_of_its_own(tmp_path: Path, given: Material) -> None:
    fused = kept(tmp_path / "kept", given)
    with pytest.raises(ValueError, match="keeps no item table"):
        fused.table()


def test_centres_are_turned_as_their_parts_are() -> None:
    turn_DD = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))).Q
    shares, means = {"collaborative": 0.5}, {"collaborative": torch.randn(8), "llmemb": torch.randn(8)}
    mean_D = means["collaborative"]
    torch.testing.assert_close(centres(shares, means, {}), {"collaborative": 0.5 * mean_D})
    torch.testing.assert_close(centres(shares, means, {"collaborative": turn_DD}), {"collaborative": 0.5 * mean_D @ turn_DD})


def test_a_user_without_any_event_has_a_finite_vector(tmp_path: Path, given: Material) -> None:
    loaded = kept(tmp_path, given)
    emb_BLD, valid_BL = torch.zeros(2, 3, loaded.width), torch.zeros(2, 3, dtype=torch.bool)
    assert loaded.encode(emb_BLD, valid_BL).isfinite().all()
