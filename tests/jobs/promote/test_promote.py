"""promote: a challenger passes paired gates, is refused with figures, or waits for a person; aliases move as one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from safetensors.numpy import save_file

from jobs import promote
from jobs.engines import registry
from jobs.lake import artifacts
from jobs.lake.tables import space_of
from jobs.run import InputError, Refused, Run, Unavailable
from tests.jobs.small_lake import remember
from tests.jobs.small_registry import fresh, kept

SLICES = ("overall", "cold", "tail", "head", "short")


@pytest.fixture(autouse=True)
def bare_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers versions without logging the model, which takes a second each; test_registry does it in full."""

    def add_version(model: str, artifact: Path, code: Path, tags: dict[str, str]) -> str:
        client = mlflow.MlflowClient()
        with contextlib.suppress(mlflow.exceptions.MlflowException):  # there already
            client.create_registered_model(model)
        known = {**tags, **registry.identity(artifact), "artifact_id": artifact.name}
        return str(client.create_model_version(model, str(artifact), tags=known).version)

    monkeypatch.setattr(registry, "add_version", add_version)


USERS, SERVED = 2000, 600
"""Of each slice, and those of them whom the challenger serves."""
Others = tuple[int, int]
"""Of a model beside the challenger: how many that it serves this model misses, and how many others this model serves."""
EQUAL, WORSE, UNSURE, BETTER = (0, 0), (0, 400), (550, 600), (300, 0)


def evaluated(
    run: Run,
    challenger: Path,
    champion_id: str = "",
    leaking: bool = False,
    reference_id: str = "",
    floor: Others = BETTER,
    few: str = "",
    **changed: Others,
) -> None:
    """Writes an evaluation in which everything is well but what is `changed`, by slice, `reference_SLICE` for the reference; the
    slice `few` has four users."""
    others: dict[str, dict[str, Others]] = {"popularity": {"overall": floor}}
    if champion_id:
        others["champion"] = {name: changed.get(name, EQUAL) for name in SLICES}
    if reference_id:
        others["reference"] = {name: changed.get(f"reference_{name}", EQUAL) for name in SLICES}
    result = {
        "recommender_id": challenger.name, "encoder_id": "e" * 16, "champion_id": champion_id, "differences": [], "values": {},
        "leaking": leaking, "leak": {"r2": 0.7}, "outputs": {"metrics": "digest"}, "reference_id": reference_id,
        "outcomes_id": outcomes(run, others, few),
    }  # fmt: skip
    remember(run, "evaluate", result)


def outcomes(run: Run, others: dict[str, dict[str, Others]], few: str = "") -> str:
    """An artifact of outcomes: each slice has users of its own, with one event each."""
    user, per_model = np.arange(USERS), {name: [] for name in ("llmemb", *others)}  # type: dict[str, list[Any]]
    for slice_ in SLICES:
        per_model["llmemb"].append(user < SERVED)
        for model, by_slice in others.items():
            missed, more = by_slice.get(slice_, EQUAL)
            per_model[model].append((user >= missed) & (user < SERVED + more))
    slices_SC = np.repeat(np.eye(len(SLICES), dtype=bool), USERS, axis=1)
    if few:
        slices_SC[SLICES.index(few), np.flatnonzero(slices_SC[SLICES.index(few)])[4:]] = False
    staged = artifacts.stage(run.lake, "outcomes")
    ndcg_KC = np.stack([np.concatenate(found) for found in per_model.values()]).astype(np.float32)
    tensors = {"user_C": np.arange(USERS * len(SLICES), dtype=np.int32), "slices_SC": slices_SC, "ndcg_KC": ndcg_KC}
    save_file(tensors, staged / "outcomes.safetensors")
    (staged / "outcomes.json").write_text(json.dumps({"models": list(per_model), "slices": SLICES, "metric": "ndcg@10"}))
    return artifacts.keep(run.lake, "outcomes", staged)


def judge(run: Run, **more: Any) -> promote.Result:
    return promote.run(promote.Config(run=run, **more))


