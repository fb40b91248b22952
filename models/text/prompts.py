"""Item attributes -> token pieces -> prompts. No text is tokenised twice.

Shapes: I items, P pieces (one an attribute), N tokens of the catalogue, B prompts, T tokens of the prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Attributes = Sequence[tuple[str, str]]
"""(name, value) pairs of an item in their fixed order."""

LEAKS = (
    "review_count", "reviews", "num_reviews", "stars", "rating", "average_rating", "rating_number", "rating_count", "rank",
    "sales_rank", "best_sellers_rank", "also_buy", "also_bought", "also_view", "also_viewed", "bought_together",
    "buy_after_viewing", "popularity", "views", "votes",
)  # fmt: skip
"""Fields that tell how popular an item was over the whole period, test days included."""

NOTHING_KNOWN = "nothing is known"
"""The text of an item without attributes. All such items have the same embedding."""

LONGEST_TOKEN = 32
"""Characters a token, at most. A value is cut to its cap times this before it is tokenised, so a long value costs little."""


@dataclass(frozen=True, kw_only=True)
class FieldPolicy:
    """Which attributes the LLM may read, in which order, and how much of each (METHOD §1)."""

    domain: str = "The item has the following attributes:"
    """The sentence that stands before every item; computed once for all of them."""
    allow: tuple[str, ...] = ()
    """The only fields read, in this order; empty reads all, in the table's order."""
    block: tuple[str, ...] = LEAKS
    """Fields refused because they leak popularity of the whole period; spelling (`salesRank`, `sales_rank`) does not matter."""
    admit: tuple[str, ...] = ()
    """Blocked fields that are read all the same."""
    cap: int = 64
    """Tokens of one attribute, at most."""
    caps: dict[str, int] = field(default_factory=dict)
    """Other caps, by field name."""

    def __post_init__(self) -> None:
        if not self.domain.strip():
            raise ValueError("policy.domain is empty: give one sentence that says what the items are")
        if min((self.cap, *self.caps.values())) < 1:
            raise ValueError("policy.cap and policy.caps count tokens: give at least 1")
        for name in self.allow:
            refuse_leak(name, self)


def refuse_leak(name: str, policy: FieldPolicy) -> None:
    """Raises ValueError for a field that the policy blocks and does not admit."""
    plain = normalised_name(name)
    if plain in map(normalised_name, policy.block) and plain not in map(normalised_name, policy.admit):
        raise ValueError(
            f"field {name!r} leaks popularity of the whole period into the embedding: leave it out of the items (or name the "
            f"fields to read in policy.allow), or admit it by name in policy.admit"
        )


def normalised_name(name: str) -> str:
    """A field's name -> its letters and digits in lower case: salesRank, sales_rank and "Sales Rank" give the same."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def as_policy(value: Mapping[str, Any]) -> FieldPolicy:
    """An artifact's JSON, written by `dataclasses.asdict` -> the policy."""
    known: dict[str, Any] = {name: tuple(item) if isinstance(item, list) else item for name, item in value.items()}
    return FieldPolicy(**known)


def allowed_attributes(attributes: Attributes, policy: FieldPolicy) -> list[tuple[str, str]]:
    """An item's attributes -> those that the policy lets the LLM read, in order, without empty values.

    Raises ValueError for a blocked field.
    """
    if policy.allow:
        values = dict(attributes)
        return [(name, values[name]) for name in policy.allow if values.get(name, "").strip()]
    for name, _ in attributes:
        refuse_leak(name, policy)
    return [(name, value) for name, value in attributes if value.strip()]


def phrase(name: str, value: str) -> str:
    """An attribute -> `name is value` on one line. A `;` inside becomes a full stop, as `;` ends an attribute."""
    return " ".join(f"{name} is {value}".replace(";", ".").split())


def render(attributes: Attributes, policy: FieldPolicy) -> str:
    """The prompt as a reader sees it: domain sentence, newline, `name is value; ` for each attribute (METHOD §1).

    Raises ValueError for a blocked field.
    """
    return f"{policy.domain}\n" + "".join(f"{phrase(name, value)}; " for name, value in allowed_attributes(attributes, policy))


# ------------------------------------------------------------------------------------------------------------------ tokens


class Prompts(NamedTuple):
    """Tokens of B prompts, one prompt after the other, without the domain sentence."""

    token_T: NDArray[np.int32]
    length_B: Ints


@dataclass(frozen=True, kw_only=True)
class Texts:
    """A catalogue's token pieces: item i has pieces piece_I1[i]:piece_I1[i+1], piece p tokens token_P1[p]:token_P1[p+1]."""

    token_N: NDArray[np.int32]
    token_P1: Ints
    piece_I1: Ints
    known_P: Ints
    """Number of the piece's text: equal texts have equal numbers."""
    text_I: Ints
    """Number of the item's whole text: items that read the same have equal numbers."""
    empty: int
    """Items of which nothing is known."""

    def __len__(self) -> int:
        return len(self.piece_I1) - 1


