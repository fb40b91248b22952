"""All systems and floors on one split: full ranking, all slices, paired intervals against the champion, seconds and bytes.

Users and seeds are resampled together, since both are noise. Weak users, and what it brings to route them, stand beside it.

Shapes: C cases, S seeds, M models, G slices, R resamples, V items + 1, U users.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from models.judge.bootstrap import DETECTABLE
from models.judge.evaluation import SLICES, Cases, Ranks, floor_ranks, vector_ranks
from models.judge.family import CHAMPION, FAMILY
from models.judge.metrics import by_rank
from models.judge.routing import SHARES, routes, weak_groups, weakness
from models.judge.systems import Kit
from models.judge.text_floor import text_ranks

K = 10
RESAMPLES = 1000
LEAST = 30
"""Users of a slice, below which there is no interval."""
DIGITS = 5
log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """One model's outcomes of every case, a row a seed."""

    ndcg_SC: list[Tensor] = field(default_factory=list)
    hr_SC: list[Tensor] = field(default_factory=list)
    valid_SC: list[Tensor] = field(default_factory=list)
    """NDCG of the validation cases."""
    seconds: list[float] = field(default_factory=list)
    bytes_per_item: float = 0.0
    told: list[Mapping[str, Any]] = field(default_factory=list)

    def add(self, test: Ranks, valid: Ranks, seconds: float) -> None:
        """One seed more."""
        found = by_rank(test[0], K)
        self.ndcg_SC.append(found["ndcg"].float().cpu())
        self.hr_SC.append(found["hr"].float().cpu())
        self.valid_SC.append(by_rank(valid[0], K)["ndcg"].float().cpu())
        self.seconds.append(seconds)


def held(
    kits: Callable[[int], Kit], names: Sequence[str], seeds: Sequence[int], test: Cases, valid: Cases, floor_VD: Tensor | None
) -> dict[str, Outcome]:
    """Every named system with every seed, and the floors. Raises ValueError for a name that is none."""
    if strange := set(names) - set(FAMILY):
        raise ValueError(f"bakeoff.systems names {min(strange)!r}: there are {', '.join(FAMILY)}")
    found: dict[str, Outcome] = {}
    floors = zip(floor_ranks(test).items(), floor_ranks(valid).values(), strict=True)
    for (name, ranks), valid_ranks in floors:
        found[name] = fixed(ranks, valid_ranks, len(seeds))
    if floor_VD is not None:
        found["tfidf_text"] = fixed(text_ranks(test, floor_VD), text_ranks(valid, floor_VD), len(seeds))
    for seed in seeds:
        kit = kits(seed)
        for name in names:
            for row, system in FAMILY[name](kit):
                both = [vector_ranks(cases, system.table_VD, system.encode, system.max_len) for cases in (test, valid)]
                one = found.setdefault(row, Outcome())
                one.add(both[0], both[1], system.seconds)
                one.bytes_per_item, one.told = system.bytes_per_item, [*one.told, system.told]
                log.info("seed %d  %-22s NDCG@10 %.4f  %.1f s", seed, row, float(one.ndcg_SC[-1].mean()), system.seconds)
    return found


def fixed(test: Ranks, valid: Ranks, seeds: int) -> Outcome:
    """What no seed changes."""
    one = Outcome()
    for _ in range(seeds):
        one.add(test, valid, 0.0)
    return one


def compare_systems(
    found: Mapping[str, Outcome], slices_GC: Tensor, champion: str = CHAMPION, *, seed: int = 0
) -> tuple[dict[str, dict[str, dict[str, float]]], list[dict[str, Any]]]:
    """Values by model, slice and metric; and the champion's NDCG less every other model's, by slice, with 95 % intervals.

    Raises ValueError where the champion was not made.
    """
    if champion not in found:
        raise ValueError(f"bakeoff.champion {champion!r} is none of the systems that were made: {', '.join(found)}")
    names = list(found)
    ndcg_MSC = torch.stack([torch.stack(found[name].ndcg_SC) for name in names])
    hr_MC = torch.stack([torch.stack(found[name].hr_SC).mean(0) for name in names])
    values: dict[str, dict[str, dict[str, float]]] = {name: {} for name in names}
    differences: list[dict[str, Any]] = []
    for slice_, in_C in zip(SLICES, slices_GC.cpu(), strict=True):
        users = int(in_C.sum())
        if not users:
            continue
        mean_M, hits_M = ndcg_MSC[:, :, in_C].mean((1, 2)).tolist(), hr_MC[:, in_C].mean(1).tolist()
        drawn_RM = resampled(ndcg_MSC[:, :, in_C], seed) if users >= LEAST else None
        best = names.index(champion)
        for place, name in enumerate(names):
            values[name][slice_] = {f"ndcg@{K}": round(mean_M[place], DIGITS), f"hr@{K}": round(hits_M[place], DIGITS)}
            if name != champion:
                less_R = None if drawn_RM is None else drawn_RM[:, best] - drawn_RM[:, place]
                differences.append({"against": name, "slice": slice_, "value": round(mean_M[best] - mean_M[place], DIGITS),
                                    "reference": round(mean_M[place], DIGITS), "n": users, **interval(less_R)})  # fmt: skip
    return values, differences


