"""The one builder of item sources: the same source for a training and for the artifact that it leaves."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
import torch

from jobs.rat.config import Config
from models.behaviour.item_sources import SOURCES, build_items

WHITE_NK = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
MORE = {"hidden": 7, "text_width": 3, "added": True, "unit": True, "books": 2, "entries": 4}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_built_without_texts_takes_up_the_weights_of_one_that_was_trained_and_projects_alike(kind: str) -> None:
    torch.manual_seed(0)
    trained = build_items({"kind": kind} | MORE, 8, len(WHITE_NK), WHITE_NK)
    for value in trained.state_dict().values():
        value.copy_(torch.randn(value.shape))
    kept = build_items({"kind": kind} | MORE, 8, len(WHITE_NK), WHITE_NK[:0])
    kept.load_state_dict(trained.state_dict())
    row_N = torch.tensor([5, 1, 0])
    if kind == "id":
        with pytest.raises(ValueError, match="ID-only"):
            kept.project(WHITE_NK[:3], row_N)
        assert torch.equal(kept.table(), trained.table())
        return
    found_ND = kept.project(WHITE_NK[:3], row_N)
    assert torch.equal(found_ND, trained.project(WHITE_NK[:3], row_N))
    assert found_ND.shape == (3, 8)
    assert len({tuple(row) for row in found_ND.tolist()}) > 1


def test_every_adapter_that_a_recipe_may_name_has_its_source() -> None:
    assert set(get_args(get_type_hints(Config)["adapter"])) <= set(SOURCES)


def test_an_artifact_from_before_added_text_reads_as_it_was_written() -> None:
    old: dict[str, Any] = {"kind": "null_space", "text_width": 3}
    was, now = build_items(old, 8, 5, WHITE_NK), build_items(old | {"added": True}, 8, 5, WHITE_NK)
    assert (was.added, was.unit, now.added) == (False, False, True)
    assert not torch.equal(was.table(), now.table())


def test_training_alone_drops_id_parts() -> None:
    assert build_items({"kind": "residual"} | MORE, 8, 5, WHITE_NK, 0.4).drop == 0.4
    assert build_items({"kind": "residual"} | MORE, 8, 5, WHITE_NK[:0]).drop == 0.0


def test_a_kind_of_a_newer_version_is_named() -> None:
    with pytest.raises(ValueError, match="'wavelet' is not one of id, mlp"):
        build_items({"kind": "wavelet"}, 8, 5)