def tokenize(items: Iterable[Attributes], tokenizer: Any, policy: FieldPolicy) -> Texts:
    """Items' attributes -> token pieces, one for each attribute, cut to its field's cap. Equal phrases are tokenised once.

    Each piece begins with a space, because byte-level tokenizers join a space to the next word. Some tokenizers add it
    themselves: then it is left to them. Raises ValueError for a blocked field.
    """
    numbers: dict[tuple[str, int], int] = {}
    known: list[int] = []
    counts, empty = [0], 0
    for attributes in items:
        pairs = allowed_attributes(attributes, policy)
        empty += not pairs
        for name, value in pairs:
            cap = policy.caps.get(name, policy.cap)
            known.append(numbers.setdefault((phrase(name, value[: cap * LONGEST_TOKEN]), cap), len(numbers)))
        if not pairs:
            known.append(numbers.setdefault((NOTHING_KNOWN, policy.cap), len(numbers)))
        counts.append(len(known))
    known_P, piece_I1 = np.asarray(known, dtype=np.int64), np.asarray(counts, dtype=np.int64)
    unique = encode_phrases([f"{text};" for text, _ in numbers], [cap for _, cap in numbers], tokenizer)
    lengths = np.asarray([len(ids) for ids in unique], dtype=np.int64)
    starts = np.concatenate([[0], lengths.cumsum()])
    flat = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in unique]) if unique else np.zeros(0, dtype=np.int32)
    return Texts(
        token_N=flat[spans(starts[known_P], lengths[known_P])],
        token_P1=np.concatenate([[0], lengths[known_P].cumsum()]),
        piece_I1=piece_I1,
        known_P=known_P,
        text_I=number_texts(known_P, piece_I1),
        empty=empty,
    )


def encode_phrases(phrases: Sequence[str], caps: Sequence[int], tokenizer: Any) -> list[list[int]]:
    """Phrases -> token ids, each list cut to its cap. The last token, the separator, always stays."""
    if not phrases:
        return []
    first = tokenizer.tokenize("a")
    space = "" if first and first[0].startswith("▁") else " "
    # "<|im_end|>" in a title must stay plain text: it must not become the special token
    encoded = tokenizer([space + text for text in phrases], add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [ids if len(ids) <= cap else [*ids[: cap - 1], ids[-1]] for ids, cap in zip(encoded, caps, strict=True)]


def number_texts(known_P: Ints, piece_I1: Ints) -> Ints:
    """Each item's pieces -> a number. Equal lists of pieces have equal numbers."""
    numbers: dict[bytes, int] = {}
    ends = piece_I1.tolist()
    lists = (known_P[start:end].tobytes() for start, end in pairwise(ends))
    return np.asarray([numbers.setdefault(pieces, len(numbers)) for pieces in lists], dtype=np.int64)


def spans(starts: Ints, lengths: Ints) -> Ints:
    """Starts and lengths of several runs -> all their indices: spans([7, 2], [2, 3]) is [7, 8, 2, 3, 4]."""
    before = np.concatenate([[0], lengths.cumsum()])
    return np.repeat(starts - before[:-1], lengths) + np.arange(before[-1])


# ----------------------------------------------------------------------------------------------------------------- prompts


def prompts(texts: Texts, items: Ints, limit: int) -> tuple[Prompts, int]:
    """Items -> their whole prompts, and how many of them were cut because they have more than `limit` tokens.

    A prompt is cut between two attributes. Where the first attribute alone is too long, its first `limit` tokens stay.
    """
    lengths = np.diff(texts.token_P1)
    chosen, cut = [], 0
    for item in items.tolist():
        pieces = np.arange(texts.piece_I1[item], texts.piece_I1[item + 1])
        fitting = count_fitting(lengths[pieces], limit)
        cut += fitting < len(pieces) or bool(lengths[pieces[0]] > limit)
        chosen.append(pieces[:fitting])
    return join_pieces(texts, chosen, limit), cut


def count_fitting(lengths: Ints, limit: int) -> int:
    """Lengths of pieces -> how many of the first ones fit into `limit` tokens together, at least one."""
    return max(1, int(np.searchsorted(lengths.cumsum(), limit, side="right")))


def join_pieces(texts: Texts, chosen: Sequence[Ints], limit: int) -> Prompts:
    """Each item's chosen pieces -> its prompt. A single piece is cut to `limit` tokens."""
    pieces = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
    starts, lengths = texts.token_P1[pieces], np.minimum(np.diff(texts.token_P1)[pieces], limit)
    ends = np.cumsum([0, *map(len, chosen)])
    total = np.concatenate([[0], lengths.cumsum()])
    return Prompts(token_T=texts.token_N[spans(starts, lengths)], length_B=np.diff(total[ends]))


def take(source: Prompts, rows: Ints) -> Prompts:
    """Prompts -> some of them, in the order of `rows`."""
    starts = source.length_B.cumsum() - source.length_B
    return Prompts(token_T=source.token_T[spans(starts[rows], source.length_B[rows])], length_B=source.length_B[rows])
