"""Puts a fused recommender together: parts made, weights found, and text held against texts that mean nothing.

Shapes: N items, K whitened width, V items + 1 (row 0 is padding), D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from models.behaviour import fusion, parts
from models.behaviour.counting import DIRECTED, Counting, affordable, counting_items
from models.behaviour.data import Histories
from models.behaviour.fused import Part
from models.behaviour.fusion import Found, Sample, Scores, Search
from models.behaviour.graph import LAYERS, graph_table
from models.behaviour.recommender import Backbone, LoadedRecommender, build_sequence
from models.behaviour.whitening import Whitening

Name = Literal["collaborative", "llmemb", "text", "counting", "graph"]
Option = tuple[float, str]
"""What is varied of a part: a fade or events of shrinking, and the counting part's table."""
GRAPH_PRIOR = 1.0
"""Train events that weigh as much as text in the graph part: cold items are filled from text, the others keep their place."""
READ_TEXT = ("llmemb", "collaborative", "graph", "text")
"""Parts in which an item without events has a vector, the first to keep where validation has no use for any of them."""
CONTROLS = ("shuffled", "gaussian")


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """Which parts a recommender has, and what is tried for each on validation cases."""

    parts: tuple[Name, ...] = ("collaborative", "llmemb", "text", "counting")
    """`collaborative`: the teacher, shrunk to text; `llmemb`: text bent by RAT; `text`: text untrained; `counting`: items by
    whom they stood beside; `graph`: items by what is near in the graph of users and items (ELMRec). `llmemb` alone is LLMEmb as
    published."""
    text_width: int = 128
    """Directions of the text part."""
    text_directions: Literal["agreement", "random", "strongest"] = "agreement"
    """`agreement`: those in which texts of items that users took one after the other agree most; `random`: a fixed map of all."""
    counting: tuple[Counting, ...] = ("cooccurrence", "ease")
    """Tables that are tried for the counting part; the best on validation is taken. `cooccurrence`: who stood beside whom;
    `transitions`: who came next; `ease`: partial correlations; `l3ae`: those, pulled to text. The last two invert a matrix of
    items by items: past 20,000 items (6,000 on a CPU) they are passed over."""
    counting_width: int = 128
    """Columns of the counting part; of `transitions` and `l3ae` half of them find an item and half read it."""
    graph_width: int = 128
    """Columns of the graph part."""
    graph_layers: int = LAYERS
    """Steps over which vectors spread in the graph of users and items, at most; the table is the mean over even numbers."""
    shrink: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Train events that weigh as much as text in `collaborative`; the best on validation is taken."""
    fades: tuple[float, ...] = (0.5, 0.7, 0.85)
    """How much an event weighs of the one after it, in `text`, `counting` and `graph`; the best on validation is taken."""
    newest: int = 20
    """Events that `text`, `counting` and `graph` read, the newest."""
    centre: bool = True
    """Whether validation may take a share of the mean user vector from trained parts."""
    gates: bool = True
    """Whether validation may give the text part another weight for items with few train events."""
    controls: bool = True
    """Whether text is held against shuffled and Gaussian texts, and left out where it gains no more."""

    def __post_init__(self) -> None:
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"fusion.parts {list(self.parts)} must name at least one part, and each once")
        if min(self.text_width, self.counting_width, self.graph_width, self.graph_layers, self.newest) < 1:
            raise ValueError("fusion.text_width, counting_width, graph_width, graph_layers and newest must be at least 1")
        if not self.counting or set(self.counting) - set(get_args(Counting)):
            raise ValueError(f"fusion.counting {list(self.counting)} must name at least one of {', '.join(get_args(Counting))}")
        if not self.shrink or not self.fades or min(self.shrink) < 0 or not all(0 < fade <= 1 for fade in self.fades):
            raise ValueError("fusion.shrink must hold numbers of 0 or more, and fusion.fades numbers in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Material:
    """What parts are made of."""

    events: Histories
    counts_V: Tensor
    """Train events of each item."""
    white_NK: Tensor
    whitening: Whitening
    item_ids: Sequence[str]
    llmemb: Part
    teacher: LoadedRecommender | None
    teacher_VD: Tensor | None
    """The teacher's table in the catalogue's order; an item that it lacks has zeros."""
    unseen: bool
    other_text_NK: Tensor | None = None
    """Whitened text that the untrained text part reads instead: for controls."""
    tried: Callable[[], None] = lambda: None
    """Called whenever the validation cases were ranked with other weights: a sign of life, for minutes go by."""


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """The parts that are kept, and how they were found."""

    parts: tuple[Part, ...]
    found: Found
    gains: dict[str, float] = field(default_factory=dict)
    """NDCG@10 on validation that text, and each control in its place, added to the other parts."""
    chosen: dict[str, float] = field(default_factory=dict)
    """What was chosen for single parts: events of shrinking, fades."""
    counted: str = ""
    """The table of the counting part."""
    mean_users: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


def assemble(config: Fusion, given: Material) -> Assembled:
    """Makes the configured parts and finds their weights; without a teacher there is no collaborative part."""
    names = [name for name in config.parts if name != "collaborative" or given.teacher is not None]
    longest = max(given.llmemb.backbone.max_len, config.newest)
    width = given.llmemb.backbone.width * 2 + config.text_width + config.counting_width
    width += config.graph_width if "graph" in names else 0
    sample = fusion.sample_cases(
        given.events, given.counts_V, max_len=longest, unseen=given.unseen, width=width, tried=given.tried
    )
    made: dict[str, Part] = {}
    scores: dict[str, Scores] = {}
    chosen: dict[str, float] = {}
    counted = ""
    for name in names:
        read_NK = given.white_NK if name != "text" or given.other_text_NK is None else given.other_text_NK
        options = part_options(config, given, name, read_NK)
        value, made[name], scores[name] = best_alone(given, sample, options, read_NK)
        if len(options) > 1:
            chosen[name] = value[0]
        counted = value[1] or counted
    centred = [name for name in ("collaborative", "llmemb") if config.centre]
    found = fusion.search(sample, scores, centred=centred, gated=config.gates, reach=READ_TEXT)
    gains: dict[str, float] = {}
    if config.controls and "text" in made and len(made) > 1 and found.alone:
        gains, without = text_gains(config, given, sample, scores, found, chosen["text"] if "text" in chosen else config.fades[0])
        if gains["text"] <= max(0.0, *(gains[name] for name in CONTROLS)):
            found = without
    kept = [name for name in made if found.relative[name] > 0]
    means = {name: scores[name].user_CD.mean(0) for name in kept}
    return Assembled(
        parts=tuple(made[name] for name in kept), found=found, gains=gains, chosen=chosen, counted=counted, mean_users=means
    )


def part_options(config: Fusion, given: Material, name: str, white_NK: Tensor) -> dict[Option, Part]:
    """A part in each of the ways that are tried, by what is varied."""
    if name == "llmemb":
        return {(0.0, ""): given.llmemb}
    if name == "collaborative":
        assert given.teacher is not None and given.teacher_VD is not None
        teacher, table_VD = given.teacher, given.teacher_VD
        return {
            (k, ""): Part(name=name, items=parts.shrunk_items(table_VD, given.counts_V, white_NK, k), sequence=teacher.sequence,
                          backbone=teacher.backbone, config={"kind": "shrunk"}, fading=teacher.meta.get("fading"))
            for k in config.shrink
        }  # fmt: skip
    if name == "text":
        items = parts.text_items(white_NK, given.events, config.text_width, config.text_directions)
        return read_fading(config, name, items, items.map_KD.shape[1], "directions")
    if name == "graph":
        table_VD = graph_table(given.events, config.graph_width, layers=config.graph_layers)
        shrunk = parts.shrunk_items(table_VD, given.counts_V, white_NK, GRAPH_PRIOR)
        return read_fading(config, name, shrunk, config.graph_width, "shrunk")
    kinds = [kind for kind in config.counting if affordable(kind, given.events)] or config.counting[:1]
    made: dict[Option, Part] = {}
    for kind in kinds:
        table = counting_items(given.events, config.counting_width, kind, given.white_NK)
        read = read_fading(config, name, table, table.weight.shape[1], "sides" if kind in DIRECTED else "table")
        made |= {(fade, kind): part for (fade, _), part in read.items()}
    return made


def read_fading(config: Fusion, name: str, items: torch.nn.Module, width: int, kind: str) -> dict[Option, Part]:
    """Items read by a mean that fades in each of the ways that are tried."""
    backbone = Backbone(width=width, max_len=config.newest)
    return {
        (fade, ""): Part(name=name, items=items, sequence=build_sequence(backbone, kind, fade), backbone=backbone,
                         config={"kind": kind}, fading=fade)
        for fade in config.fades
    }  # fmt: skip


def scored(given: Material, sample: Sample, part: Part, white_NK: Tensor) -> Scores:
    """The part's scores of the sample, as it would serve."""
    device = white_NK.device
    alone = part.loaded(given.item_ids, given.whitening, device)
    row_N = torch.arange(1, len(given.counts_V), device=device)
    table_VD = torch.nn.functional.pad(alone.from_white(white_NK, row_N).float(), (0, 0, 1, 0))
    return fusion.scored(sample, table_VD, alone.encode)


