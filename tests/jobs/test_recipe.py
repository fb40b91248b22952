"""The command line's values: an id arrives as it was written, or is refused; it never becomes another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.forget import Config
from jobs.recipe import build, load_recipe, values_of
from jobs.run import InputError

IDS = ["$HOME", "${HOME} $$", "\U0001f600", "it's", 'a"b\\', "1e3", "1_000", "0x10", "true", "405 #2", "l1\nl2", "007", "405"]


def asked(tmp_path: Path, override: str) -> frozenset[str]:
    """The ids that `forget` would forget."""
    path = tmp_path / "recipe.toml"
    path.write_text('[run]\nlake = "lake"\n')
    values = load_recipe(path, [override])
    run = {"ds": "2026-01-01", **values["run"]}
    return build(Config, {"run": run, **values["forget"]}, "forget").ids


def quoted(text: str) -> str:
    return '"' + "".join(f"\\U{ord(letter):08x}" for letter in text) + '"'


@pytest.mark.parametrize("item", IDS)
def test_a_quoted_id_reaches_the_job_unchanged_whatever_its_letters(tmp_path: Path, item: str) -> None:
    assert asked(tmp_path, f"forget.item={quoted(item)}") == {item}
    assert asked(tmp_path, f"forget.items=[{quoted(item)}, 7]") == {item, "7"}


@pytest.mark.parametrize("item", ["$HOME", "\U0001f600", "it's", "a\"b'c\\", "405", "007", "l1\nl2", "1\nb=2", "a #b"])
def test_an_id_without_quotes_is_taken_as_it_is(tmp_path: Path, item: str) -> None:
    assert asked(tmp_path, f"forget.item={item}") == {item}


@pytest.mark.parametrize(
    "text", ["1e3", "1_000", "+5", "0x10", "true", "405 #2", "'Tis", '"a', "[a", '"\\ud83d"', "[1_000]", "[true]", "[1.0]"]
)
def test_an_id_that_would_be_read_as_another_one_is_refused(tmp_path: Path, text: str) -> None:
    key = "items" if text.startswith("[") else "item"
    with pytest.raises(InputError, match="quotes"):
        asked(tmp_path, f"forget.{key}={text}")


def test_a_variable_in_the_recipe_s_own_text_is_still_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_LAKE", "/elsewhere")
    path = tmp_path / "recipe.toml"
    path.write_text('[run]\nlake = "$SOME_LAKE"\ntracking_uri = "$NOT_SET"\n')
    assert load_recipe(path, ["run.tracking_uri=x"])["run"] == {"lake": "/elsewhere", "tracking_uri": "x"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("run = 5", "run is 5, no table: write .run. on a line of its own"),
        ('scft = "a"\n[run]\nlake = "lake"', "scft is 'a', no table"),
        ('backbone = [1]\n[run]\nlake = "lake"', "backbone is .1., no table"),
        ("[run]\nlake = 5", "run.lake is 5, no text"),
    ],
)
def test_a_value_in_the_place_of_a_table_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        load_recipe(path)


def test_a_value_in_the_place_of_a_shared_table_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"rat\.backbone is 5, no table"):
        values_of({"backbone": {"width": 32}, "rat": {"backbone": 5}}, "rat")
