"""How much each part of a fused recommender weighs: a coordinate search on validation cases, ranked as serving ranks.

Scores are held on the device, so a step of the search is a weighted sum and a comparison. It is deterministic.

Shapes: P parts, C cases, M candidate items, V items + 1 (row 0 is padding), D width, B cases of a chunk.
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

OPEN = (1.0,) * (len(BANDS) + 1)
"""Gates that change nothing."""
GRID = (0.0, 0.125, 0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
GATES = (0.5, 0.7, 1.0, 1.4, 2.0)
CENTRES = (0.0, 0.25, 0.5, 0.75)
ROUNDS = 3
LEAST = 200
"""Validation cases below which nothing is chosen: the default weights stand."""
LEAST_IN_BAND = 50
CANDIDATES = 50_000
"""Items ranked in the search, at most; of a larger catalogue a spread sample, and each case's target."""
FLOATS = {"cuda": 2**30, "cpu": 2**27}
"""Scores held at once, over all parts."""
GAIN = 1e-5
"""A change that gains less is not taken."""
DEFAULTS: Mapping[str, float] = {"collaborative": 1.0, "llmemb": 1.0, "text": 0.7, "counting": 0.5}
"""Weights where validation can't choose: about what it chose on the data sets of BENCHMARKS.md."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A part's scores of validation cases, in standard deviations."""

    own_C: Tensor
    other_CM: Tensor
    common_M: Tensor
    """Scores of the mean user vector: what centring takes away."""
    common_own_C: Tensor
    spread: float
    """Standard deviation of the part's raw scores."""
    mean_user_D: Tensor


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Validation cases and the items that they are ranked among."""

    input_CL: Tensor
    target_C: Tensor
    candidate_M: Tensor
    hidden_CM: Tensor
    """What does not count: the target itself, and what the user has had where serving leaves that out."""
    band_V: Tensor
    group_C: Tensor


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


def sample_cases(events: Histories, counts_V: Tensor, *, max_len: int, unseen: bool, parts: int, most: int = 20_000) -> Sample:
    """Validation cases, all events of that part of each user's history, spread evenly where there are more than fit."""
    device = events.items_N.device
    users_C, position_C = cases(events, "valid", every=True)
    candidate_M = torch.arange(1, events.catalogue + 1, device=device)
    if len(candidate_M) > CANDIDATES:
        candidate_M = candidate_M[torch.linspace(0, len(candidate_M) - 1, CANDIDATES, device=device).long()]
    fit = max(1, FLOATS["cuda" if device.type == "cuda" else "cpu"] // (len(candidate_M) * (parts + 1)))
    some = torch.linspace(0, max(len(users_C) - 1, 0), min(len(users_C), most, fit), device=device).long()
    users_C, position_C = users_C[some], position_C[some]
    target_C = targets(events, users_C, position_C)
    longest = int(position_C.max()) if len(position_C) else 1
    hidden_CM = candidate_M[None] == target_C[:, None]
    if unseen:
        for start in range(0, len(users_C), 2048):
            rows = slice(start, start + 2048)
            had_BL = inputs_before(events, users_C[rows], position_C[rows], longest)
            seen_BV = torch.zeros(len(had_BL), events.catalogue + 1, dtype=torch.bool, device=device).scatter_(1, had_BL, True)
            hidden_CM[rows] |= seen_BV[:, candidate_M]
    return Sample(
        input_CL=inputs_before(events, users_C, position_C, max_len),
        target_C=target_C,
        candidate_M=candidate_M,
        hidden_CM=hidden_CM,
        band_V=torch.bucketize(counts_V, torch.tensor(BANDS, device=device), right=True),
        group_C=item_groups(counts_V)[target_C],
    )


@torch.no_grad()
def scored(sample: Sample, table_VD: Tensor, encode: Callable[[Tensor, Tensor], Tensor]) -> Scores:
    """A part's scores, from its item vectors and what makes user vectors of histories of them."""
    users = [
        encode(F.embedding(input_BL, table_VD), input_BL != 0).float() for input_BL in torch.split(sample.input_CL, 2048)
    ] or [table_VD[:0]]
    user_CD, item_MD = torch.cat(users), table_VD[sample.candidate_M]
    other_CM = user_CD @ item_MD.T
    spread = float(other_CM.std()) if other_CM.numel() > 1 else 1.0
    spread = spread if spread > 0 else 1.0
    own_C, mean_D = (user_CD * table_VD[sample.target_C]).sum(1), user_CD.mean(0)
    return Scores(
        own_C=own_C / spread,
        other_CM=other_CM.div_(spread),
        common_M=item_MD @ mean_D / spread,
        common_own_C=table_VD[sample.target_C] @ mean_D / spread,
        spread=spread,
        mean_user_D=mean_D,
    )


@dataclass(frozen=True)
class Point:
    """A place in the search."""

    weight: tuple[float, ...]
    gates: tuple[float, ...]
    centre: tuple[float, ...]


class Search:
    """Ranks the sample at any point."""

    def __init__(self, sample: Sample, scores: Mapping[str, Scores]) -> None:
        self.sample, self.scores, self.names = sample, list(scores.values()), list(scores)
        self.tried: dict[Point, float] = {}

    def ndcg_C(self, point: Point) -> Tensor:
        """NDCG@10 of each case; ties count half."""
        sample, found = self.sample, []
        gate_V = torch.tensor(point.gates, device=sample.band_V.device)[sample.band_V]
        step = max(1, 2**26 // max(1, len(sample.candidate_M)))
        for start in range(0, len(sample.target_C), step):
            rows = slice(start, start + step)
            total_BM: Tensor | None = None
            own_B = torch.zeros(len(sample.target_C[rows]), device=sample.band_V.device)
            for name, weight, centre, part in zip(self.names, point.weight, point.centre, self.scores, strict=True):
                if not weight:
                    continue
                other_BM, one_B = part.other_CM[rows], part.own_C[rows]
                if centre:
                    other_BM, one_B = other_BM - centre * part.common_M, one_B - centre * part.common_own_C[rows]
                if name == GATED:
                    other_BM, one_B = other_BM * gate_V[sample.candidate_M], one_B * gate_V[sample.target_C[rows]]
                total_BM = weight * other_BM if total_BM is None else total_BM.add_(other_BM, alpha=weight)
                own_B = own_B + weight * one_B
            if total_BM is None:
                found.append(torch.zeros_like(own_B))
                continue
            total_BM.masked_fill_(sample.hidden_CM[rows], -torch.inf)
            rank_B = 1 + (total_BM > own_B[:, None]).sum(1) + (total_BM == own_B[:, None]).sum(1) / 2
            found.append(torch.where(rank_B <= 10, 1 / (rank_B + 1).log2(), 0.0))
        return torch.cat(found)

    def value(self, point: Point) -> float:
        """Mean NDCG@10, each point ranked once."""
        if point not in self.tried:
            self.tried[point] = float(self.ndcg_C(point).mean())
        return self.tried[point]

    def by_group(self, point: Point) -> dict[str, float]:
        """NDCG@10 overall and by the target's group."""
        ndcg_C = self.ndcg_C(point)
        found = {"overall": float(ndcg_C.mean())}
        for name, group in (("cold", COLD), ("tail", TAIL), ("head", HEAD)):
            mine_C = self.sample.group_C == group
            if bool(mine_C.any()):
                found[name] = float(ndcg_C[mine_C].mean())
        return found


def search(sample: Sample, scores: Mapping[str, Scores], *, centred: Sequence[str] = (), gated: bool = True) -> Found:
    """Weights, gates and centring, one coordinate after the other until none gains.

    The part that is best alone keeps weight 1. A band of items with too few cases keeps gate 1. With fewer than LEAST cases the
    default weights stand, and the note says so.
    """
    names = list(scores)
    run = Search(sample, scores)
    zero, ones = (0.0,) * len(names), OPEN
    if len(sample.target_C) < LEAST:
        point = Point(tuple(DEFAULTS.get(name, 1.0) for name in names), ones, zero)
        note = f"{len(sample.target_C)} validation cases are too few to choose weights (under {LEAST}): the defaults stand"
        return found_at(run, point, {}, [], note)
    alone = {name: run.value(Point(tuple(float(other == name) for other in names), ones, zero)) for name in names}
    anchor = max(range(len(names)), key=lambda number: alone[names[number]])
    point, curve = Point((1.0,) * len(names), ones, zero), list[dict[str, Any]]()
    curve.append({"part": "all", "to": 1.0, "ndcg": run.value(point)})
    for _ in range(ROUNDS):
        before = point
        for number, name in enumerate(names):
            if number != anchor:
                options = [replaced(point, "weight", number, value) for value in GRID]
                point = better(run, point, options, name, curve)
        if gated and GATED in names:
            for band in bands_to_try(sample):
                options = [replaced(point, "gates", band, value) for value in GATES]
                point = better(run, point, options, f"gate {band}", curve)
        for number, name in enumerate(names):
            if name in centred and point.weight[number]:
                options = [replaced(point, "centre", number, value) for value in CENTRES]
                point = better(run, point, options, f"centre of {name}", curve)
        if point == before:
            break
    return found_at(run, point, alone, curve, "")


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
    if run.value(best) <= run.value(point) + GAIN:
        return point
    changed = next(new for what in ("weight", "gates", "centre")
                   for new, old in zip(getattr(best, what), getattr(point, what), strict=True) if new != old)  # fmt: skip
    curve.append({"part": name, "to": changed, "ndcg": run.value(best)})
    return best


def found_at(run: Search, point: Point, alone: dict[str, float], curve: list[dict[str, Any]], note: str) -> Found:
    """The weights of a point, for the artifact."""
    relative = dict(zip(run.names, point.weight, strict=True))
    scale = {name: weight / part.spread for (name, weight), part in zip(relative.items(), run.scores, strict=True)}
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
