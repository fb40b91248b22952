"""How much each part of a fused recommender weighs: a coordinate search on validation cases, ranked as serving ranks.

Scores of each part's best items are held on the device, so a step of the search is a weighted sum and a comparison. It is
deterministic.

Shapes: C cases, M candidate items of a case, H items had, V items + 1 (row 0 is padding), D width, B cases of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.behaviour.data import COLD, HEAD, TAIL, Histories, cases, inputs_before, item_groups, targets
from models.behaviour.fused import BANDS, GATED, Weights
from models.judge.metrics import block, by_rank

OPEN = (1.0,) * (len(BANDS) + 1)
"""Gates that change nothing."""
GRID = (0.0, 0.125, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
FACTORS = (0.5, 0.7, 0.85, 1.2, 1.4, 2.0)
"""By which a weight is changed once it has one."""
GATES = (0.5, 0.7, 1.0, 1.4, 2.0)
CENTRES = (0.0, 0.25, 0.5, 0.75)
ROUNDS = 5
LEAST = 200
"""Validation cases below which nothing is chosen: the default weights stand."""
LEAST_IN_BAND = 50
BALANCE = 0.15
"""Share of the goal that is the mean over cold, tail and head items, each counted alike; the rest is the mean over cases. Without
it a weight that gains a little on the many cases of popular items gives the rare ones away."""
CASES = 20_000
"""Validation cases that weights are chosen on, at most."""
TOP = {"cuda": 200, "cpu": 100}
"""Each part's best items that a case is ranked among: what is in nobody's best can't be among the ten best of the sum."""
PRODUCTS = {"cuda": 2**43, "cpu": 2**32}
"""Multiplications spent on scores, about: of a large catalogue fewer cases are taken."""
HELD = 2**27
"""Scores held at once while the best are looked for."""
GAIN = 1e-5
"""A change that gains less is not taken."""
FAINT = 0.01
"""Weight of a part that is there for new items alone: for all others it moves near-ties at most."""
DEFAULTS: Mapping[str, float] = {"collaborative": 1.0, "llmemb": 1.0, "text": 0.7, "counting": 0.5, "graph": 0.5}
"""Weights where validation can't choose: about what it chose on the data sets of BENCHMARKS.md."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Validation cases: the history of each, and what came next."""

    input_CL: Tensor
    target_C: Tensor
    had_CH: Tensor
    """Items that are left out of the ranking, 0 for none: what the user has had, where serving leaves that out."""
    band_V: Tensor
    """Each item's band of train events, as gates go by."""
    group_C: Tensor
    tried: Callable[[], None] = lambda: None
    """Called whenever the cases were ranked with other weights."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A part's side of the sample: scores are user_CD @ table_VD.T."""

    user_CD: Tensor
    table_VD: Tensor


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the search came to."""

    weights: Weights
    relative: dict[str, float]
    """Weights in standard deviations of each part's scores."""
    ndcg: dict[str, float]
    """NDCG@10 on validation cases: overall, cold, tail and head (those that have cases)."""
    alone: dict[str, float]
    """The same overall, of each part alone."""
    curve: tuple[dict[str, Any], ...] = field(repr=False)
    """Each step taken: what was changed, to what, and NDCG@10 after it."""
    cases: int
    note: str = ""


def sample_cases(
    events: Histories, counts_V: Tensor, *, max_len: int, unseen: bool, width: int, tried: Callable[[], None] = lambda: None
) -> Sample:
    """All events of the validation part, each with what came before it; spread evenly where there are more than are taken.

    `width` is that of all parts together: with the catalogue it says how many cases can be afforded.
    """
    device = events.items_N.device
    users_C, position_C = cases(events, "valid", every=True)
    afford = PRODUCTS[device.type if device.type in PRODUCTS else "cuda"] // (width * (events.catalogue + 1))
    some = torch.linspace(0, max(len(users_C) - 1, 0), min(len(users_C), CASES, max(LEAST, afford)), device=device).long()
    users_C, position_C = users_C[some], position_C[some]
    longest = int(position_C.max()) if unseen and len(position_C) else 1
    target_C = targets(events, users_C, position_C)
    had_CH = inputs_before(events, users_C, position_C, longest)
    return Sample(
        input_CL=inputs_before(events, users_C, position_C, max_len),
        target_C=target_C,
        # a repeat can still be foretold
        had_CH=had_CH * (had_CH != target_C[:, None]) if unseen else torch.zeros_like(had_CH),
        band_V=torch.bucketize(counts_V, torch.tensor(BANDS, device=device), right=True),
        group_C=item_groups(counts_V)[target_C],
        tried=tried,
    )