def aliases(run: Run) -> dict[str, str]:
    found = {alias: registry.by_alias(run, alias) for alias in registry.ALIASES if alias != "reference"}
    return {alias: model["recommender_id"] for alias, model in found.items() if model}


def decisions(run: Run) -> list[tuple[str, str, list[str]]]:
    """(decision, recommender, gates that failed) of every decision on record, newest first."""
    with registry.connected(run) as client:
        found = client.search_runs([client.get_experiment_by_name(run.experiment).experiment_id], "tags.job = 'promote'")
        records = [json.loads(mlflow.artifacts.load_text(f"runs:/{entry.info.run_id}/decision.json")) for entry in found]
    failed = [[reason["gate"] for reason in record["reasons"] if reason["verdict"] == "failed"] for record in records]
    return [(record["decision"], record["recommender_id"], gates) for record, gates in zip(records, failed, strict=True)]


def test_an_evaluation_of_another_date_is_not_judged(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    evaluated(run, kept(run, 0))
    with pytest.raises(InputError, match=r"newest evaluation is of 2026-01-01, not of 2026-01-05"):
        judge(dataclasses.replace(run, ds="2026-01-05"))
    assert aliases(run) == {}


def crowned(run: Run) -> Path:
    """A recommender that was promoted on an earlier night."""
    first = kept(run, 0)
    evaluated(run, first)
    judge(run)
    return first


def test_the_first_challenger_that_beats_the_floor_becomes_champion(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first = kept(run)
    evaluated(run, first)
    result = judge(run)
    assert (result.decision, result.recommender_id, result.champion_id) == ("promoted", first.name, "")
    assert result.space_id == space_of("e" * 16, first.name)
    assert aliases(run) == {"champion": first.name}


def test_a_better_challenger_moves_champion_and_previous_together(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first, second = crowned(run), kept(run, 1)
    evaluated(run, second, first.name)
    assert judge(run).decision == "promoted"
    assert aliases(run) == {"champion": second.name, "previous": first.name}


def test_the_version_that_is_promoted_bears_its_model_card(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first = crowned(run)
    champion = registry.champion(run)
    assert champion
    with registry.connected(run) as client:
        text = client.get_model_version(registry.RECOMMENDER, champion["version"]).description
    assert text.startswith(f"# Recommender {first.name}") and "**promoted**" in text


def test_promoting_again_changes_nothing_and_gives_the_same_result(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first, second = crowned(run), kept(run, 1)
    evaluated(run, second, first.name)
    once = judge(run)
    with registry.connected(run) as client:
        count = len(client.search_runs([client.get_experiment_by_name(run.experiment).experiment_id]))
    assert judge(run) == once
    assert aliases(run) == {"champion": second.name, "previous": first.name}
    with registry.connected(run) as client:
        assert len(client.search_runs([client.get_experiment_by_name(run.experiment).experiment_id])) == count


@pytest.mark.parametrize("slice_", ["overall", "tail", "cold", "short"])
def test_a_loss_in_any_guarded_slice_is_refused_with_its_figures(tmp_path: Path, slice_: str) -> None:
    run = fresh(tmp_path)
    first, second = crowned(run), kept(run, 1)
    evaluated(run, second, first.name, **{slice_: WORSE})  # type: ignore[arg-type]
    with pytest.raises(
        Refused, match=rf"not worse on {slice_}: keeps 0\.600 of NDCG \(96 % .* to .*\), 2,000 users, .* may lose"
    ):
        judge(run, approved_by="someone", overruled_by="someone")  # a name does not overrule a gate that failed
    assert aliases(run) == {"champion": first.name, "challenger": second.name}


def test_a_loss_in_a_slice_that_is_not_guarded_passes(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first, second = crowned(run), kept(run, 1)
    evaluated(run, second, first.name, head=WORSE)
    assert judge(run).decision == "promoted"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"few": "cold"}, r"too little to tell \(4 users"),
        (
            {"cold": UNSURE},
            r"2,000 users, .* 1,150 users differ; may lose 0\.1: for an equal challenger to pass takes about \d,\d\d\d users",
        ),
    ],
)
def test_a_slice_that_cant_tell_waits_for_a_person_who_then_answers_for_it(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    run = fresh(tmp_path)
    first, second = crowned(run), kept(run, 1)
    evaluated(run, second, first.name, **change)
    waiting = judge(run)
    assert waiting.decision == "undecided"
    assert waiting.outputs == {}
    [reason] = [reason for reason in waiting.reasons if reason.verdict == "undecided"]
    assert reason.gate == "not worse on cold"
    assert re.search(why, reason.text)
    assert aliases(run) == {"champion": first.name, "challenger": second.name}
    approved = judge(run, approved_by="Ada")
    assert (approved.decision, approved.approved_by) == ("promoted", "Ada")
    assert aliases(run) == {"champion": second.name, "previous": first.name}
    assert judge(run) == dataclasses.replace(approved, approved_by="")  # decided is decided


def test_where_a_person_is_always_asked_nothing_is_promoted_by_itself_and_a_loss_stays_refused(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first = crowned(run)
    good, bad = kept(run, 1), kept(run, 2)
    evaluated(run, good, first.name)
    result = judge(run, always_ask=True)
    assert result.decision == "undecided"
    assert [reason.gate for reason in result.reasons if reason.verdict != "passed"] == ["a person's yes"]
    assert aliases(run) == {"champion": first.name, "challenger": good.name}
    assert judge(run, always_ask=True, approved_by="Ada").decision == "promoted"
    assert judge(run, always_ask=True).decision == "promoted", "who is champion already is not asked about again"
    evaluated(run, bad, good.name, reference_id=first.name, overall=WORSE)
    with pytest.raises(Refused, match="not worse on overall"):
        judge(run, always_ask=True, approved_by="Ada")
    assert aliases(run)["champion"] == good.name


def test_the_margin_is_a_share_of_the_champions_value(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first, second = crowned(run), kept(run, 1)
    evaluated(run, second, first.name, tail=(150, 180))
    assert judge(run, margins={"tail": 0.05}).decision == "undecided"
    assert judge(run, margins={"tail": 0.15}).decision == "promoted"


@pytest.mark.parametrize(("floor", "verdict"), [((0, 200), "failed"), ((10, 10), "failed"), ((20, 10), "undecided")])
def test_a_challenger_that_does_not_beat_a_floor_waits_for_a_person_who_overrules_it_on_record(
    tmp_path: Path, floor: Others, verdict: str
) -> None:
    """A floor that no first champion can beat would else lock every one out for good."""
    run = fresh(tmp_path)
    first = kept(run)
    evaluated(run, first, floor=floor)
    waiting = judge(run)
    assert (waiting.decision, waiting.reasons[0].gate, waiting.reasons[0].verdict) == ("undecided", "above popularity", verdict)
    if verdict == "failed":  # who takes what can't be told upon themselves has not overruled what can
        assert judge(run, approved_by="Ada").decision == "undecided"
    assert "champion" not in aliases(run)
    assert judge(run, approved_by="Ada", overruled_by="Ada").decision == "promoted"
    assert aliases(run) == {"champion": first.name}
    with registry.connected(run) as client:
        [found] = client.search_runs([client.get_experiment_by_name(run.experiment).experiment_id], "tags.overruled_by = 'Ada'")
    assert found.data.tags["decision"] == "promoted"


def reference(run: Run) -> str:
    """The recommender that the alias names."""
    found = registry.by_alias(run, "reference")
    return found["recommender_id"] if found else ""


def test_the_first_champion_stays_the_reference_until_a_person_names_another(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first, second, third = crowned(run), kept(run, 1), kept(run, 2)
    assert reference(run) == first.name
    evaluated(run, second, first.name)
    judge(run)
    assert reference(run) == first.name
    evaluated(run, third, second.name, reference_id=first.name)
    judge(run, reference_by="Ada")
    assert reference(run) == third.name


def test_a_registry_older_than_references_takes_its_champion_for_one(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first, second = crowned(run), kept(run, 1)
    registry.set_aliases(run, [("reference", None)])
    evaluated(run, second, first.name)
    judge(run)
    assert reference(run) == first.name


def test_small_losses_of_many_nights_are_refused_against_the_reference(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first, second, third = crowned(run), kept(run, 1), kept(run, 2)
    evaluated(run, second, first.name)
    judge(run)
    evaluated(run, third, second.name, reference_id=first.name, reference_tail=WORSE)
    with pytest.raises(Refused, match=r"no drift on tail: keeps 0\.600"):
        judge(run, approved_by="Ada", overruled_by="Ada")
    assert judge(run, reference_times=0).decision == "promoted"


def test_an_evaluation_of_another_date_is_not_taken_for_this_one(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    evaluated(run, kept(run))
    with pytest.raises(
        InputError, match=r"is of 2026-01-01, not of 2026-01-02: run evaluate for 2026-01-02, or promote with --ds"
    ):
        judge(dataclasses.replace(run, ds="2026-01-02"))


def test_embeddings_that_leak_popularity_wait_for_a_person(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    evaluated(run, kept(run), leaking=True)
    waiting = judge(run)
    assert waiting.decision == "undecided"
    assert "R2 0.700" in waiting.reasons[-1].text


def test_every_decision_is_a_record_with_its_reasons(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first, second = crowned(run), kept(run, 1)
    evaluated(run, second, first.name, cold=WORSE)
    with pytest.raises(Refused):
        judge(run)
    with registry.connected(run) as client:
        found = client.search_runs([client.get_experiment_by_name(run.experiment).experiment_id], "tags.decision = 'refused'")
        assert [entry.data.tags["recommender_id"] for entry in found] == [second.name]
        record = json.loads(mlflow.artifacts.load_text(f"runs:/{found[0].info.run_id}/decision.json"))
    assert record["champion_id"] == first.name
    assert [reason["gate"] for reason in record["reasons"] if reason["verdict"] == "failed"] == ["not worse on cold"]
    assert record["reasons"][2]["text"].startswith("keeps 1.000 of NDCG")


def test_killed_between_two_aliases_and_run_again_it_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh(tmp_path)
    first, second = crowned(run), kept(run, 1)
    evaluated(run, second, first.name)
    for survived in range(4):
        real = registry.set_aliases

        def killed(run: Run, moves: list[tuple[str, str | None]], survived: int = survived, real: Any = real) -> None:
            real(run, moves[:survived])
            raise KeyboardInterrupt

        monkeypatch.setattr(registry, "set_aliases", killed)
        with pytest.raises(KeyboardInterrupt):
            judge(run)
        monkeypatch.setattr(registry, "set_aliases", real)
        assert (aliases(run)["champion"] == first.name) == (survived < 3)
    assert judge(run).decision == "promoted"
    assert aliases(run) == {"champion": second.name, "previous": first.name}


def test_an_evaluation_against_a_champion_of_before_is_refused(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first, second, third = crowned(run), kept(run, 1), kept(run, 2)
    evaluated(run, second, first.name)
    judge(run)
    evaluated(run, third, first.name)
    with pytest.raises(Refused, match=f"compared with {first.name}, but {second.name} is champion now: run evaluate again"):
        judge(run, approved_by="Ada")  # who said so days ago did not know the new one
    assert aliases(run) == {"champion": second.name, "previous": first.name, "challenger": third.name}
    assert decisions(run)[0] == ("refused", third.name, ["same champion"])


def overlapping(run: Run) -> tuple[Path, tuple[Run, Path], tuple[Run, Path]]:
    """A champion, and two runs that each hold a challenger measured against it."""
    first = crowned(run)
    pairs = [(dataclasses.replace(run, ds=f"2026-01-0{day}"), kept(run, day)) for day in (2, 3)]
    for later, challenger in pairs:
        evaluated(later, challenger, first.name)
    return first, *pairs


def test_of_two_promotions_at_once_one_waits_and_is_refused_for_the_champion_that_the_other_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh(tmp_path)
    first, (one, second), (other, third) = overlapping(run)
    real, moving, go_on = registry.set_aliases, threading.Event(), threading.Event()

    def slow(*given: Any) -> None:
        moving.set()
        go_on.wait(30)
        real(*given)

    monkeypatch.setattr(registry, "set_aliases", slow)
    with ThreadPoolExecutor(2) as pool:
        winner = pool.submit(judge, one)
        assert moving.wait(30)
        with pytest.raises(Unavailable, match=r"promotion is under way already \(process \d+ on .*, since 20.*\): run again"):
            judge(other, wait_s=0.1)
        loser = pool.submit(judge, other)
        go_on.set()
        assert winner.result().decision == "promoted"
        with pytest.raises(Refused, match=f"{second.name} is champion now"):
            loser.result()
    assert aliases(run) == {"champion": second.name, "previous": first.name, "challenger": third.name}


def test_a_champion_that_comes_in_between_without_the_lock_is_found_by_looking_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh(tmp_path)
    first, (one, second), (other, third) = overlapping(run)
    real = promote.recorded

    def meanwhile(*given: Any) -> str:
        monkeypatch.setattr(promote, "recorded", real)
        promote.decide(promote.Config(run=other))
        return real(*given)

    monkeypatch.setattr(promote, "recorded", meanwhile)
    with pytest.raises(Refused, match=f"compared with {first.name}, but {third.name} is champion now"):
        judge(one)
    assert aliases(run) == {"champion": third.name, "previous": first.name, "challenger": second.name}
    assert decisions(run)[0] == ("refused", second.name, ["same champion"])


def test_a_backfill_does_not_put_an_older_model_in_the_champions_place(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first, (older, second), (newer, third) = overlapping(run)
    assert judge(newer).decision == "promoted"
    evaluated(older, second, third.name)
    with pytest.raises(Refused, match="the champion was trained on 2026-01-03, 2026-01-02 is older"):
        judge(older)
    assert aliases(run) == {"champion": third.name, "previous": first.name, "challenger": second.name}


def test_a_registry_that_lost_its_aliases_is_not_taken_for_a_first_night(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first, second = crowned(run), kept(run, 1)
    registry.set_aliases(run, [("champion", None)])
    evaluated(run, second)
    waiting = judge(run)
    assert (waiting.decision, waiting.reasons[-1].gate) == ("undecided", "champion known")
    assert f"{first.name} was promoted once" in waiting.reasons[-1].text
    assert judge(run, approved_by="Ada").decision == "promoted"
    assert aliases(run) == {"champion": second.name}


def test_a_challenger_that_a_person_turns_down_is_rejected_on_record(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    first, second = crowned(run), kept(run, 1)
    evaluated(run, second, first.name, few="cold")
    assert judge(run).decision == "undecided"
    rejected = judge(run, rejected_by="Ada")
    assert (rejected.decision, rejected.rejected_by, rejected.outputs) == ("rejected", "Ada", {})
    assert aliases(run) == {"champion": first.name, "challenger": second.name}
    assert [decision for decision, *_ in decisions(run)] == ["rejected", "undecided", "promoted"]
    with pytest.raises(InputError, match="leave one empty"):
        judge(run, approved_by="Ada", rejected_by="Bob")


def test_without_a_registry_or_an_evaluation_there_is_nothing_to_promote(tmp_path: Path) -> None:
    run = fresh(tmp_path)
    with pytest.raises(InputError, match="tracking_uri"):
        judge(dataclasses.replace(run, tracking_uri=""))
    with pytest.raises(InputError, match="python -m jobs evaluate"):
        judge(run)


@pytest.mark.parametrize("change", [{"floors": ("beauty",)}, {"margins": {"nowhere": 0.1}}])
def test_a_floor_or_slice_that_was_not_evaluated_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    run = fresh(tmp_path)
    first, second = crowned(run), kept(run, 1)
    evaluated(run, second, first.name)
    with pytest.raises(InputError, match=r"beauty|nowhere"):
        judge(run, **change)


def test_settings_that_judge_nothing_are_refused(tmp_path: Path) -> None:
    for margin in (-0.1, 1.0):
        with pytest.raises(InputError, match=r"promote\.margins\.cold is"):
            promote.Config(run=fresh(tmp_path), margins={"cold": margin})
    with pytest.raises(InputError, match="nothing would be judged"):
        promote.Config(run=fresh(tmp_path), margins={}, floors=())
