"""MoC's books: what they tell, that they are all used, and that an item's codes depend on nothing but its vector."""

import pytest
import torch

from models.behaviour import codes
from models.behaviour.codes import Books, Codes, fit_books, revive, started
from models.behaviour.code_figures import error

SMALL = Codes(books=2, entries=8, epochs=20, batch=64)


def vectors(items: int = 400, width: int = 6, seed: int = 0) -> torch.Tensor:
    """Items around twelve places, as catalogues are."""
    generator = torch.Generator().manual_seed(seed)
    place_PD = 3 * torch.randn(12, width, generator=generator)
    return place_PD[torch.arange(items) % 12] + 0.3 * torch.randn(items, width, generator=generator)


@pytest.mark.parametrize("sweeps", [0, 3])
def test_training_makes_codes_tell_more_than_they_did_at_the_start(sweeps: int) -> None:
    emb_ND = vectors()
    config = Codes(books=2, entries=8, epochs=40, batch=64, sweeps=sweeps, learning_rate=3e-3)
    before = started(emb_ND, config, torch.Generator().manual_seed(0))
    after = fit_books(emb_ND, config, seed=0)
    errors = [error(emb_ND, books.decode(books.encode(emb_ND, sweeps))) for books in (before, after)]
    assert errors[1] < 0.8 * errors[0]


def test_the_start_is_product_quantisation_in_turned_directions() -> None:
    emb_ND = vectors()
    books = started(emb_ND, SMALL, torch.Generator().manual_seed(0))
    projections = books.head_KDD.detach()
    torch.testing.assert_close(projections.sum(0), torch.eye(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(projections @ projections, projections, atol=1e-5, rtol=0)
    shares = books.heads(emb_ND).square().sum((1, 2))
    assert float(shares.max() / shares.min()) < 3  # the strongest directions are dealt out in turns


def test_sweeps_never_tell_less() -> None:
    emb_ND = vectors()
    books = fit_books(emb_ND, SMALL, seed=0)
    errors = [error(emb_ND, books.decode(books.encode(emb_ND, sweeps))) for sweeps in range(4)]
    assert errors == sorted(errors, reverse=True) and errors[3] < errors[0]


def test_the_error_of_a_code_is_the_one_by_hand() -> None:
    books = Books(2, 2, 1)
    books.head_KDD.data.fill_(1.0)
    books.entry_KCD.data.copy_(torch.tensor([[[0.0], [4.0]], [[0.0], [1.0]]]))
    books.decoder.weight.data.fill_(2.0)
    books.decoder.bias.data.fill_(0.5)
    # by heads: 3 is nearest to 4 and to 1; decoded 2 * (4 + 1) / 2 + .5 = 5.5
    assert books.encode(torch.tensor([[3.0]]), 0).tolist() == [[1, 1]]
    assert float(books.decode(torch.tensor([[1, 1]]))) == 5.5
    # 4.5 (codes 1, 0) lies nearer to 3 than 5.5, 1.5 (codes 0, 1) is as near: the first book chooses first
    swept = books.encode(torch.tensor([[3.0]]), 3)
    assert abs(float(books.decode(swept)) - 3.0) == 1.5


def test_codes_of_an_item_do_not_depend_on_who_stands_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    emb_ND = vectors()
    books = fit_books(emb_ND, SMALL, seed=0)
    whole_NK = books.encode(emb_ND, 3)
    monkeypatch.setattr(codes, "CHUNK", 7)
    assert torch.equal(books.encode(emb_ND, 3), whole_NK)
    assert torch.equal(books.encode(emb_ND[100:101], 3), whole_NK[100:101])


def test_equal_settings_make_equal_books() -> None:
    emb_ND = vectors()
    one, other = (fit_books(emb_ND, SMALL, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    different = fit_books(emb_ND, SMALL, seed=4).state_dict()
    assert not torch.equal(one["entry_KCD"], different["entry_KCD"])


def test_a_dead_entry_is_put_where_an_item_is_badly_described() -> None:
    emb_ND = vectors()
    books = started(emb_ND, SMALL, torch.Generator().manual_seed(0))
    far = 100 * torch.ones_like(books.entry_KCD[0, 0])
    books.entry_KCD.data[0, 3] = far
    used_KC = torch.ones(2, 8)
    used_KC[0, 3] = 0
    assert revive(books, emb_ND, used_KC, torch.Generator().manual_seed(0)) == 1
    assert not torch.equal(books.entry_KCD[0, 3], far)
    z_ND = books.heads(emb_ND)[0]
    assert float((z_ND - books.entry_KCD[0, 3]).norm(dim=1).min()) < 1e-5
    taken = codes.nearest(z_ND, books.entry_KCD[0])
    assert 3 in taken


def test_after_training_no_book_is_dead() -> None:
    emb_ND = vectors()
    books = fit_books(emb_ND, SMALL, seed=0)
    assert all(len(torch.unique(code_N)) >= 7 for code_N in books.encode(emb_ND, 0).T)


def test_fewer_items_than_entries_and_identical_items_are_refused_by_count() -> None:
    with pytest.raises(ValueError, match="7 items have 7 different vectors, a book has 8 entries: set codes.entries lower"):
        fit_books(vectors(7), SMALL, seed=0)
    with pytest.raises(ValueError, match="1,000 items have 5 different vectors, a book has 8 entries"):
        fit_books(vectors(5).repeat(200, 1), SMALL, seed=0)


def test_many_identical_items_beside_enough_others_get_the_same_codes() -> None:
    emb_ND = torch.cat([vectors(60), vectors(1).repeat(2000, 1)])
    books = fit_books(emb_ND, SMALL, seed=0)
    code_NK = books.encode(emb_ND, 3)
    assert len(torch.unique(code_NK[60:], dim=0)) == 1


def test_vectors_of_another_width_and_strange_values_are_refused() -> None:
    books = fit_books(vectors(), SMALL, seed=0)
    with pytest.raises(ValueError, match="vectors are 5 wide, the books read 6"):
        books.encode(torch.zeros(2, 5), 0)
    with pytest.raises(ValueError, match="not finite"):
        books.encode(torch.full((1, 6), torch.nan), 0)
    with pytest.raises(ValueError, match="not finite"):
        fit_books(torch.cat([vectors(), torch.full((1, 6), torch.inf)]), SMALL, seed=0)


@pytest.mark.parametrize("wrong", [{"books": 0}, {"entries": 1}, {"entries": 70_000}, {"sweeps": -1}])
def test_settings_that_make_no_codes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="codes"):
        Codes(**wrong)  # type: ignore[arg-type]
