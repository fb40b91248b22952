"""report: a page for every night, whatever of it is there, with the verdict on top."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jobs import report
from jobs.lake import artifacts, manifests, nights
from jobs.report import drift, openlineage, plots
from jobs.report.drift import Bounds
from jobs.report.facts import Facts
from jobs.report.page import page
from jobs.report.spaces import serving, spaces_of
from jobs.run import InputError, Run, as_json
from tests.jobs.report.small_night import DS, EVIL, SPACE, difference, family, record, results, shown, tables, tell, whole_night


def test_a_whole_night_is_good_and_every_part_is_there(tmp_path: Path) -> None:
    whole_night(tmp_path)
    result, html = tell(tmp_path)
    text = shown(html)
    assert (result.state, result.points) == ("good", ())
    assert "All 10 jobs done, nothing to worry about; the challenger became champion; 40 items of 2026-03-10 serve." in text
    assert html.count("can't be drawn") == 0
    for part in (
        "item records seen 43", "items: no attributes 3", "95 % intervals", "SCFT: loss", "NDCG@10 0.2000", "head 10.0%",
        "Base LLM", "After SCFT", "Served", "all 40 items", "coverage of the logs 1.0000", "explain.item=ID",
        "ranking without any training it is: no different (over 120 users)",
        "NDCG@10 without any training, overall 0.0319 0.0321",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize("last", ["extract", "embed", "evaluate", "project", "publish"])
def test_a_night_that_failed_half_way_has_its_page_and_names_the_job(tmp_path: Path, last: str) -> None:
    tables(tmp_path)
    for job, found in results().items():
        if job == last:
            record(tmp_path, job, None, status="failed", error=f"ValueError: {EVIL}")
            break
        record(tmp_path, job, found)
    result, html = tell(tmp_path)
    assert result.state == "bad"
    assert any(point.startswith(f"{last} failed: ValueError") for point in result.points)
    assert "jobs failed" in shown(html)
    assert "can't be drawn" not in html


def test_a_night_whose_extract_failed_in_an_empty_lake_has_its_page(tmp_path: Path) -> None:
    record(tmp_path, "extract", None, status="failed", error="no such table")
    result, html = tell(tmp_path)
    assert result.state == "bad"
    assert "the lake has no items yet" in html


def test_a_refusal_by_a_gate_is_to_be_looked_at_and_says_what_goes_on_serving(tmp_path: Path) -> None:
    whole_night(tmp_path, "2026-03-09")
    whole_night(tmp_path)
    record(tmp_path, "promote", None, status="refused", error="not worse on tail: NDCG -0.03")
    manifests.path_of(tmp_path, DS, "publish").unlink()
    result, _ = tell(tmp_path)
    assert result.state == "look"
    assert "promote was refused by a gate: not worse on tail: NDCG -0.03" in result.points
    assert "the night is unfinished: publish has not run" in result.points
    assert "the snapshot of 2026-03-09 goes on serving" in result.verdict


def test_a_challenger_below_a_floor_is_to_be_looked_at_even_when_promoted(tmp_path: Path) -> None:
    whole_night(tmp_path)
    judged = results()["evaluate"]
    judged["differences"].append(difference("repeat_markov_popularity", "overall", -0.05))
    record(tmp_path, "evaluate", judged)
    result, _ = tell(tmp_path)
    assert result.state == "look"
    assert result.points == ("the challenger is worse than repeat_markov_popularity: NDCG -0.0500 (95 % -0.0700 to -0.0300)",)


def test_after_a_rollback_the_age_is_that_of_the_space_that_serves_again(tmp_path: Path) -> None:
    whole_night(tmp_path)
    record(tmp_path, "rollback", {"serves_ds": "2026-03-07"})
    assert "What serves is the snapshot of 2026-03-07: 3 days behind this night." in shown(tell(tmp_path)[1])


def test_markup_in_titles_errors_and_reasons_stays_text(tmp_path: Path) -> None:
    whole_night(tmp_path, genres=(EVIL, "$\\frac{1}$"))
    extract = results()["extract"]
    extract["quarantined"] = {f"items: {EVIL}": 2}
    record(tmp_path, "extract", extract)
    record(tmp_path, "lookup", None, status="failed", error=EVIL)
    _, html = tell(tmp_path)
    assert "&lt;script&gt;window.evil = 1&lt;/script&gt;" in html
    assert EVIL in json.loads(re.search(r'(?s)id="titles">(.*?)</script>', html)[1])["titles"]  # type: ignore[index]


def test_ten_thousand_categories_and_reasons_are_readable(tmp_path: Path) -> None:
    tables(tmp_path, count=300, genres=tuple(f"genre {number}" for number in range(10_000)))
    for job, result in results(300).items():
        record(tmp_path, job, result)
    extract = results(300)["extract"]
    extract["quarantined"] = {f"items: reason {number}": number for number in range(10_000)}
    extract["fill"] = {f"attribute {number}": 1.0 for number in range(10_000)}
    record(tmp_path, "extract", extract)
    _, html = tell(tmp_path, category="genre", map_items=200)
    assert "The first 30 of 10,000 rows." in html
    assert html.count("<option") == 9, "all, the seven commonest, and the rest"
    assert len(html) < 600_000


def test_a_page_lists_the_ids_of_all_items_it_names(tmp_path: Path) -> None:
    whole_night(tmp_path, count=400)
    _, html = tell(tmp_path, map_items=50)
    data = json.loads(re.search(r'(?s)id="titles">(.*?)</script>', html)[1])  # type: ignore[index]
    named = {f"Film {item[1:]}" for item in data["named"]} | {EVIL}
    assert set(re.findall(r"Film \d+", html)) <= named
    assert len(named) < 200


@pytest.mark.parametrize(
    ("wrong", "state"),
    [
        ("{", "bad"),
        ("[1]", "bad"),
        ('{"result": 3}', "bad"),
        ('{"result": {"seen": 3, "rows": [], "history": "x"}, "status": "done", "seconds": 1}', "good"),
    ],
)
def test_manifests_of_another_shape_cost_their_part_not_the_page(tmp_path: Path, wrong: str, state: str) -> None:
    whole_night(tmp_path)
    for job in ("extract", "evaluate", "rat"):
        manifests.path_of(tmp_path, DS, job).write_text(wrong)
    result, html = tell(tmp_path)
    assert result.state == state
    assert "Map of the embeddings" in html


@pytest.mark.parametrize("job", results())
def test_no_value_of_a_manifest_costs_the_page_or_the_events(tmp_path: Path, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("forest", "bars", "curves", "over_nights"):
        monkeypatch.setattr(plots, kind, lambda *_, **__: "")
    runs = {
        name: {"job": name, "status": "done", "seconds": 1.0, "config": {}, "result": found} for name, found in results().items()
    }
    for key in (*runs[job]["result"], "status", "seconds", "started_at", "config", "result", "earlier", "error"):
        for odd in ("x", [1], [{"a": 1}], {"a": "b"}, {"items": None}, float("inf"), 10**400):
            own = runs[job]
            changed = {**own, key: odd} if key not in own["result"] else {**own, "result": {**own["result"], key: odd}}
            night = nights.Night(
                ds=DS,
                runs=tuple(nights.JobRun(name=name, job=name, manifest=changed if name == job else runs[name]) for name in runs),
            )
            serving_ds, space_id = serving([night])
            config = report.Config(run=Run(ds=DS, lake=tmp_path))
            values = report.measure(config, night, spaces_of(tmp_path, night, [night]), [], None)
            facts = Facts(
                night=night, before=(night,), measures=drift.judge(values, [values] * 6, Bounds()), views=None, why_no_views="",
                gpu_hour_price=1.0, serving_ds=serving_ds, space_id=space_id,
            )  # fmt: skip
            assert "</html>" in page(facts)
            assert len(list(openlineage.events(night, "llmemb"))) == 2 * len(runs)


def test_shards_are_counted_together_and_hide_nothing(tmp_path: Path) -> None:
    whole_night(tmp_path)
    manifests.path_of(tmp_path, DS, "embed").unlink()
    for shard in range(40):
        record(tmp_path, f"embed-{shard:05d}-of-00040", {**results()["embed"], "embedded": 10})
    record(tmp_path, "embed-00007-of-00040", None, status="failed", error="out of memory")
    result, html = tell(tmp_path)
    text = shown(html)
    assert "texts embedded this night 390" in text
    assert "embed, 39 shards ✓ done 1.6 min" in text
    assert "embed-00007-of-00040 ✗ failed" in text
    assert "publish ✓ done" in text, "behind forty shards"
    assert result.points == ("embed-00007-of-00040 failed: out of memory",)


def test_a_thousand_failed_shards_are_named_by_the_first_few(tmp_path: Path) -> None:
    whole_night(tmp_path)
    for shard in range(1000):
        record(tmp_path, f"embed-{shard:05d}-of-01000", None, status="failed", error="no GPU")
    result, _ = tell(tmp_path)
    assert len(result.points) == 13
    assert result.points[-1] == "and 988 more"


def test_what_a_night_cost_holds_the_runs_that_a_later_one_followed(tmp_path: Path) -> None:
    whole_night(tmp_path)
    first = {"status": "done", "seconds": 60.0, "result": {"embedded": 40, "tokens": 800, "tokens_per_second": 9.0}}
    again = {**results()["embed"], "embedded": 0, "tokens": 0, "tokens_per_second": 0.0}
    record(tmp_path, "embed", again, earlier=[{"status": "failed", "seconds": 20.0}, first])
    text = shown(tell(tmp_path, gpu_hour_price=3600.0)[1])
    assert "embed ✓ done 82.5 s in 3 runs" in text
    assert "texts embedded this night 40" in text
    assert "Embedding, tokens a second 9.000" in text
    assert "Device cost per thousand items embedded 2,062" in text, "82.5 s for 40 texts at 1 a second"


def test_a_run_that_failed_after_a_good_one_is_to_be_looked_at_and_hides_nothing(tmp_path: Path) -> None:
    whole_night(tmp_path)
    again = {"status": "failed", "started_at": f"{DS}T02:00:00+00:00", "seconds": 3.0, "error": "no room"}
    manifests.append(tmp_path, DS, "publish", again)
    result, html = tell(tmp_path)
    assert (result.state, result.points) == ("look", ("publish ended well, and did not when it was run again: no room",))
    assert "in 2 runs" in shown(html)


def test_the_age_of_the_space_is_told_beside_that_of_the_snapshot(tmp_path: Path) -> None:
    whole_night(tmp_path, "2026-02-08")
    whole_night(tmp_path)
    assert f"It is in space {SPACE}, which is 30 days old: first filled with 2026-02-08." in shown(tell(tmp_path)[1])


def test_a_report_written_again_has_the_same_bytes(tmp_path: Path, drawn: dict[str, Any]) -> None:
    whole_night(tmp_path)
    drawn.clear()
    first, _ = tell(tmp_path)
    record(tmp_path, "report", as_json(first))
    record(tmp_path, "explain", {})
    drawn.clear()
    assert tell(tmp_path)[0].outputs == first.outputs


def test_a_date_without_any_run_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run `python -m jobs extract` first"):
        tell(tmp_path)


def test_the_parts_of_the_recommender_and_what_text_adds_are_told(tmp_path: Path) -> None:
    whole_night(tmp_path)
    _, html = tell(tmp_path)
    assert "The parts of the recommender" in html
    assert "shuffled 0.0000, text 0.0125" in html
    assert "0.3500" in html and "128" in html


def refit(**more: object) -> dict[str, object]:
    """The Result of a refit; the teacher was trained for an epoch more."""
    losses = [(2.5, 2.75, 9.0, 8.0), (1.25, 1.5, 6.0, 5.0)]
    history = [dict(zip(("gated", "all", "teacher_gated", "teacher_all"), one, strict=True)) for one in losses]
    history.append({"teacher_gated": 4.0, "teacher_all": 3.0})
    ids = {"recommender_id": "f" * 16, "gated_id": "c" * 16}
    return {**ids, "note": "trained on all events for 2 epochs", "history": history, "loss_ratio": 1.2, "device": "cuda", **more}


def test_the_losses_of_a_refit_stand_beside_those_of_the_judged_training(tmp_path: Path) -> None:
    whole_night(tmp_path)
    before = tell(tmp_path)[1]
    assert "Trained again on all events" not in before and "After the gates" not in before
    record(tmp_path, "rat-refit", refit())
    result, html = tell(tmp_path)
    text = shown(html)
    assert result.state == "good"
    assert "After the gates: trained on all events for 2 epochs." in text
    assert "loss by epoch beside the judged training's; at the last epoch 1.2000 times as high." in text
    assert "The llmemb part 2 1.2500 1.5000 1.2000" in text and "The teacher 3 4.0000 3.0000 0.7500" in text
    assert text.count("RAT: loss and validation by epoch; epoch 2 was kept") == 1, "its own curves stay"
    for panel in ("refit0", "refit1"):
        picture = html[html.index(f'id="{panel}-') :].partition("</svg>")[0]
        assert picture.count('id="' + panel + "-line2d") >= 2


@pytest.mark.parametrize("odd", [[{"gated": 0.0, "all": 1.0}], [{"all": 1.0}], [{}], []])
def test_a_refit_of_another_shape_costs_its_figures_alone(tmp_path: Path, odd: list[dict[str, float]]) -> None:
    whole_night(tmp_path)
    record(tmp_path, "rat-refit", refit(history=odd, loss_ratio=None, note="rat.refit is off: what was judged serves"))
    result, html = tell(tmp_path)
    assert result.state == "good" and "After the gates: rat.refit is off" in shown(html)


def test_the_bake_off_the_codes_and_the_routing_are_told_with_what_pays(tmp_path: Path) -> None:
    whole_night(tmp_path)
    for job, found in family().items():
        record(tmp_path, job, found)
    _, html = tell(tmp_path)
    text = shown(html)
    for part in (
        "seeds 42, 43, on cuda; the others are held against fused", "NDCG@10 of every system and floor", "61.5", "2,048",
        "books b00cb00cb00cb00c of space 5555555555555555 , made new on this night", "Product quantisation 0.5200 0.2900",
        "too: 0.0500; at most 3 have the same, told apart by numbers below 4. New books moved 0.9300 of the 38 items",
        "Book Entropy, bits Gini (0 even) Dead entries Share of the bits of genre", "Book 2 6.5000 0.4200 12 0.1500",
        "What codes keep of fused's vectors", "fused_pq 0.5500 0.3100", "7 of these users have no validation event",
        "weak by length 18 0.0200 0.1200 90.0%", "weak users routed to text. Routers tried: 1, each", "length, 20% 0.1150",
        "0.0150 0.0020 0.0280 0.2000", "Lists of 20 re-ranked for 90 users; 8 soft tokens; weight of the LLM in the mix: 0.2",
        "The LLM with soft tokens 0.1800 -0.0200 -0.0310 -0.0090", "titles shuffled over the items 0.1100 – – –",
        "codes of books b00cb00cb00cb00c for 77 users; beams that are items: 1.000, index drift: 0.000",
        "Generated 0.0300 -0.0200 -0.0400 -0.0010",
    ):  # fmt: skip
        assert part.replace(" ,", ",") in text, part
    assert "can't be drawn" not in html


@pytest.mark.parametrize("end", ["low", "over_low"])
def test_a_router_that_is_not_surely_better_than_chance_and_the_champion_is_told_not_to_pay(tmp_path: Path, end: str) -> None:
    whole_night(tmp_path)
    found = family()["bakeoff"]
    for row in found["routing"]["routes"]["text"]:
        row[end] = -0.001
    record(tmp_path, "bakeoff", found)
    assert "routing does not pay here" in shown(tell(tmp_path)[1])


def test_without_them_the_page_says_so_and_stays_good(tmp_path: Path) -> None:
    whole_night(tmp_path)
    result, html = tell(tmp_path)
    assert result.state == "good"
    assert "No bake-off was run for this night" in shown(html) and "who is badly served is not known" in shown(html)


def keep_outcomes(lake: Path, ndcg_C: list[float]) -> str:
    """Three users with two held-out events each, as `evaluate` keeps them; the first user is one of long history."""
    staged = artifacts.stage(lake, "outcomes")
    slices_SC = np.zeros((3, 6), bool)
    slices_SC[0], slices_SC[1, :2], slices_SC[2, 2:4] = True, True, True
    save_file({"user_C": np.array([0, 0, 1, 1, 2, 2], np.int32), "slices_SC": slices_SC,
               "ndcg_KC": np.array([[1.0] * 6, ndcg_C], np.float32)}, staged / "outcomes.safetensors")  # fmt: skip
    (staged / "outcomes.json").write_text(
        json.dumps({"models": ["popularity", "llmemb"], "slices": ["overall", "long", "weak_sparsity"]})
    )
    return artifacts.keep(lake, "outcomes", staged)


def test_weak_users_are_those_without_any_hit_and_how_they_moved_is_told(tmp_path: Path) -> None:
    for night, ndcg_C in enumerate([[0.5, 0.0, 0.0, 0.0, 0.0, 0.0]] * 6 + [[0.0, 0.0, 0.0, 0.0, 1.0, 0.0]]):
        ds = f"2026-03-{night + 4:02d}"
        whole_night(tmp_path, ds)
        record(tmp_path, "evaluate", {**results()["evaluate"], "outcomes_id": keep_outcomes(tmp_path, ndcg_C)}, ds)
        result, html = tell(tmp_path, ds)
        record(tmp_path, "report", as_json(result), ds)
    assert result.drift["weak.overall"] == pytest.approx(2 / 3, abs=1e-6) and result.drift["weak.long"] == 1.0
    text = shown(html)
    assert "All users 3 66.7% 66.7% 0.1667" in text
    assert "Long histories (a fifth) 1 100.0% 0.0% 0.0000" in text
    assert "Fewest different items (a fifth) 1 100.0% 100.0% 0.0000" in text
    assert {found.name: found.verdict for found in result.measures}["weak.long"] == "alarm"


def test_outcomes_that_are_gone_or_damaged_cost_their_table_alone(tmp_path: Path) -> None:
    whole_night(tmp_path)
    kept = keep_outcomes(tmp_path, [0.0] * 6)
    (tmp_path / "models" / "outcomes" / kept / "outcomes.safetensors").write_bytes(b"no tensors")
    for outcomes_id in (kept, "f" * 16, ""):
        record(tmp_path, "evaluate", {**results()["evaluate"], "outcomes_id": outcomes_id})
        assert "who is badly served is not known" in shown(tell(tmp_path)[1])
