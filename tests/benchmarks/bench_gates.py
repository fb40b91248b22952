"""Measures the gate itself: how often it lets a loss of just the margin pass, and how often it lets an equal challenger pass.

    python tests/benchmarks/bench_gates.py --draws 20000
    python tests/benchmarks/bench_gates.py --scenarios rare,cluster --sizes 30,1000 --draws 2000
    python tests/benchmarks/bench_gates.py --joint 100000,300000,1000000

Worlds are drawn, so the truth is known. In each the challenger keeps exactly 1 - margin of the champion's NDCG@10, so that
passing is an error; worlds differ in how it loses. Prints, for each world and number of users, the share passed by the gate and
by a plain interval (mean difference and 1.96 standard errors, which a percentile bootstrap comes to). The worst of four cells
lies above the truth by its choice alone, so that cell is drawn again, from another seed and four times as often: that figure
counts. Then power for an equal challenger at the sample that the gate asks for. `--joint` draws one world with all slices of the
recipe's defaults and a reference, and prints how often an equal challenger passes each gate, and all of them.
Needs NumPy only.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parents[2]))

from models.judge.gates import above, compare

Array = npt.NDArray[np.float64]
GAIN = 1 / np.log2(np.arange(1, 11) + 1)
"""NDCG of a hit at ranks 1 to 10."""
SIZES = (30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)
RATES, MARGINS = (0.05, 0.2), (0.02, 0.1)
HEAVIEST = 10
VALUES = 100_000_000
"""Values drawn in all for one figure: fewer draws of large worlds."""
HELD = 3_000_000
"""Values drawn at once."""


def hits(rng: np.random.Generator, draws: int, users: int, rate: float) -> npt.NDArray[np.int64]:
    """rank_RU (0 to 9) of users who have a hit, -1 where there is none; users without one are left out."""
    count_R = rng.binomial(users, rate, draws)
    width = max(1, int(count_R.max()))
    return np.where(np.arange(width) < count_R[:, None], rng.integers(0, 10, (draws, width)), -1)


def gains(rank_RU: npt.NDArray[np.int64]) -> Array:
    """NDCG of ranks; 0 for none."""
    return np.where(rank_RU >= 0, GAIN[np.clip(rank_RU, 0, 9)], 0.0)


def beside(first_RU: Array, second_RU: Array) -> tuple[Array, Array]:
    """Users of two kinds, one after the other: hits of the first model alone, then of the second alone."""
    zero, other = np.zeros_like(second_RU), np.zeros_like(first_RU)
    return np.concatenate([first_RU, zero], 1), np.concatenate([other, second_RU], 1)


def world(name: str, rng: np.random.Generator, draws: int, users: int, rate: float, margin: float) -> tuple[Array, Array]:
    """challenger_RU and champion_RU of a world in which the challenger keeps 1 - margin (0: is just as good)."""
    if name.startswith("cluster"):
        return clustered(name, rng, draws, users, rate, margin)
    rank_RU = hits(rng, draws, users, rate)
    champion_RU = gains(rank_RU)
    drawn_RU = rng.random(rank_RU.shape)
    if name == "rare":  # the same model, which now and then loses a hit
        return champion_RU * (drawn_RU >= margin), champion_RU
    if name == "top":  # loses only what stood first
        lost_RU = (rank_RU == 0) & (drawn_RU < margin * GAIN.mean() * 10 / GAIN[0])
        return champion_RU * ~lost_RU, champion_RU
    if name == "skew":  # a little better on most hits, and loses some wholly
        better_RU = gains(np.where(rank_RU > 0, rank_RU - 1, rank_RU))
        kept = (1 - margin) * GAIN.mean() / GAIN[np.maximum(np.arange(10) - 1, 0)].mean()
        return better_RU * (drawn_RU < kept), champion_RU
    if name == "apart":  # two models that hit different users
        return beside(gains(hits(rng, draws, users, rate * (1 - margin))), champion_RU)
    # two seeds of one model: three hits in ten are others, the rest moves by up to two ranks
    moved_RU = np.where(rank_RU >= 0, np.clip(rank_RU + rng.integers(-2, 3, rank_RU.shape), 0, 9), -1)
    stay = np.mean([GAIN[min(max(rank + step, 0), 9)] for rank in range(10) for step in range(-2, 3)])
    new_RU = gains(hits(rng, draws, users, rate * ((1 - margin) * GAIN.mean() - 0.7 * stay) / GAIN.mean()))
    both = np.concatenate([gains(moved_RU) * (drawn_RU >= 0.3), new_RU], 1)
    return both, np.concatenate([champion_RU, np.zeros_like(new_RU)], 1)


def clustered(name: str, rng: np.random.Generator, draws: int, users: int, rate: float, margin: float) -> tuple[Array, Array]:
    """The same where users have 1 to over 100 cases each and are more or less foreseeable as a whole."""
    cases_RU = np.maximum(1, np.exp(rng.normal(0.8, 1.2, (draws, users)))).astype(np.int64)
    weight_RU = np.minimum(1.0, HEAVIEST / cases_RU)
    chance_RU = rng.beta(4 * rate, 4 * (1 - rate), (draws, users))
    champion_RU = rng.binomial(cases_RU, chance_RU) * weight_RU
    if name == "cluster_lost":  # whole users are lost
        return champion_RU * (rng.random(champion_RU.shape) >= margin), champion_RU
    return rng.binomial(cases_RU, chance_RU * (1 - margin)) * weight_RU, champion_RU


WORLDS = ("rare", "top", "skew", "apart", "seeds", "cluster", "cluster_lost")


def plain(challenger_RU: Array, champion_RU: Array, margin: float, users: int) -> npt.NDArray[np.bool_]:
    """Whether the 95 % interval of the mean difference lies above the loss allowed, as a percentile bootstrap would have it."""
    less_RU = challenger_RU - champion_RU
    mean_R = less_RU.sum(1) / users
    error_R = np.sqrt(((less_RU**2).sum(1) / users - mean_R**2).clip(0) / users)
    passed: npt.NDArray[np.bool_] = mean_R - 1.96 * error_R >= -margin * champion_RU.sum(1) / users
    return passed


def rates(
    name: str, users: int, rate: float, margin: float, truth: float, draws: int, seed: int, times: int = 1
) -> tuple[float, float, int]:
    """Shares passed by the gate and by a plain interval where the challenger truly loses `truth`, and the draws they rest on.

    Drawn so many `times` as often as `draws` and the bound on values say.
    """
    width = users if name.startswith("cluster") else max(5, int(2 * users * rate))
    draws = times * min(draws, max(400, VALUES // width))
    rng, step = np.random.default_rng(seed), max(1, HELD // width)
    passed = naive = 0
    for start in range(0, draws, step):
        challenger_RU, champion_RU = world(name, rng, min(step, draws - start), users, rate, truth)
        passed += int(above(challenger_RU, champion_RU, 1 - margin).sum())
        naive += int(plain(challenger_RU, champion_RU, margin, users).sum())
    return passed / draws, naive / draws, draws


def false_passes(worlds: list[str], sizes: list[int], draws: int) -> dict[str, float]:
    """Prints the share of false passes, the worst of all rates and margins, and that one drawn again; the worst of these."""
    print(f"{'world':<14}{'users':>8}{'worst %':>9}{'again %':>9}{'± 2 se':>8}{'plain %':>9}   worst at (hit rate, margin)")
    worst: dict[str, float] = {}
    for name in worlds:
        for users in sizes:
            found = {
                (rate, margin): rates(name, users, rate, margin, margin, draws, users)
                for rate in RATES for margin in MARGINS
            }  # fmt: skip
            where = max(found, key=lambda key: found[key][0])
            rate, margin = where
            gate, _, count = rates(name, users, rate, margin, margin, draws, users + 7, 4)
            error = 2 * math.sqrt(max(gate, 1 / count) * (1 - gate) / count)
            naive = max(share for _, share, _ in found.values())
            shown = f"{100 * found[where][0]:>9.2f}{100 * gate:>9.2f}{100 * error:>8.2f}{100 * naive:>9.2f}   {where}"
            print(f"{name:<14}{users:>8}{shown}", flush=True)
            worst[name] = max(worst.get(name, 0.0), gate)
    return worst


def powers(worlds: list[str], sizes: list[int], draws: int) -> None:
    """Prints how often an equal challenger passes, and the users that the gate says it needs."""
    print(f"\n{'equal in':<14}{'users':>8}{'rate':>6}{'margin':>8}{'passes %':>10}{'needed':>10}")
    for name in worlds:
        for rate in RATES:
            for margin in (0.02, 0.05, 0.1, 0.2):
                challenger_RU, champion_RU = world(name, np.random.default_rng(0), 1, 100_000, rate, 0.0)
                users = 100_000
                padded = [np.zeros(users), np.zeros(users)]
                for target, values_RU in zip(padded, (challenger_RU, champion_RU), strict=True):
                    target[: values_RU.shape[1]] = values_RU[0]
                needed = compare(*padded, np.ones(users, dtype=np.int64), margin=margin).needed
                for size in [*sizes, int(needed)]:
                    share = rates(name, size, rate, margin, 0.0, min(draws, 2000), size)[0]
                    if 0.02 < share < 0.999 or size == int(needed):
                        print(f"{name:<14}{size:>8}{rate:>6}{margin:>8}{100 * share:>10.1f}{int(needed):>10}", flush=True)


MARGINS_OF = {"overall": 0.02, "tail": 0.05, "cold": 0.1, "short": 0.03}
"""The defaults of `promote.margins`."""
PARTS = {"body": (0.65, 1.0), "tail": (0.3, 0.5), "cold": (0.05, 0.3)}
"""Shares of the events, and how foreseeable they are beside the body."""
SAME = 0.7
"""Hits that two equally good models share."""


def joint(users: int, rate: float, draws: int) -> dict[str, float]:
    """How often a challenger that is just as good passes each gate of the defaults, all against the champion, and all."""
    rng, passed = np.random.default_rng(users), dict[str, int]()
    for _ in range(draws):
        ok = {}
        for name, (champion_U, challenger_U, reference_U) in sliced(rng, users, rate).items():
            margin = MARGINS_OF[name]
            ok[name] = bool(above(challenger_U[None], champion_U[None], 1 - margin)[0])
            ok[f"{name}, reference"] = bool(above(challenger_U[None], reference_U[None], 1 - 2 * margin)[0])
        ok["all slices"] = all(ok[name] for name in MARGINS_OF)
        for name, one in (ok | {"all gates": all(ok.values())}).items():
            passed[name] = passed.get(name, 0) + one
    return {name: count / draws for name, count in passed.items()}


def sliced(rng: np.random.Generator, users: int, rate: float) -> dict[str, list[Array]]:
    """Slice -> values of champion, challenger and reference by user, all as good as each other.

    Users have 1 to over 100 events; three in ten are short of history, and their events make the slice `short`.
    """
    cases_U = np.maximum(1, np.exp(rng.normal(0.8, 1.2, users))).astype(np.int64)
    chance_U = rng.beta(4 * rate, 4 * (1 - rate), users).clip(0, 0.999)
    short_U = (rng.random(users) < 0.3).astype(np.int64)
    parts_UP = rng.multinomial(cases_U, [share for share, _ in PARTS.values()])
    hits = {}
    for (name, (_, worth)), count_U in zip(PARTS.items(), parts_UP.T, strict=True):
        champion_U = rng.binomial(count_U, chance_U * worth)
        hits[name] = [champion_U, *(twin(rng, champion_U, count_U, chance_U * worth) for _ in range(2))]
    whole = [sum(hits[name][model] for name in PARTS) for model in range(3)]
    found = {"overall": (whole, cases_U), "short": ([one * short_U for one in whole], cases_U)}
    found |= {name: (hits[name], parts_UP[:, place]) for place, name in enumerate(PARTS) if name != "body"}
    return {name: [one * np.minimum(1.0, HEAVIEST / count_U.clip(1)) for one in each] for name, (each, count_U) in found.items()}


def twin(rng: np.random.Generator, hits_U: Array, cases_U: Array, chance_U: Array) -> Array:
    """Hits of another model that is just as good, of which `SAME` are the same ones."""
    others_U = rng.binomial(cases_U - hits_U, ((1 - SAME) * chance_U / (1 - chance_U)).clip(0, 1))
    both_U: Array = rng.binomial(hits_U, SAME) + others_U
    return both_U


def joints(sizes: list[int], draws: int) -> None:
    """Prints `joint` for each size and hit rate."""
    for users in sizes:
        for rate in RATES:
            count = max(100, min(draws, VALUES // users))
            told = {name: round(100 * share, 1) for name, share in joint(users, rate, count).items()}
            print(json.dumps({"users": users, "rate": rate, "draws": count, "passes %": told}), flush=True)


def main() -> None:
    """Prints the tables, then one JSON line with the worst false pass of each world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", default=",".join(WORLDS))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--no-power", action="store_true")
    parser.add_argument("--joint", default="", help="numbers of users: how often an equal challenger passes all gates at once")
    arguments = parser.parse_args()
    if arguments.joint:
        joints([int(size) for size in arguments.joint.split(",")], arguments.draws)
        return
    worlds, sizes = arguments.scenarios.split(","), [int(size) for size in arguments.sizes.split(",")]
    small = rates("rare", 40, 0.05, 0.02, 0.3, arguments.draws, 0)
    print(f"40 users, hit rate .05, a true loss of 30 %: gate {100 * small[0]:.2f} %, plain interval {100 * small[1]:.2f} %\n")
    worst = false_passes(worlds, sizes, arguments.draws)
    if not arguments.no_power:
        powers([name for name in worlds if name in ("seeds", "apart", "cluster")], [], arguments.draws)
    print(json.dumps({"worst_false_pass": worst}))


if __name__ == "__main__":
    main()