def resampled(ndcg_MSC: Tensor, seed: int = 0) -> Tensor:
    """mean_RM of each model in each resample; users and seeds are drawn anew, the same for all models."""
    models, seeds, cases = ndcg_MSC.shape
    generator = torch.Generator().manual_seed(seed)
    weight_RC = torch.poisson(torch.ones(RESAMPLES, cases), generator=generator)
    share_RS = torch.zeros(RESAMPLES, seeds)
    share_RS.scatter_add_(
        1, torch.randint(seeds, (RESAMPLES, seeds), generator=generator), torch.full((RESAMPLES, seeds), 1 / seeds)
    )
    total_RX = weight_RC @ ndcg_MSC.reshape(models * seeds, cases).T
    mean_RMS = (total_RX / weight_RC.sum(1, keepdim=True).clamp_min(1)).view(-1, models, seeds)
    return (mean_RMS * share_RS[:, None]).sum(2)


def interval(less_R: Tensor | None) -> dict[str, float | None]:
    """Ends of the 95 % interval, and the smallest difference that could have been shown."""
    if less_R is None:
        return {"low": None, "high": None, "detectable": None}
    low, high = less_R.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"low": round(low, DIGITS), "high": round(high, DIGITS), "detectable": round(DETECTABLE * float(less_R.std()), DIGITS)}


def rows(found: Mapping[str, Outcome], values: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """One row a model: NDCG overall with each seed, seconds, bytes, and what it told."""
    return [
        {
            "model": name,
            "ndcg": values[name]["overall"][f"ndcg@{K}"],
            "by_seed": [round(float(ndcg_C.mean()), DIGITS) for ndcg_C in one.ndcg_SC],
            "seconds": round(sum(one.seconds) / max(1, len(one.seconds)), 2),
            "bytes_per_item": one.bytes_per_item,
            "told": [dict(told) for told in one.told if told],
        }
        for name, one in found.items()
    ]


def routing(
    found: Mapping[str, Outcome], test: Cases, valid: Cases, others: Sequence[str], champion: str = CHAMPION,
    shares: Sequence[float] = SHARES,
) -> dict[str, Any]:  # fmt: skip
    """Who is weak under the champion, and what routing the weak to each other system brings; means over the seeds.

    Who is weak is told by history and validation, what it brings by test. Raises ValueError without a validation event.
    """
    users = len(test.events.train_end_U)
    valid_A = torch.full((users,), torch.nan)
    valid_A[valid.users_C.cpu()] = torch.stack(found[champion].valid_SC).mean(0)
    events, users_U = test.events.to("cpu"), test.users_C.cpu()
    signals = weakness(events, users_U, valid_A[users_U])
    main_U = torch.stack(found[champion].ndcg_SC).mean(0).double()
    told: dict[str, Any] = {
        "users": len(main_U),
        "without_validation": int(valid_A[users_U].isnan().sum()),
        "weak": {name: figures(one) for name, one in weak_groups(main_U, signals).items()},
        "routes": {},
    }
    for name in others:
        if name in found and name != champion:
            other_U = torch.stack(found[name].ndcg_SC).mean(0).double()
            told["routes"][name] = [figures(dataclasses.asdict(one)) for one in routes(main_U, other_U, signals, shares)]
    return told


def table(
    models: Sequence[Mapping[str, Any]], values: Mapping[str, Mapping[str, Mapping[str, float]]],
    differences: Sequence[Mapping[str, Any]], champion: str,
) -> Iterator[str]:  # fmt: skip
    """Lines for a person: NDCG by slice, what the champion is ahead by with its interval, seconds and bytes."""
    shown = [name for name in ("overall", "cold", "tail", "head", "short", "long") if name in values[champion]]
    ahead = {row["against"]: row for row in differences if row["slice"] == "overall"}
    yield f"  {'NDCG@10':<24}" + "".join(f"{name:>9}" for name in shown) + f"{'champion ahead by':>30}{'seconds':>9}{'bytes':>7}"
    for one in models:
        name = one["model"]
        row = ahead.get(name)
        less = "" if row is None or row["low"] is None else f"{row['value']:+.4f} ({row['low']:+.4f} to {row['high']:+.4f})"
        cells = "".join(f"{values[name][slice_][f'ndcg@{K}']:>9.4f}" for slice_ in shown)
        yield f"  {name:<24}{cells}{less:>30}{one['seconds']:>9.1f}{one['bytes_per_item']:>7.0f}"


def figures(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rounded for JSON."""
    return {name: round(value, DIGITS) if isinstance(value, float) else value for name, value in values.items()}