def best_alone(given: Material, sample: Sample, options: Mapping[Option, Part], white_NK: Tensor) -> tuple[Option, Part, Scores]:
    """The option with the best NDCG@10 by itself, with its scores; of too few cases the first."""
    best: tuple[Option, Part, Scores] | None = None
    most = -1.0
    for value, part in options.items():
        scores = scored(given, sample, part, white_NK)
        if len(options) == 1 or len(sample.target_C) < fusion.LEAST:
            return value, part, scores
        run = Search(sample, {part.name: scores})
        ndcg = run.value(fusion.Point((1.0,), fusion.OPEN, (0.0,)))
        if ndcg > most:
            most, best = ndcg, (value, part, scores)
    assert best is not None
    return best


def text_gains(
    config: Fusion, given: Material, sample: Sample, scores: Mapping[str, Scores], found: Found, fade: float
) -> tuple[dict[str, float], Found]:
    """What text and each control in its place add to the other parts on validation; and the weights without text."""
    centred = [name for name in ("collaborative", "llmemb") if config.centre]
    without = fusion.search(sample, scores, centred=centred, barred="text", reach=READ_TEXT)
    gains = {"text": found.ndcg["overall"] - without.ndcg["overall"]}
    generator = torch.Generator().manual_seed(len(given.item_ids))
    for control in CONTROLS:
        if control == "shuffled":
            white_NK = given.white_NK[torch.randperm(len(given.white_NK), generator=generator).to(given.white_NK.device)]
        else:
            white_NK = torch.randn(given.white_NK.shape, generator=generator).to(given.white_NK.device)
        part = part_options(config, given, "text", white_NK)[fade, ""]
        instead = {name: scored(given, sample, part, white_NK) if name == "text" else other for name, other in scores.items()}
        ndcg = fusion.search(sample, instead, centred=centred, gated=config.gates).ndcg["overall"]
        gains[control] = ndcg - without.ndcg["overall"]
    return gains, without


def centres(shares: Mapping[str, float], mean_users: Mapping[str, Tensor], turns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """centre_D of each centred part: its share of the mean user vector, turned as the part's vectors are."""
    made = {}
    for name, share in shares.items():
        mean_D = mean_users[name]
        made[name] = share * (mean_D @ turns[name] if name in turns else mean_D)
    return made
