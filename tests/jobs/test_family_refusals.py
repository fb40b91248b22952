"""Bad input of the family's jobs, at their own command line: refused with status 2, or told, by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jobs.__main__ import main
from jobs.lake import artifacts, partitions
from jobs.lake.items import content_hash
from jobs.lake.tables import ATTRIBUTES, ITEM_CODES, ITEMS, SEQUENCES, llm_embeddings
from tests.jobs.small_lake import DS, ENCODER, WIDTH, embedding_rows, item_rows, make, sequence_rows
from tests.models import tiny

RECIPE = """
[run]
lake = "{lake}"
device = "cpu"
[backbone]
width = 8
max_len = 6
[rat]
teacher = "none"
hidden = 8
[rat.training]
epochs = 1
batch = 8
[rat.fusion]
parts = ["llmemb"]
[project]
recommender = "latest"
[codes]
recommender = "latest"
publish = false
controls = false
training = {{ books = 2, entries = 4 }}
[generate]
recommender = "latest"
user_codes = {{ books = 2, entries = 4 }}
training = {{ width = 8, layers = 1, heads = 2, history = 3, steps = 2, batch = 4, beams = 6 }}
[rerank]
recommender = "latest"
top = 5
distilling = {{ tokens = 1, steps = 1, batch = 1 }}
[bakeoff]
seeds = [1]
cold_share = 0.0
systems = ["text", "graph"]
champion = "text"
controls = false
[bakeoff.settings.backbone]
width = 8
max_len = 6
"""
Ask = Callable[..., tuple[int, str]]


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs a job on a small lake by the command line; its status, and the last line of what it says."""
    lake = make(tmp_path).lake
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(lake=lake))

    def run(job: str, *sets: str) -> tuple[int, str]:
        capsys.readouterr()
        status = main([job, "--recipe", str(recipe), "--ds", DS, *(word for one in sets for word in ("--set", one))])
        said = capsys.readouterr()
        return status, (said.err if status else said.out).strip().splitlines()[-1]

    return run


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """The lake that `ask` reads."""
    return tmp_path / "lake"


def result(answer: tuple[int, str]) -> dict[str, Any]:
    """The Result of a job that was done."""
    assert answer[0] == 0, answer
    found: dict[str, Any] = json.loads(answer[1])
    return found


def refused(answer: tuple[int, str], job: str, text: str) -> None:
    """The job was refused for its input, and says this."""
    assert answer[0] == 2 and answer[1].startswith(f"{job}: error: ") and text in answer[1], answer


def many(lake: Path, texts: Sequence[str]) -> None:
    """A catalogue of items of these texts."""
    hashes = [content_hash([("title", text)]) for text in texts]
    attributes = pa.array([[{"name": "title", "value": text}] for text in texts], ATTRIBUTES)
    rows = {"item_id": [f"t{number:05d}" for number in range(len(texts))], "attributes": attributes, "content_hash": hashes,
            "first_seen_ds": [DS] * len(texts)}  # fmt: skip
    partitions.write(lake, ITEMS, f"ds={DS}", [pa.table(rows)])
    partitions.write(lake, llm_embeddings(WIDTH), f"encoder={ENCODER}/shard=9", [embedding_rows(sorted(set(hashes)))])


def split(lake: Path, train: int | None = None, valid: int | None = None, every: int = 1) -> None:
    """Moves the split of every so many users: train and valid end there, None as they are."""
    rows = sequence_rows().to_pylist()
    for row in rows[::every]:
        row["train_end"] = row["train_end"] if train is None else min(train, len(row["item_ids"]))
        row["valid_end"] = row["valid_end"] if valid is None else min(valid, len(row["item_ids"]))
    partitions.write(lake, SEQUENCES, f"ds={DS}", [SEQUENCES.schema.empty_table().from_pylist(rows, SEQUENCES.schema)])


