"""The search of weights: what helps gets weight, what is noise gets none, and too few cases choose nothing."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.behaviour import fusion
from models.behaviour.data import train_counts
from models.behaviour.fusion import OPEN, Point, Sample, Scores, Search
from models.judge.metrics import by_rank, full_ranks
from tests.models.behaviour.small_world import EACH, ITEMS, events


def sample(seed: int = 0, *, unseen: bool = True) -> Sample:
    logs = events(seed)
    return fusion.sample_cases(logs, train_counts(logs), max_len=6, unseen=unseen, width=24)


def knows(cases: Sample, share: float, seed: int = 0) -> Scores:
    """A part that knows what comes next in a share of the cases, and is noise else."""
    generator = torch.Generator().manual_seed(seed)
    table_VD = F.pad(F.normalize(torch.randn(ITEMS, 32, generator=generator), dim=1), (0, 0, 1, 0))
    user_CD = F.normalize(torch.randn(len(cases.target_C), 32, generator=generator), dim=1)
    sure_C = torch.rand(len(cases.target_C), generator=generator) < share
    user_CD[sure_C] = F.normalize(user_CD[sure_C] + 2 * table_VD[cases.target_C[sure_C]], dim=1)
    return Scores(user_CD=user_CD, table_VD=table_VD)


def test_a_part_of_noise_gets_no_weight_and_two_that_know_different_cases_share_it() -> None:
    cases = sample()
    found = fusion.search(
        cases, {"collaborative": knows(cases, 0.6, 1), "llmemb": knows(cases, 0.6, 2), "counting": knows(cases, 0.0, 3)}
    )
    assert found.relative["counting"] == 0
    assert min(found.relative["collaborative"], found.relative["llmemb"]) > 0.2
    assert found.ndcg["overall"] > max(found.alone.values()) + 0.05
    assert found.curve[-1]["ndcg"] >= found.curve[0]["ndcg"]


def test_where_no_part_that_reaches_new_items_gains_the_first_of_them_stays_faintly_and_the_rest_keep_their_places() -> None:
    cases = sample()
    wrong = [dataclasses.replace(part, user_CD=-part.user_CD) for part in (knows(cases, 1.0, 2), knows(cases, 1.0, 3))]
    scores = {"counting": knows(cases, 0.9, 1), "text": wrong[0], "llmemb": wrong[1]}
    plain, found = fusion.search(cases, scores), fusion.search(cases, scores, reach=("graph", "llmemb", "text"))
    assert plain.relative == {"counting": 1.0, "text": 0, "llmemb": 0}
    assert found.relative == {"counting": 1.0, "text": 0, "llmemb": fusion.FAINT} and found.weights.scale["llmemb"] > 0
    assert found.ndcg["overall"] == pytest.approx(plain.ndcg["overall"], abs=0.005)
    assert found.curve[:-1] == plain.curve and found.curve[-1]["part"] == "llmemb" and found.curve[-1]["to"] == fusion.FAINT


def test_a_part_that_gains_is_not_joined_by_a_faint_one_and_a_barred_part_is_not_tried() -> None:
    cases = sample()
    scores = {"counting": knows(cases, 0.3, 1), "text": knows(cases, 0.9, 2), "llmemb": knows(cases, 0.0, 3)}
    reach = ("llmemb", "text")
    assert fusion.search(cases, scores, reach=reach).relative["llmemb"] == 0
    barred = fusion.search(cases, scores, barred="text", reach=reach)
    assert barred.relative["text"] == 0 and barred.relative["llmemb"] == fusion.FAINT and barred.relative["counting"] > 0


def test_a_part_that_is_alone_keeps_its_weight_even_where_it_does_worse_than_a_tie_of_all() -> None:
    cases = sample()
    worse = knows(cases, 1.0)
    found = fusion.search(cases, {"text": dataclasses.replace(worse, user_CD=-worse.user_CD)})
    assert found.relative["text"] > 0


def test_the_search_is_the_same_every_time() -> None:
    cases = sample()
    parts = {"collaborative": knows(cases, 0.5, 1), "text": knows(cases, 0.4, 2)}
    assert fusion.search(cases, parts).weights == fusion.search(cases, parts).weights


def test_a_weight_is_over_the_spread_of_the_parts_scores() -> None:
    cases = sample()
    plain, loud = knows(cases, 0.5, 1), knows(cases, 0.5, 2)
    loud = dataclasses.replace(loud, user_CD=loud.user_CD * 100)
    found = fusion.search(cases, {"collaborative": plain, "llmemb": loud})
    spread = float((loud.user_CD @ loud.table_VD[1:].T).std())
    assert found.weights.scale["llmemb"] == pytest.approx(found.relative["llmemb"] / spread, rel=0.05)


def test_too_few_cases_choose_nothing_and_say_so() -> None:
    cases = sample()
    few = dataclasses.replace(
        cases, input_CL=cases.input_CL[:9], target_C=cases.target_C[:9], had_CH=cases.had_CH[:9], group_C=cases.group_C[:9]
    )
    found = fusion.search(few, {"collaborative": knows(few, 0.9, 1), "text": knows(few, 0.0, 2)})
    assert "9 validation cases are too few" in found.note
    assert found.relative == {"collaborative": fusion.DEFAULTS["collaborative"], "text": fusion.DEFAULTS["text"]}


@pytest.mark.parametrize("unseen", [True, False])
def test_the_best_of_each_part_rank_as_the_whole_catalogue_does(unseen: bool) -> None:
    cases = sample(unseen=unseen)
    parts = {"collaborative": knows(cases, 0.6, 1), "llmemb": knows(cases, 0.3, 2)}
    run = Search(cases, parts)
    weight = (1.0, 0.6)
    scores_CV = sum(
        (
            w * (part.user_CD @ part.table_VD.T) / column.spread
            for w, part, column in zip(weight, parts.values(), run.columns, strict=True)
        ),
        torch.zeros(len(cases.target_C), ITEMS + 1),
    )
    scores_CV[:, 0] = -torch.inf
    masked_CV = torch.zeros_like(scores_CV, dtype=torch.bool).scatter_(1, cases.had_CH, True)
    masked_CV[:, 0] = False
    scores_CV.masked_fill_(masked_CV, -torch.inf)
    whole_C = by_rank(full_ranks(scores_CV, cases.target_C, masked_CV))["ndcg"]
    torch.testing.assert_close(run.ndcg_C(Point(weight, OPEN, (0.0, 0.0))), whole_C)


def test_every_validation_event_is_a_case_and_no_test_event() -> None:
    logs = events()
    cases = sample()
    at_N = (logs.position_N >= logs.train_end_U[logs.user_N]) & (logs.position_N < logs.valid_end_U[logs.user_N])
    assert sorted(cases.target_C.tolist()) == sorted(logs.items_N[at_N].tolist())


def test_centring_takes_away_what_all_users_have_in_common() -> None:
    """A common direction that points at popular items hides what a user wants; the search finds that and takes it away."""
    cases = sample()
    part = knows(cases, 0.9, 1)
    loud_D = part.table_VD[1 : EACH + 1].mean(0)
    hidden = dataclasses.replace(part, user_CD=part.user_CD + 6 * loud_D)
    plain = fusion.search(cases, {"collaborative": hidden})
    centred = fusion.search(cases, {"collaborative": hidden}, centred=["collaborative"])
    assert centred.weights.centre["collaborative"] > 0
    assert centred.ndcg["overall"] > plain.ndcg["overall"] + 0.02


def test_gates_raise_text_where_it_knows_more() -> None:
    cases = sample()
    generator = torch.Generator().manual_seed(5)
    rare_C = cases.band_V[cases.target_C] == 0
    assert int(rare_C.sum()) >= fusion.LEAST_IN_BAND

    def only(some_C: Tensor, seed: int) -> Scores:
        part = knows(cases, 0.0, seed)
        user_CD = part.user_CD.clone()
        user_CD[some_C] = F.normalize(user_CD[some_C] + part.table_VD[cases.target_C[some_C]], dim=1)
        return dataclasses.replace(part, user_CD=user_CD)

    parts = {"collaborative": only(~rare_C, 1), "text": only(rare_C & (torch.rand(len(rare_C), generator=generator) < 0.9), 2)}
    gated, plain = fusion.search(cases, parts), fusion.search(cases, parts, gated=False)
    assert plain.weights.gates == OPEN
    assert gated.weights.gates[0] >= 1.0
    assert gated.ndcg["cold"] >= plain.ndcg["cold"]


def test_each_ranking_with_other_weights_is_told_once() -> None:
    told: list[int] = []
    cases = dataclasses.replace(sample(), tried=lambda: told.append(1))
    run = Search(cases, {"text": knows(cases, 0.5)})
    for weight in (1.0, 2.0, 1.0):
        run.value(Point((weight,), OPEN, (0.0,)))
    assert len(told) == 2
