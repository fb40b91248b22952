"""Prompts: what the LLM reads of an item, in pieces that shuffle and drop without being tokenised again."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from models.text.prompts import FieldPolicy, as_policy, prompts, render, spans, take, tokenize
from models.text.views import views
from tests.models.tiny import items, tokenizer

POLICY = FieldPolicy(domain="The film has these attributes:")


def text_of(tokens: np.ndarray) -> str:
    return str(tokenizer().decode(tokens.tolist()))


def test_a_prompt_is_the_domain_sentence_a_newline_and_name_is_value_pairs() -> None:
    attributes = [("title", "Heat"), ("year", "1995"), ("director", " ")]
    assert render(attributes, POLICY) == "The film has these attributes:\ntitle is Heat; year is 1995; "


def test_newlines_and_semicolons_inside_a_value_do_not_end_its_attribute() -> None:
    assert render([("plot", "one;\ntwo\tthree")], POLICY).endswith("plot is one. two three; ")


@pytest.mark.parametrize("name", ["salesRank", "sales_rank", "Review Count", "also_buy"])
def test_a_field_that_leaks_popularity_is_refused_in_any_spelling(name: str) -> None:
    with pytest.raises(ValueError, match=r"policy\.admit"):
        render([("title", "Heat"), (name, "7")], POLICY)
    with pytest.raises(ValueError, match="leaks popularity"):
        FieldPolicy(allow=("title", name))


def test_a_leaking_field_is_read_when_the_policy_admits_it_by_name() -> None:
    assert "stars is 4" in render([("stars", "4")], dataclasses.replace(POLICY, admit=("stars",)))


def test_the_allow_list_chooses_and_orders_the_fields_and_ignores_blocked_ones_outside_it() -> None:
    policy = dataclasses.replace(POLICY, allow=("year", "title"))
    assert render([("title", "Heat"), ("stars", "4"), ("year", "1995")], policy).endswith(":\nyear is 1995; title is Heat; ")


def test_a_policy_survives_its_json() -> None:
    policy = FieldPolicy(allow=("title",), caps={"title": 9})
    assert as_policy(json.loads(json.dumps(dataclasses.asdict(policy)))) == policy


@pytest.mark.parametrize("wrong", [{"domain": " "}, {"cap": 0}, {"caps": {"title": 0}}])
def test_a_policy_without_a_sentence_or_with_an_empty_cap_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="policy"):
        FieldPolicy(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["<b>bold</b> & co", "Кошки и 猫", "<|end|> of all", "emoji 🎬"])
def test_values_of_any_script_and_markup_are_read_as_plain_text(value: str) -> None:
    texts = tokenize([[("title", value)]], tokenizer(), POLICY)
    assert text_of(texts.token_N) == f" title is {value};"
    assert tokenizer().convert_tokens_to_ids("<|end|>") not in texts.token_N


def test_a_long_description_is_cut_to_its_fields_cap_and_keeps_its_separator() -> None:
    policy = dataclasses.replace(POLICY, cap=20, caps={"plot": 30})
    texts = tokenize([[("title", "a" * 10_000), ("plot", "b " * 5_000)]], tokenizer(), policy)
    assert np.diff(texts.token_P1).tolist() == [20, 30]
    assert text_of(texts.token_N).count(";") == 2


def test_items_that_read_the_same_share_a_number_and_an_item_without_attributes_has_a_text() -> None:
    texts = tokenize([[("title", "Heat")], [], [("title", "Heat ")], [("year", " ")]], tokenizer(), POLICY)
    assert texts.text_I.tolist() == [0, 1, 0, 1]
    assert texts.empty == 2
    assert np.diff(texts.piece_I1).tolist() == [1, 1, 1, 1]


def test_a_prompt_longer_than_the_window_is_cut_at_an_attributes_border_and_counted() -> None:
    texts = tokenize([[("a", "1"), ("b", "2"), ("c", "3")], [("a", "1")], [("a", "x" * 60)]], tokenizer(), POLICY)
    whole, cut = prompts(texts, np.arange(3), 20)
    assert whole.length_B.tolist() == [16, 8, 20]
    assert cut == 2
    assert text_of(whole.token_T[:16]) == " a is 1; b is 2;"


def test_views_shuffle_and_drop_a_share_of_the_attributes_but_never_all() -> None:
    texts = tokenize([[(name, name) for name in "abcde"]], tokenizer(), POLICY)
    seen, _ = views(texts, np.zeros(2000, dtype=np.int64), 0.4, 999, np.random.default_rng(0))
    counts = seen.length_B / 8
    assert counts.mean() == pytest.approx(3.0, abs=0.01)
    assert counts.min() >= 1
    assert len({text_of(take(seen, np.asarray([row])).token_T) for row in range(200)}) > 50


def test_a_share_of_a_few_attributes_is_kept_on_average() -> None:
    texts = tokenize(items(1), tokenizer(), POLICY)
    seen, _ = views(texts, np.zeros(600, dtype=np.int64), 0.5, 999, np.random.default_rng(1))
    piece_count = [text_of(take(seen, np.asarray([row])).token_T).count(";") for row in range(600)]
    assert np.mean(piece_count) == pytest.approx(1.5, abs=0.1)


def test_one_attribute_alone_is_always_kept() -> None:
    texts = tokenize([[("title", "Heat")]], tokenizer(), POLICY)
    seen, _ = views(texts, np.zeros(50, dtype=np.int64), 0.9, 999, np.random.default_rng(0))
    assert set(seen.length_B.tolist()) == {len(" title is Heat;")}


def test_views_of_the_same_attributes_have_equal_keys_in_any_order() -> None:
    pairs = [("a", "1"), ("b", "2")]
    texts = tokenize([pairs, pairs[::-1], [("a", "1"), ("b", "3")]], tokenizer(), POLICY)
    _, keys = views(texts, np.arange(3), 0.0, 999, np.random.default_rng(0))
    assert keys[0] == keys[1] != keys[2]


def test_spans_put_runs_on_end() -> None:
    assert spans(np.asarray([7, 2, 5]), np.asarray([2, 3, 0])).tolist() == [7, 8, 2, 3, 4]
