"""MoC's books: what they tell, that they are all used, and that an item's codes depend on nothing but its vector."""

import dataclasses

import pytest
import torch

from models.behaviour import codes
from models.behaviour.code_figures import error
from models.behaviour.codes import Books, Codes, different_up_to, fit_books, least_squares, revive, started

SMALL = Codes(books=2, entries=8, epochs=20, batch=64)


def vectors(items: int = 400, width: int = 6, seed: int = 0) -> torch.Tensor:
    """Items around twelve places, as catalogues are."""
    generator = torch.Generator().manual_seed(seed)
    place_PD = 3 * torch.randn(12, width, generator=generator)
    return place_PD[torch.arange(items) % 12] + 0.3 * torch.randn(items, width, generator=generator)


def test_training_makes_codes_tell_more_than_they_did_at_the_start() -> None:
    emb_ND = vectors()
    config = Codes(books=2, entries=8, epochs=40, batch=64, apart=True, learning_rate=3e-3)
    assert told(emb_ND, config) < 0.9  # .8


@pytest.mark.parametrize("seed", [0, 1])
def test_choosing_and_least_squares_in_turn_make_jointly_chosen_codes_tell_more(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # without places of their own, so that no start finds them all
    emb_ND = torch.randn(1500, 24, generator=torch.Generator().manual_seed(seed))
    config = Codes(books=4, entries=16)
    whole = told(emb_ND, config)  # .93
    assert whole < 0.97
    monkeypatch.setattr(codes, "NOISE", 0.0)
    assert whole < told(emb_ND, config) < 1


def told(emb_ND: torch.Tensor, config: Codes) -> float:
    """Error after training over the error at the start."""
    before, after = started(emb_ND, config, torch.Generator().manual_seed(0)), fit_books(emb_ND, config, seed=0)
    return error(emb_ND, after.decode(after.encode(emb_ND))) / error(emb_ND, before.decode(before.encode(emb_ND)))


def test_where_books_choose_apart_the_start_is_product_quantisation_in_turned_directions() -> None:
    emb_ND = vectors()
    books = started(emb_ND, Codes(books=2, entries=8, apart=True), torch.Generator().manual_seed(0))
    assert books.head_KDD is not None
    projections = books.head_KDD.detach()
    torch.testing.assert_close(projections.sum(0), torch.eye(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(projections @ projections, projections, atol=1e-5, rtol=0)
    shares = books.heads(emb_ND).detach().square().sum((1, 2))
    assert float(shares.max() / shares.min()) < 4  # the strongest directions are dealt out in turns


def test_where_books_choose_jointly_the_start_is_residual_k_means() -> None:
    emb_ND = vectors()
    books = started(emb_ND, SMALL, torch.Generator().manual_seed(0))
    left_ND = books.sized(emb_ND)
    for book in range(2):
        entry_CD = books.entry_KCD[book]
        code_N = codes.nearest(left_ND, entry_CD)
        assert torch.equal(books.encode(emb_ND, 1)[:, book], code_N)
        left_ND = left_ND - entry_CD[code_N]
    torch.testing.assert_close(
        books.sized(books.decode(books.encode(emb_ND, 1))), books.sized(emb_ND) - left_ND, atol=1e-4, rtol=0
    )


def test_a_wider_beam_tells_more_and_one_that_follows_all_ways_is_exact() -> None:
    emb_ND = vectors()
    books = fit_books(emb_ND, SMALL, seed=0)
    errors = [error(emb_ND, books.decode(books.encode(emb_ND, beam))) for beam in (1, 8, SMALL.entries**SMALL.books)]
    assert errors[2] <= errors[1] <= errors[0] and errors[2] < errors[0]
    # every pair of codes, tried one by one
    every_MK = torch.cartesian_prod(torch.arange(SMALL.entries), torch.arange(SMALL.entries))
    read_MD = books.decode(every_MK)
    best_N = torch.cdist(emb_ND, read_MD).argmin(1)
    assert error(emb_ND, read_MD[best_N]) == pytest.approx(errors[2], rel=1e-5)


def test_least_squares_find_the_entries_that_made_the_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    true_KCD = torch.randn(2, 4, 6, generator=generator)
    code_NK = torch.randint(4, (400, 2), generator=generator)
    sized_ND = true_KCD[0, code_NK[:, 0]] + true_KCD[1, code_NK[:, 1]]
    found_KCD = least_squares(sized_ND, code_NK, torch.zeros(2, 4, 6))
    read_ND = found_KCD[0, code_NK[:, 0]] + found_KCD[1, code_NK[:, 1]]
    torch.testing.assert_close(read_ND, sized_ND, atol=0.02, rtol=0)
    # an entry that nobody took stays
    apart_KCD = least_squares(sized_ND, code_NK.clamp_max(2), true_KCD)
    torch.testing.assert_close(apart_KCD[:, 3], true_KCD[:, 3])


def small_books(*, heads: bool) -> Books:
    """Vectors of one number, entries 0 and 4, 0 and 1; read is twice the mean, plus a half."""
    books = Books(2, 2, 1, heads=heads)
    if books.head_KDD is not None:
        books.head_KDD.data.fill_(1.0)
    books.entry_KCD.data.copy_(torch.tensor([[[0.0], [4.0]], [[0.0], [1.0]]]))
    books.decoder.weight.data.fill_(2.0)
    books.decoder.bias.data.fill_(0.5)
    return books


def test_codes_by_hand() -> None:
    # apart: 3 is nearest to 4 and to 1, whatever is read of both: 2 * (4 + 1) / 2 + .5
    apart = small_books(heads=True)
    assert apart.encode(torch.tensor([[3.0]])).tolist() == [[1, 1]]
    assert float(apart.decode(torch.tensor([[1, 1]]))) == 5.5
    # jointly: of 3.2 what 4 + .5 leaves is -1.3, so the second book takes 0; 0 + 1 + .5 would be farther
    jointly = small_books(heads=False)
    assert jointly.encode(torch.tensor([[3.2]])).tolist() == [[1, 0]]
    assert float(jointly.decode(torch.tensor([[1, 0]]))) == 4.5


def test_a_second_way_mends_what_the_first_book_chose_too_early() -> None:
    books = Books(2, 2, 1)
    # of 5, the first book takes 4 and leaves 1, for which the second has nothing; 2 + 3 would be exact
    books.entry_KCD.data.copy_(torch.tensor([[[4.0], [2.0]], [[3.0], [10.0]]]))
    books.decoder.weight.data.fill_(2.0)
    books.decoder.bias.data.zero_()
    assert books.encode(torch.tensor([[5.0]]), 1).tolist() == [[0, 0]]
    assert books.encode(torch.tensor([[5.0]]), 2).tolist() == [[1, 0]]


def test_codes_of_an_item_do_not_depend_on_who_stands_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    emb_ND = vectors()
    books = fit_books(emb_ND, SMALL, seed=0)
    whole_NK = books.encode(emb_ND)
    monkeypatch.setattr(codes, "CHUNK", 7)
    assert torch.equal(books.encode(emb_ND), whole_NK)
    assert torch.equal(books.encode(emb_ND[100:101]), whole_NK[100:101])


def test_equal_settings_make_equal_books() -> None:
    emb_ND = vectors()
    one, other = (fit_books(emb_ND, SMALL, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    different = fit_books(emb_ND, SMALL, seed=4).state_dict()
    assert not torch.equal(one["entry_KCD"], different["entry_KCD"])


@pytest.mark.parametrize("apart", [False, True])
def test_a_dead_entry_comes_to_life_where_items_are_badly_described(apart: bool) -> None:
    emb_ND = vectors()
    books = started(emb_ND, Codes(books=2, entries=8, apart=apart), torch.Generator().manual_seed(0))
    far_D = torch.full((6,), 100.0)
    books.entry_KCD.data[0, 3] = far_D
    assert 3 not in books.encode(emb_ND)[:, 0]
    errors = [error(emb_ND, books.decode(books.encode(emb_ND)))]
    used_KC = torch.ones(2, 8)
    used_KC[0, 3] = 0
    assert revive(books, emb_ND, used_KC, torch.Generator().manual_seed(0)) == 1
    assert not torch.equal(books.entry_KCD[0, 3], far_D)
    assert 3 in books.encode(emb_ND)[:, 0]
    errors.append(error(emb_ND, books.decode(books.encode(emb_ND))))
    assert apart or errors[1] < errors[0]
    assert revive(books, emb_ND, torch.ones(2, 8), torch.Generator()) == 0


def test_after_training_no_book_is_dead() -> None:
    emb_ND = vectors()
    books = fit_books(emb_ND, SMALL, seed=0)
    assert all(len(torch.unique(code_N)) >= 7 for code_N in books.encode(emb_ND).T)


def test_fewer_items_than_entries_and_identical_items_are_refused_by_count() -> None:
    with pytest.raises(ValueError, match=r"7 items have 7 different vectors, a book has 8 entries: set entries lower"):
        fit_books(vectors(7), SMALL, seed=0)
    with pytest.raises(ValueError, match="1,000 items have 5 different vectors, a book has 8 entries"):
        fit_books(vectors(5).repeat(200, 1), SMALL, seed=0)
    # as many as are never looked at together
    with pytest.raises(ValueError, match="35,000 items have 7 different vectors, a book has 8 entries"):
        fit_books(vectors(7).repeat(5000, 1), SMALL, seed=0)
    # what is read of them counts
    with pytest.raises(ValueError, match="6 items have 6 different vectors, a book has 8 entries"):
        fit_books(vectors(), dataclasses.replace(SMALL, sample=6), seed=0)


def test_a_different_vector_far_behind_thousands_of_identical_ones_is_found() -> None:
    emb_ND = torch.cat([vectors(1).repeat(5000, 1), vectors(9, seed=3)])
    assert all(different_up_to(emb_ND, wanted) >= wanted for wanted in (1, 2, 10))
    assert different_up_to(emb_ND, 11) == 10 and different_up_to(emb_ND[:5001], 3) == 2


def test_many_identical_items_beside_enough_others_get_the_same_codes() -> None:
    emb_ND = torch.cat([vectors(60), vectors(1).repeat(2000, 1)])
    books = fit_books(emb_ND, SMALL, seed=0)
    code_NK = books.encode(emb_ND)
    assert len(torch.unique(code_NK[60:], dim=0)) == 1


def test_vectors_of_another_width_and_strange_values_are_refused() -> None:
    books = fit_books(vectors(), SMALL, seed=0)
    with pytest.raises(ValueError, match="vectors are 5 wide, the books read 6"):
        books.encode(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="not finite"):
        books.encode(torch.full((1, 6), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        fit_books(torch.cat([vectors(), torch.full((1, 6), torch.inf)]), SMALL, seed=0)


@pytest.mark.parametrize("wrong", [{"books": 0}, {"entries": 1}, {"entries": 70_000}, {"batch": 0}])
def test_settings_that_make_no_codes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="codes"):
        Codes(**wrong)  # type: ignore[arg-type]