def word_base(folder: Path) -> Path:
    """A decoder whose tokenizer knows a few words and nothing else."""
    tiny.llama(folder, tie_word_embeddings=True)
    words = ["[UNK]", "text", "A", "user", "took", *map(str, range(20))]
    made = Tokenizer(models.WordLevel(vocab={word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)
    return folder


def coded(ask: Ask) -> dict[str, Any]:
    """A lake with a recommender, its space, and codes."""
    result(ask("rat"))
    result(ask("project"))
    return result(ask("codes"))


def test_fewer_items_than_codes_are_refused_by_count(ask: Ask) -> None:
    result(ask("rat"))
    result(ask("project"))
    refused(ask("codes", "codes.training.entries=64"), "codes", "20 items have 19 different vectors, a book has 64 entries")
    refused(ask("rat", 'rat.adapter="codes"'), "rat", "20 items have 19 different vectors, a book has 256 entries")
    refused(ask("bakeoff", 'bakeoff.systems=["codes"]', 'bakeoff.champion="codes"'), "bakeoff", "a book has 256 entries")
    result(ask("codes"))
    refused(ask("generate", "generate.user_codes.entries=64"), "generate", "different vectors, a book has 64 entries")


def test_identical_texts_by_the_thousand_are_refused_by_count_or_told_apart_by_numbers(ask: Ask, lake: Path) -> None:
    result(ask("rat"))
    texts = 'codes.source="llm_embeddings"'
    many(lake, [f"kind {number % 3}" for number in range(17_000)])
    refused(ask("codes", texts), "codes", "17,000 items have 3 different vectors, a book has 4 entries")
    many(lake, ["the same"] * 2500 + [f"kind {number}" for number in range(12)])
    found = result(ask("codes", texts))
    assert found["report"]["collisions"]["largest"] >= 2500 and found["report"]["collisions"]["most_numbered"] >= 2500
    rows = partitions.read(lake, ITEM_CODES, f"books={found['books_id']}/ds={DS}").to_pylist()
    assert len({(*row["codes"], row["number"]) for row in rows}) == 2512
    assert found["report"]["books"]["recall_at_10"] > 0.9  # twins are neighbours, whichever comes first


@pytest.mark.parametrize("job", ["codes", "generate"])
def test_a_book_of_another_encoder_is_refused_by_name(ask: Ask, lake: Path, job: str) -> None:
    found = coded(ask)
    home = artifacts.find(lake, "books", found["books_id"])
    told = json.loads((home / "books.json").read_text())
    (home / "books.json").write_text(json.dumps({**told, "source": "encoder beef"}))
    refused(ask(job), job, f"books {found['books_id']} are of encoder beef")
    refused(ask(job, f'{job}.books="{found["books_id"]}"'), job, f"books {found['books_id']} are of encoder beef")


def test_an_empty_graph_is_refused_by_name(ask: Ask, lake: Path) -> None:
    split(lake, train=0, valid=5)
    refused(ask("pretrain", 'pretrain.view="graph"'), "pretrain", "no user has a train event: the graph is empty")
    refused(ask("bakeoff"), "bakeoff", "no user has a train event: the graph is empty")


def test_users_without_a_validation_event_are_counted_and_a_night_without_any_is_refused(ask: Ask, lake: Path) -> None:
    split(lake, valid=6, every=2)  # train_end is 6: eleven of 23 have no event in between
    routing = result(ask("bakeoff"))["routing"]
    assert (routing["users"], routing["without_validation"]) == (23, 12)
    result(ask("rat"))
    split(lake, train=6, valid=6)
    for job in ("bakeoff", "rerank"):
        more = () if job == "bakeoff" else ('rerank.base="unread"',)
        refused(ask(job, *more), job, "no user has an event in the valid part with one before it: move the split")


def test_a_title_outside_the_vocabulary_is_refused_by_name(ask: Ask, lake: Path, tmp_path: Path) -> None:
    result(ask("rat"))
    base = word_base(tmp_path / "words")
    result(ask("rerank", f'rerank.base="{base}"'))
    rows = item_rows().to_pylist()
    rows[4]["attributes"] = [{"name": "title", "value": "Амели"}]  # its embedding stays: the hash is that of the text
    partitions.write(lake, ITEMS, f"ds={DS}", [ITEMS.schema.empty_table().from_pylist(rows, ITEMS.schema)])
    refused(ask("rerank", f'rerank.base="{base}"'), "rerank", "title 'Амели' holds no token that the base knows")
