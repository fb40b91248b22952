"""Assembly: which parts a recommender has, and that texts that mean nothing are left out."""

import dataclasses

import pytest
import torch

from models.behaviour.assembly import CONTROLS, Fusion, assemble
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
        assert "text" not in {part.name for part in assembled.parts} and "text" not in assembled.found.relative
    else:
        pytest.fail(f"texts of noise gained more than noise: {assembled.gains}")


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
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **wrong)