@torch.no_grad()
def scored(sample: Sample, table_VD: Tensor, encode: Callable[[Tensor, Tensor], Tensor]) -> Scores:
    """A part's side, from its item vectors and what makes user vectors of histories of them."""
    inputs = torch.split(sample.input_CL, 2048)
    users = [encode(F.embedding(input_BL, table_VD), input_BL != 0).float() for input_BL in inputs]
    return Scores(user_CD=torch.cat(users) if users else table_VD[:0], table_VD=table_VD)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A part's scores of each case's candidates, in standard deviations."""

    other_CM: Tensor
    own_C: Tensor
    common_CM: Tensor
    """Scores of the mean user vector, which centring takes away."""
    common_own_C: Tensor
    spread: float
    """Standard deviation of the part's raw scores."""


@torch.no_grad()
def candidates(sample: Sample, parts: Sequence[Scores]) -> tuple[Tensor, list[Column]]:
    """item_CM, the best of all parts for each case (0 for none, each item once, the target and what was had left out), and the
    parts' scores of them."""
    rows = len(parts[0].table_VD)
    most = TOP.get(sample.target_C.device.type, TOP["cpu"])
    step = max(1, HELD // (rows * len(parts)))
    found: list[list[Tensor]] = []
    square = [0.0] * len(parts)
    for start in range(0, len(sample.target_C), step):
        some = slice(start, start + step)
        scores = [part.user_CD[some] @ part.table_VD.T for part in parts]
        square = [
            total + float(score_BV[:, 1:].var(1, unbiased=False).sum()) for total, score_BV in zip(square, scores, strict=True)
        ]
        out_BV = torch.zeros(len(scores[0]), rows, dtype=torch.bool, device=scores[0].device)
        out_BV.scatter_(1, sample.had_CH[some], True).scatter_(1, sample.target_C[some, None], True)
        out_BV[:, 0] = True
        best = [score_BV.masked_fill(out_BV, -torch.inf).topk(min(most, rows)) for score_BV in scores]
        item_BM = torch.cat([top.indices * (top.values > -torch.inf) for top in best], dim=1).sort(1).values
        item_BM[:, 1:] *= item_BM[:, 1:] != item_BM[:, :-1].clone()
        found.append([item_BM, *(score_BV.gather(1, item_BM) for score_BV in scores)])
    item_CM = torch.cat([parts_of[0] for parts_of in found])
    columns = []
    for number, part in enumerate(parts):
        spread = (square[number] / max(1, len(sample.target_C))) ** 0.5 or 1.0
        common_V = part.table_VD @ part.user_CD.mean(0) / spread
        columns.append(Column(
            other_CM=torch.cat([parts_of[number + 1] for parts_of in found]) / spread,
            own_C=(part.user_CD * part.table_VD[sample.target_C]).sum(1) / spread,
            common_CM=common_V[item_CM], common_own_C=common_V[sample.target_C], spread=spread,
        ))  # fmt: skip
    return item_CM, columns


@dataclass(frozen=True)
class Point:
    """A place in the search."""

    weight: tuple[float, ...]
    gates: tuple[float, ...]
    centre: tuple[float, ...]


class Search:
    """Ranks the sample at any point."""

    def __init__(self, sample: Sample, scores: Mapping[str, Scores]) -> None:
        self.sample, self.names = sample, list(scores)
        item_CM, self.columns = candidates(sample, list(scores.values()))
        self.none_CM, self.band_CM = item_CM == 0, sample.band_V[item_CM]
        self.tried: dict[Point, float] = {}
        groups = [sample.group_C == group for group in (COLD, TAIL, HEAD)]
        self.groups = [mine_C for mine_C in groups if int(mine_C.sum()) >= LEAST_IN_BAND]

    def ndcg_C(self, point: Point) -> Tensor:
        """NDCG@10 of each case."""
        gates = torch.tensor(point.gates, device=self.sample.band_V.device)
        total_CM, own_C = torch.zeros_like(self.columns[0].other_CM), torch.zeros_like(self.columns[0].own_C)
        for name, weight, centre, column in zip(self.names, point.weight, point.centre, self.columns, strict=True):
            if not weight:
                continue
            other_CM, one_C = column.other_CM, column.own_C
            if centre:
                other_CM, one_C = other_CM - centre * column.common_CM, one_C - centre * column.common_own_C
            if name == GATED and point.gates != OPEN:
                other_CM, one_C = other_CM * gates[self.band_CM], one_C * gates[self.sample.band_V[self.sample.target_C]]
            total_CM.add_(other_CM, alpha=weight)
            own_C = own_C + weight * one_C
        total_CM.masked_fill_(self.none_CM, -torch.inf)
        rank_C2 = block((total_CM > own_C[:, None]).sum(1), (total_CM == own_C[:, None]).sum(1))
        return by_rank(rank_C2)["ndcg"]

    def value(self, point: Point) -> float:
        """The goal: NDCG@10, in part over groups of items; each point is ranked once."""
        if point not in self.tried:
            ndcg_C = self.ndcg_C(point)
            self.sample.tried()
            groups = [float(ndcg_C[mine_C].mean()) for mine_C in self.groups]
            balance = BALANCE if groups else 0.0
            self.tried[point] = (1 - balance) * float(ndcg_C.mean()) + balance * sum(groups) / max(1, len(groups))
        return self.tried[point]

    def noise(self, new: Point, old: Point) -> float:
        """Standard error of the difference between two points: what a part must gain to come in at all."""
        less_C = self.ndcg_C(new) - self.ndcg_C(old)
        error: float = float(less_C.std()) / max(1, len(less_C)) ** 0.5
        return error

    def by_group(self, point: Point) -> dict[str, float]:
        """NDCG@10 overall and by the target's group."""
        ndcg_C = self.ndcg_C(point)
        found = {"overall": float(ndcg_C.mean())}
        for name, group in (("cold", COLD), ("tail", TAIL), ("head", HEAD)):
            mine_C = self.sample.group_C == group
            if bool(mine_C.any()):
                found[name] = float(ndcg_C[mine_C].mean())
        return found


def search(
    sample: Sample,
    scores: Mapping[str, Scores],
    *,
    centred: Sequence[str] = (),
    gated: bool = True,
    barred: str = "",
    reach: Sequence[str] = (),
) -> Found:
    """Weights, gates and centring, one coordinate after the other until none gains.

    A band of items with too few cases keeps gate 1. With fewer than LEAST cases the default weights stand, and the note says so.
    The part `barred` is not tried. Where none of the parts `reach` gains, the first that is there gets weight FAINT.
    """
    names = list(scores)
    run = Search(sample, scores)
    zero, ones = (0.0,) * len(names), OPEN
    if len(sample.target_C) < LEAST:
        point = Point(tuple(DEFAULTS.get(name, 1.0) for name in names), ones, zero)
        note = f"{len(sample.target_C)} validation cases are too few to choose weights (under {LEAST}): the defaults stand"
        return found_at(run, point, {}, [], note)
    alone = {name: run.value(Point(tuple(float(other == name) for other in names), ones, zero)) for name in names}
    order = sorted((n for n, name in enumerate(names) if name != barred), key=lambda number: -alone[names[number]])
    # the best part first, then the others in turn: from equal weights a search ends where two parts that know the same hold out
    point, curve = Point(tuple(float(number == order[0]) for number in range(len(names))), ones, zero), list[dict[str, Any]]()
    curve.append({"part": names[order[0]], "to": 1.0, "ndcg": run.value(point)})
    for turn in range(ROUNDS):
        before = point
        point = weighed(run, point, order[1:] if turn == 0 else order, curve)
        if gated and GATED in names and point.weight[names.index(GATED)]:
            for band in bands_to_try(sample):
                options = [replaced(point, "gates", band, value) for value in GATES]
                point = better(run, point, options, f"gate {band}", curve)
        for number, name in enumerate(names):
            if name in centred and point.weight[number]:
                options = [replaced(point, "centre", number, value) for value in CENTRES]
                point = better(run, point, options, f"centre of {name}", curve)
        if point == before:
            break
    return found_at(run, reaching(run, point, reach, curve), alone, curve, "")


def weighed(run: Search, point: Point, numbers: Sequence[int], curve: list[dict[str, Any]]) -> Point:
    """The point after one look at the weight of each of some parts."""
    for number in numbers:
        factors = GRID if not point.weight[number] else (0.0, *(factor * point.weight[number] for factor in FACTORS))
        options = [
            replaced(point, "weight", number, value) for value in factors if value or sum(point.weight) > point.weight[number]
        ]
        point = better(run, point, options, run.names[number], curve)
    return point


def reaching(run: Search, point: Point, reach: Sequence[str], curve: list[dict[str, Any]]) -> Point:
    """The point, with a faint weight for the first of the parts `reach` where none of them has one.

    An item that nobody has touched yet has a vector in these parts alone, and without one it could not be served at all.
    """
    numbers = [run.names.index(name) for name in reach if name in run.names]
    if not numbers or any(point.weight[number] for number in numbers):
        return point
    point = replaced(point, "weight", numbers[0], FAINT)
    curve.append({"part": run.names[numbers[0]], "to": FAINT, "ndcg": run.value(point)})
    return point


def bands_to_try(sample: Sample) -> list[int]:
    """Bands with enough cases to choose a gate by; the fullest one is what the others are told against."""
    cases_S = torch.bincount(sample.band_V[sample.target_C], minlength=len(BANDS) + 1).tolist()
    fullest = max(range(len(cases_S)), key=lambda band: cases_S[band])
    return [band for band, count in enumerate(cases_S) if count >= LEAST_IN_BAND and band != fullest]


def replaced(point: Point, what: str, number: int, value: float) -> Point:
    """The point with one coordinate changed."""
    changed = list(getattr(point, what))
    changed[number] = value
    return Point(**{"weight": point.weight, "gates": point.gates, "centre": point.centre, what: tuple(changed)})


def better(run: Search, point: Point, options: Sequence[Point], name: str, curve: list[dict[str, Any]]) -> Point:
    """The best of the options if it gains, else the point."""
    best = max(options, key=run.value)
    if run.value(best) <= run.value(point) + (run.noise(best, point) if adds(best, point) else GAIN):
        return point
    changed = next(new for what in ("weight", "gates", "centre")
                   for new, old in zip(getattr(best, what), getattr(point, what), strict=True) if new != old)  # fmt: skip
    curve.append({"part": name, "to": changed, "ndcg": run.value(best)})
    return best


def adds(new: Point, old: Point) -> bool:
    """Whether a part comes in that had no weight."""
    return any(one and not other for one, other in zip(new.weight, old.weight, strict=True))


def found_at(run: Search, point: Point, alone: dict[str, float], curve: list[dict[str, Any]], note: str) -> Found:
    """The weights of a point, for the artifact."""
    relative = dict(zip(run.names, point.weight, strict=True))
    scale = {name: weight / column.spread for (name, weight), column in zip(relative.items(), run.columns, strict=True)}
    centre = {name: value for name, value in zip(run.names, point.centre, strict=True) if value and relative[name]}
    return Found(
        weights=Weights(scale=scale, gates=point.gates, centre=centre),
        relative=relative,
        ndcg=run.by_group(point) if len(run.sample.target_C) else {},
        alone=alone,
        curve=tuple(curve),
        cases=len(run.sample.target_C),
        note=note,
    )
