"""The recommender and its artifact: every id its own vector, cold items projected, equal scores after a reload."""

from pathlib import Path

import pytest
import torch

from models.behaviour.artifact import load_recommender, save_recommender
from models.behaviour.items import IdItems, MlpAdapter, NullSpaceItems, ResidualItems, TextItems
from models.behaviour.llm_esr import DualItems
from models.behaviour.recommender import Backbone, Recommender, build_sequence, score
from models.behaviour.whitening import fit_whitening
from tests.models.tiny import scores_of

IDS = [f"i{number}" for number in range(30)]


def llm() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(30, 10).half()


def kept(path: Path, kind: str, name: str = "sasrec", turn_DD: torch.Tensor | None = None) -> tuple[Recommender, Path]:
    backbone = Backbone(name=name, width=8, max_len=5)  # type: ignore[arg-type]
    whitening = fit_whitening(llm(), 6)
    white = whitening(llm())
    torch.manual_seed(0)
    if kind == "id":
        items, described = IdItems(31, 8), {"kind": "id"}
    elif kind == "mlp":
        items, described = TextItems(white, MlpAdapter(6, 16, 8)), {"kind": "mlp", "hidden": 16}  # type: ignore[assignment]
    elif kind == "residual":
        items, described = ResidualItems(white, MlpAdapter(6, 16, 8), 8), {"kind": kind, "hidden": 16}  # type: ignore[assignment]
        items.learned.data[1:] = torch.randn(30, 8)  # type: ignore[union-attr,index,operator]
    elif kind == "llm_esr":
        items, described = DualItems(white, 16, 8), {"kind": "llm_esr", "hidden": 16}  # type: ignore[assignment]
    else:
        items, described = NullSpaceItems(white, 8, 3), {"kind": "null_space", "text_width": 3, "added": True}  # type: ignore[assignment]
        items.learned.data[1:] = torch.randn(30, 5)  # type: ignore[union-attr,index,operator]
    recommender = Recommender(items, build_sequence(backbone, kind)).eval()
    path.mkdir(exist_ok=True)
    save_recommender(
        path, recommender, item_ids=IDS, backbone=backbone, items=described,
        whitening=None if kind == "id" else whitening, turn_DD=turn_DD, meta={"encoder_id": "e1"},
    )  # fmt: skip
    return recommender, path


def test_the_last_item_has_its_own_vector_and_padding_alone_is_zero() -> None:
    table = IdItems(31, 8).table()
    assert (table == 0).all(1).nonzero().flatten().tolist() == [0]


def test_the_padding_row_takes_no_gradient() -> None:
    recommender = Recommender(IdItems(31, 8), build_sequence(Backbone(width=8, max_len=5)))
    scores_of(recommender, torch.tensor([[0, 0, 3]]))[:, 1:].sum().backward()
    grad = recommender.items.weight.grad
    assert grad[0].abs().max() == 0
    assert (grad[1:] != 0).any()


def test_padding_is_never_recommended() -> None:
    scores = scores_of(Recommender(IdItems(31, 8), build_sequence(Backbone(width=8, max_len=5))), torch.tensor([[0, 2]]))
    assert scores[:, 0].tolist() == [-torch.inf]
    assert scores[:, 1:].isfinite().all()


