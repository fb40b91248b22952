"""rerank: a report with and without the LLM, on lists of a recommender of the lake; nothing that serves changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import rat, rerank
from jobs.run import InputError, Run
from models.behaviour.assembly import Fusion
from models.behaviour.recommender import Backbone
from models.behaviour.training import Training
from models.text.rerank import Distilling
from tests.jobs.small_lake import make, remember
from tests.models import tiny


@pytest.fixture(scope="module")
def recommended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A small lake after `rat`, and a base."""
    run = make(tmp_path_factory.mktemp("lake"))
    settings = rat.Config(run=run, teacher="none", hidden=8, backbone=Backbone(width=8, max_len=6),
                          fusion=Fusion(parts=("llmemb",)), training=Training(epochs=1, batch=8))  # fmt: skip
    remember(run, "rat", rat.run(settings))
    return run, tiny.llama(tmp_path_factory.mktemp("base"), tie_word_embeddings=True)


def config(recommended: tuple[Run, Path], **more: Any) -> rerank.Config:
    run, base = recommended
    known = {
        "recommender": "latest",
        "base": str(base),
        "top": 5,
        "users": 8,
        "distilling": Distilling(tokens=2, steps=2, batch=2),
    }
    return rerank.Config(run=run, **{**known, **more})


def test_the_report_has_every_way_beside_the_recommender_s_own_order(recommended: tuple[Run, Path]) -> None:
    before = {path for path in recommended[0].lake.rglob("*") if path.is_file()}
    result = rerank.run(config(recommended))
    assert set(result.ndcg) == set(rerank.WAYS) and set(result.differences) == set(rerank.WAYS) - {"recommender"}
    assert result.ndcg["oracle"] == result.in_list >= max(result.ndcg.values()) - 1e-9
    assert result.users == 8 and result.mix in rerank.MIXES
    assert {path for path in recommended[0].lake.rglob("*") if path.is_file()} == before


def test_without_soft_tokens_it_is_the_plain_prompt(recommended: tuple[Run, Path]) -> None:
    result = rerank.run(config(recommended, distilling=Distilling(tokens=0)))
    assert result.ndcg["soft"] == result.ndcg["plain"] and result.tokens == 0


def test_lists_longer_than_what_users_have_not_had_are_told_in_full(recommended: tuple[Run, Path]) -> None:
    """Twenty items, seven of which each user has had: thirteen are left, whatever the length of a list."""
    result = rerank.run(config(recommended, top=20))
    assert result.in_list == result.ndcg["oracle"] == 1.0
    assert all(0 < value <= 1 for value in result.ndcg.values())
    assert result.ndcg == rerank.run(config(recommended, top=13)).ndcg


def test_equal_runs_give_equal_figures(recommended: tuple[Run, Path]) -> None:
    one, other = (rerank.run(config(recommended)) for _ in range(2))
    assert one.ndcg == other.ndcg and one.differences == other.differences


def test_what_can_not_be_asked_is_refused(recommended: tuple[Run, Path]) -> None:
    with pytest.raises(InputError, match="top must be at least 2"):
        config(recommended, top=1)
    with pytest.raises(InputError, match="recommender 0000000000000000 is not in the lake"):
        rerank.run(config(recommended, recommender="0" * 16))
