"""The model card says what is recorded, and that the rest is unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.lake import manifests
from jobs.lake.partitions import write_json
from jobs.promote import model_card

DS = "2026-03-10"
DECISION = {
    "decision": "promoted", "recommender_id": "c" * 16, "encoder_id": "e" * 16, "space_id": "5" * 16, "champion_id": "d" * 16,
    "approved_by": "Ada", "reasons": [{"gate": "not worse on tail", "verdict": "undecided", "text": "borderline"}],
}  # fmt: skip


def difference(against: str, slice_: str, value: float, *, told: bool = True) -> dict[str, Any]:
    ends = {"low": value - 0.01, "high": value + 0.01} if told else {"low": None, "high": None}
    return {"against": against, "slice": slice_, "value": value, "n": 40, **ends}


JUDGED: dict[str, Any] = {
    "differences": [difference("repeat_markov_popularity", "overall", -0.05), difference("champion", "cold", 0.1, told=False)],
    "leak": {"r2": 0.7}, "leaking": True, "outputs": {"metrics": "a" * 64},
}  # fmt: skip


def test_the_card_tells_the_decision_the_fields_the_table_and_the_limits(tmp_path: Path) -> None:
    encoder = tmp_path / "models" / "encoder" / ("e" * 16) / "encoder.json"
    encoder.parent.mkdir(parents=True)
    policy = {"allow": ["title", "genre"], "block": ["stars", "rank"], "admit": ["rank"]}
    encoder.write_text(json.dumps({"base": "embedded", "lora": {"r": 8}, "policy": policy}))
    extract = {"rows": {"items": 7, "interactions": 30, "sequences": 3}, "cuts": {"valid": "2026-02-01", "test": "2026-02-20"},
               "outputs": {"items/ds=2026-03-10": "1" * 64}}  # fmt: skip
    manifest = {"job": "extract", "ds": DS, "status": "done", "code_revision": "c0de", "result": extract}
    write_json(manifests.path_of(tmp_path, DS, "extract"), manifest)
    card = model_card.card(tmp_path, DS, DECISION, JUDGED)
    for told in (
        "**promoted**, approved by Ada, in place of dddddddddddddddd.",
        "The LLM reads: title, genre. Refused, as they tell popularity of the whole period: stars.",
        "7 items, 30 events, 3 users",
        "Validation begins at 2026-02-01, test at 2026-02-20",
        "- not worse on tail: undecided (borderline)",
        "| repeat_markov_popularity | overall | -0.0500 | -0.0600 to -0.0400 | 40 |",
        "| champion | cold | +0.1000 | too few users to tell | 40 |",
        "- Not judged, too few users: cold.",
        "- Worse than repeat_markov_popularity overall.",
        "R2 0.7000: a field leaks",
        "SCFT: LoRA r 8",
        f"items/ds=2026-03-10 `{'1' * 64}`",
    ):
        assert told in card, told


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"lora": None}, "SCFT: none, the base model as it is, best step 0 of 0."),
        ({"lora": None, "suffix_tokens": 4}, "SCFT: 4 learned suffix tokens, best"),
        ({"lora": {"r": 4}, "attention": "both"}, "SCFT: LoRA r 4, attention both ways, best"),
        ({"lora": None, "attention": "both"}, "SCFT: none, attention both ways, best"),
    ],
)
@pytest.mark.parametrize(
    ("verdict", "told"),
    [
        ("better", "ranks better than its base model (by .01)"),
        ("no different", "ranks no differently from its base model, which would do as well (by .01)"),
        ("base", "ranks as its base model, which it is (by .01)"),
        ("unknown", "ranks beside its base model nobody knows how (by .01)"),
    ],
)
def test_the_card_tells_how_the_encoder_was_made_and_whether_its_base_would_do_as_well(
    tmp_path: Path, spec: dict[str, Any], said: str, verdict: str, told: str
) -> None:
    encoder = tmp_path / "models" / "encoder" / ("e" * 16) / "encoder.json"
    encoder.parent.mkdir(parents=True)
    encoder.write_text(json.dumps({"base": "embedded", **spec}))
    result = {"encoder_id": "e" * 16, "best_step": 0, "steps": 0, "worth": {"verdict": verdict, "why": "by .01"}}
    manifest = {"job": "scft", "ds": DS, "status": "done", "result": result}
    write_json(manifests.path_of(tmp_path, DS, "scft"), manifest)
    card = model_card.card(tmp_path, DS, DECISION, JUDGED)
    assert said in card and told in card


def test_a_turn_towards_the_space_before_is_told_with_its_residual(tmp_path: Path) -> None:
    assert "Turned" not in model_card.card(tmp_path, DS, DECISION, JUDGED)
    described = tmp_path / "models" / "recommender" / ("c" * 16) / "recommender.json"
    described.parent.mkdir(parents=True)
    described.write_text(json.dumps({"rotation": {"to": "d" * 16, "residual": 0.45, "cosine": 0.89}}))
    card = model_card.card(tmp_path, DS, DECISION, JUDGED)
    assert f"towards the space of recommender {'d' * 16}: residual 0.45, mean cosine 0.89." in card


def test_what_is_not_recorded_is_said_to_be_unknown(tmp_path: Path) -> None:
    card = model_card.card(tmp_path, DS, {**DECISION, "champion_id": "", "approved_by": ""}, {"differences": []})
    assert "**promoted**, as the first champion." in card
    assert "Snapshot of unknown: unknown items" in card
    assert "popularity of the whole period: unknown" in card
