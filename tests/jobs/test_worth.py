"""`worth` ranks with the base, the newest encoder, others by id, fewer layers and TF-IDF, and keeps nothing."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from jobs import scft
from jobs import worth as command
from jobs.lake.tables import ITEMS, SEQUENCES
from jobs.run import InputError
from tests.jobs.scft.test_worth import DS, ITEMS_N, write
from tests.jobs.scft.test_worth import config as config  # for pytest, which looks fixtures up here
from tests.jobs.small_lake import remember


def recipe(config: scft.Config, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[run]\nlake = "{config.run.lake}"\ndevice = "cpu"\n[scft]\nbase = "{config.base}"\nmax_tokens = 256\n'
        f"policy = {{ domain = {json.dumps(config.policy.domain)} }}\n"
    )
    return path


def test_all_that_is_asked_for_stands_in_one_table(
    config: scft.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = scft.run(config)
    remember(config.run, "scft", newest, config)
    before = {path for path in config.run.lake.rglob("*") if path.is_file()}
    words = ["--recipe", str(recipe(config, tmp_path)), "--ds", DS, "--layers", "1", "--encoder", newest.encoder_id]
    assert command.main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["ndcg"]) == ["base", "base, 1 layers", f"encoder {newest.encoder_id}"] and told["users"] == 120
    assert set(told["less"]) == {"base, 1 layers - base", f"encoder {newest.encoder_id} - base"}
    # the base alone is the base of the encoder's own figures
    assert told["ndcg"]["base"]["overall"] == pytest.approx(newest.worth["ndcg"]["base"]["overall"], abs=1e-4)
    assert told["ndcg"]["base"] != told["ndcg"]["base, 1 layers"]
    assert {path for path in config.run.lake.rglob("*") if path.is_file()} == before


def test_a_recipe_of_suffix_tokens_or_attention_both_ways_is_weighed_beside_the_plain_base(
    config: scft.Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(config, tmp_path)
    told = []
    for more in ("", "suffix_tokens = 4\ntraining = { steps = 2 }\n", 'attention = "both"\n'):
        path.write_text(recipe(config, tmp_path).read_text() + more)
        assert command.main(["--recipe", str(path), "--ds", DS]) == 0
        told.append(json.loads(capsys.readouterr().out)["ndcg"]["base"])
    assert told[0] == told[1] == told[2]


def test_tfidf_stands_beside_where_the_texts_are_enough(
    config: scft.Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("models.judge.text_floor.LEAST", ITEMS_N)
    assert command.main(["--recipe", str(recipe(config, tmp_path)), "--ds", DS]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["ndcg"]) == ["base", "tfidf"] and set(told["less"]) == {"base - tfidf"}


def test_too_few_users_are_said_with_the_remedy(
    config: scft.Config, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    write(config.run.lake, DS, users=30)
    with caplog.at_level(logging.INFO):
        assert command.main(["--recipe", str(recipe(config, tmp_path)), "--ds", DS, "--layers", "1"]) == 0
    assert "larger sample by --items" in caplog.text and "(few users)" in caplog.text
    # the widest figure of a difference leaves a space to the column before
    assert re.search(r"base, 1 layers - base  [+-]\d\.\d{4} \[[+-]\d\.\d{4}, [+-]\d\.\d{4}\]  ", caplog.text)
    assert json.loads(capsys.readouterr().out)["less"]["base, 1 layers - base"]["cold"][1:] == [None, None]


def test_an_encoder_that_is_not_there_and_a_lake_without_logs_are_named(config: scft.Config, tmp_path: Path) -> None:
    words = ["--recipe", str(recipe(config, tmp_path)), "--ds", DS]
    with pytest.raises(InputError, match="f" * 16):
        command.main([*words, "--encoder", "f" * 16])
    (config.run.lake / SEQUENCES.name).rename(tmp_path / "away")
    with pytest.raises(InputError, match="nothing to weigh encoders by"):
        command.main(words)
    (config.run.lake / ITEMS.name).rename(tmp_path / "gone")
    with pytest.raises(InputError, match="items"):
        command.main(words)