def test_scores_stay_float32_when_vectors_are_half() -> None:
    assert score(torch.randn(2, 4).bfloat16(), torch.randn(3, 4).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", ["sasrec", "gru4rec", "bert4rec"])
@pytest.mark.parametrize("kind", ["mlp", "residual", "null_space"])
def test_a_reloaded_recommender_gives_identical_scores(tmp_path: Path, kind: str, name: str) -> None:
    recommender, path = kept(tmp_path / "kept", kind, name)
    history = torch.tensor([[0, 0, 4, 9, 30], [1, 2, 3, 4, 5], [0, 0, 0, 0, 7]])
    with torch.no_grad():
        expected = scores_of(recommender, history)
    scores = []
    for _ in range(2):
        loaded = load_recommender(path)
        vectors = torch.cat([torch.zeros(1, 8), loaded.project(llm(), IDS)])
        scores.append(score(loaded.encode(vectors[history], history != 0), vectors))
    assert torch.equal(scores[0], scores[1])
    assert torch.allclose(scores[0], expected, atol=1e-4)


TURN_DD = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(5)))[0]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, "sasrec") for kind in ("mlp", "residual", "null_space", "llm_esr")] + [("mlp", "gru4rec"), ("mlp", "bert4rec")],
)
def test_turned_vectors_are_those_before_in_another_basis_and_rank_alike(tmp_path: Path, kind: str, name: str) -> None:
    history = torch.tensor([[0, 0, 4, 9, 30], [1, 2, 3, 4, 5], [0, 0, 0, 0, 7]])
    vectors, users, scores = [], [], []
    for turn_DD in (None, TURN_DD):
        _, path = kept(tmp_path / str(turn_DD is None), kind, name, turn_DD)
        loaded = load_recommender(path)
        vectors.append(torch.cat([torch.zeros(1, 8), loaded.project(llm(), IDS)]))
        users.append(loaded.encode(vectors[-1][history], history != 0))
        scores.append(score(users[-1], vectors[-1]))
    for plain, turned in (vectors, users):
        assert torch.allclose(plain @ TURN_DD, turned, atol=1e-5)
        assert not torch.allclose(plain, turned, atol=1e-2)
    assert torch.allclose(scores[0], scores[1], atol=1e-5)
    # scores apart by more than rounding keep their order
    ahead = scores[0][:, :, None] - scores[0][:, None, :]
    assert not bool(((ahead > 1e-4) & (scores[1][:, :, None] <= scores[1][:, None, :])).any())


@pytest.mark.parametrize("turn_DD", [TURN_DD * 1.1, TURN_DD[:4, :4]])
def test_a_turn_under_which_scores_would_change_is_refused(tmp_path: Path, turn_DD: torch.Tensor) -> None:
    _, path = kept(tmp_path / "kept", "mlp", turn_DD=turn_DD)
    with pytest.raises(ValueError, match="is damaged"):
        load_recommender(path)


def test_an_item_unseen_in_training_is_projected_from_its_text(tmp_path: Path) -> None:
    _, path = kept(tmp_path / "kept", "null_space")
    loaded = load_recommender(path)
    known, cold = loaded.project(llm()[[0, 0]], ["i0", "brand new"])
    torch.testing.assert_close(known[:3], cold[:3])
    assert cold.abs().max() > 0
    assert not torch.isclose(known[3:], cold[3:]).any()


def test_a_cold_item_beside_learned_ones_is_its_text_alone(tmp_path: Path) -> None:
    recommender, path = kept(tmp_path / "kept", "residual")
    known, cold = load_recommender(path).project(llm()[[0, 0]], ["i0", "brand new"])
    assert torch.allclose(known - cold, recommender.items.learned[1], atol=1e-5)  # type: ignore[union-attr,index]


def test_equal_texts_give_equal_vectors(tmp_path: Path) -> None:
    _, path = kept(tmp_path / "kept", "mlp")
    vectors = load_recommender(path).project(llm()[[4, 4]], ["i4", "its twin"])
    assert torch.allclose(vectors[0], vectors[1], atol=1e-5)


def test_a_teacher_keeps_its_table_and_projects_no_text(tmp_path: Path) -> None:
    recommender, path = kept(tmp_path / "kept", "id")
    loaded = load_recommender(path)
    assert torch.equal(loaded.table(), recommender.item_table())
    with pytest.raises(ValueError, match="ID-only recommender can't project"):
        loaded.project(llm(), IDS)


def test_embeddings_of_another_encoder_are_refused(tmp_path: Path) -> None:
    _, path = kept(tmp_path / "kept", "mlp")
    with pytest.raises(ValueError, match="7 wide, the recommender reads 10"):
        load_recommender(path).project(torch.randn(2, 7), IDS[:2])


def test_an_embedding_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    _, path = kept(tmp_path / "kept", "mlp")
    with pytest.raises(ValueError, match="not finite"):
        load_recommender(path).project(torch.full((1, 10), torch.nan), IDS[:1])


def test_the_artifact_holds_no_pickle_and_no_table_of_texts(tmp_path: Path) -> None:
    _, path = kept(tmp_path / "kept", "mlp")
    assert sorted(file.name for file in path.iterdir()) == ["item_ids.json", "recommender.json", "recommender.safetensors"]
    assert (path / "recommender.safetensors").stat().st_size < 20_000


def test_a_damaged_or_missing_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a recommender's folder"):
        load_recommender(tmp_path)
    _, path = kept(tmp_path / "kept", "mlp")
    described = (path / "recommender.json").read_text()
    (path / "recommender.json").write_text(described.replace('"hidden": 16', '"hidden": 17'))
    with pytest.raises(ValueError, match="is damaged"):
        load_recommender(path)
