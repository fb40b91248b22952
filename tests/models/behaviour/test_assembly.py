"""Assembly: which parts a recommender has, and that texts that mean nothing are left out."""

import dataclasses
from pathlib import Path

import pytest
import torch

from models.behaviour import counting
from models.behaviour.artifact import load_recommender, save_fused
from models.behaviour.assembly import CONTROLS, Fusion, Name, assemble
from models.behaviour.counting import Counting
from models.behaviour.fused import FusedRecommender
from models.behaviour.fusion import FAINT
from tests.models.behaviour.small_world import ITEMS, material, texts

SMALL = Fusion(text_width=5, counting_width=4)


@pytest.mark.parametrize("seed", [0, 1])
def test_text_that_tells_the_kind_is_kept_and_gains_more_than_its_controls(seed: int) -> None:
    assembled = assemble(dataclasses.replace(SMALL, parts=("llmemb", "text")), material(seed, llm_NE=texts(noise=0.2, seed=seed)))
    assert assembled.gains["text"] > max(assembled.gains[name] for name in CONTROLS) + 0.05
    assert "text" in {part.name for part in assembled.parts}
    assert assembled.found.relative["text"] > 0


def test_text_that_gains_no_more_than_its_controls_is_dropped() -> None:
    noise = torch.randn(ITEMS, 16, generator=torch.Generator().manual_seed(3))
    assembled = assemble(SMALL, material(llm_NE=noise))
    if assembled.gains["text"] <= max(0.0, *(assembled.gains[name] for name in CONTROLS)):
        assert "text" not in {part.name for part in assembled.parts} and assembled.found.relative["text"] == 0
    else:
        pytest.fail(f"texts of noise gained more than noise: {assembled.gains}")


@pytest.mark.parametrize("parts", [("counting", "text"), ("text", "counting", "llmemb")])
def test_a_new_item_has_a_vector_even_where_no_part_that_reads_text_is_worth_anything(
    tmp_path: Path, parts: tuple[Name, ...]
) -> None:
    noise = torch.randn(ITEMS, 16, generator=torch.Generator().manual_seed(3))
    given = material(llm_NE=noise)
    assembled = assemble(dataclasses.replace(SMALL, parts=parts, counting_width=40), given)
    assert assembled.gains["text"] <= max(0.0, *(assembled.gains[name] for name in CONTROLS))
    kept = "llmemb" if "llmemb" in parts else "text"
    assert {name: weight for name, weight in assembled.found.relative.items() if name != "counting"} == (
        {name: FAINT if name == kept else 0 for name in parts if name != "counting"}
    )
    save_fused(tmp_path, assembled.parts, assembled.found.weights, item_ids=given.item_ids, counts_V=given.counts_V,
               whitening=given.whitening, meta={})  # fmt: skip
    emb_ND = load_recommender(tmp_path).project(noise[:2], ["new", "newer"])
    assert bool(emb_ND.any(1).all())


@pytest.mark.parametrize("order", [("cooccurrence", "ease"), ("ease", "cooccurrence")])
def test_the_counting_table_that_does_best_on_validation_is_taken_whatever_its_place(order: tuple[Counting, ...]) -> None:
    given = material()
    some = dataclasses.replace(SMALL, parts=("counting",), counting_width=40)
    alone = {kind: assemble(dataclasses.replace(some, counting=(kind,)), given).found.alone["counting"] for kind in order}
    assembled = assemble(dataclasses.replace(some, counting=order), given)
    assert len(set(alone.values())) == 2
    assert assembled.counted == max(alone, key=lambda kind: alone[kind])
    assert assembled.found.alone["counting"] == pytest.approx(max(alone.values()))


def test_a_table_that_costs_too_much_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "DENSE", {"cpu": ITEMS - 1})
    some = dataclasses.replace(SMALL, parts=("counting",), counting=("ease", "transitions"))
    assert assemble(some, material()).counted == "transitions"
    with pytest.raises(ValueError, match="120 items are more than 119"):
        assemble(dataclasses.replace(some, counting=("ease",)), material())


def test_a_table_with_two_sides_serves_from_its_artifact_as_it_was_measured(tmp_path: Path) -> None:
    given = material()
    assembled = assemble(dataclasses.replace(SMALL, parts=("counting", "llmemb"), counting=("transitions",)), given)
    (part,) = (part for part in assembled.parts if part.name == "counting")
    save_fused(tmp_path, assembled.parts, assembled.found.weights, item_ids=given.item_ids, counts_V=given.counts_V,
               whitening=given.whitening, meta={})  # fmt: skip
    loaded = load_recommender(tmp_path)
    place = next(number for number, span in enumerate(loaded.parts) if span.name == "counting")
    assert isinstance(loaded, FusedRecommender)
    emb_BLD, valid_BL = torch.randn(2, 3, part.backbone.width), torch.ones(2, 3, dtype=torch.bool)
    user_BD = loaded.members[place].encode(emb_BLD, valid_BL)
    assert torch.equal(user_BD, part.sequence(emb_BLD, valid_BL)[:, -1])
    assert not user_BD[:, part.backbone.width // 2 :].any()


def test_without_a_teacher_there_is_no_collaborative_part() -> None:
    assembled = assemble(dataclasses.replace(SMALL, controls=False), material(teacher=False))
    assert "collaborative" not in assembled.found.relative


def test_llmemb_alone_is_itself() -> None:
    assembled = assemble(dataclasses.replace(SMALL, parts=("llmemb",)), material())
    assert [part.name for part in assembled.parts] == ["llmemb"]
    assert assembled.found.relative == {"llmemb": 1.0}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"parts": ()}, "at least one part"),
        ({"parts": ("text", "text")}, "each once"),
        ({"text_width": 0}, "at least 1"),
        ({"fades": (1.5,)}, r"in \(0, 1\]"),
        ({"shrink": ()}, "0 or more"),
        ({"counting": ()}, "at least one of cooccurrence"),
        ({"counting": ("svd",)}, "at least one of cooccurrence"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **wrong)
