"""Measures the gate itself: how often it lets a loss of just the margin pass, and how often it lets an equal challenger pass.

    python tests/benchmarks/bench_gates.py --draws 20000
    python tests/benchmarks/bench_gates.py --scenarios rare,cluster --sizes 30,1000 --draws 2000

Worlds are drawn, so the truth is known. In each the challenger keeps exactly 1 - margin of the champion's NDCG@10, so that
passing is an error; worlds differ in how it loses. Prints, for each world and number of users, the share passed by the gate and
by a plain interval (mean difference and 1.96 standard errors, which a percentile bootstrap comes to); then power for an equal
challenger beside the sample that the gate asks for.
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


def rates(name: str, users: int, rate: float, margin: float, truth: float, draws: int, seed: int) -> tuple[float, float, int]:
    """Shares passed by the gate and by a plain interval where the challenger truly loses `truth`, and the draws they rest on."""
    width = users if name.startswith("cluster") else max(5, int(2 * users * rate))
    draws = min(draws, max(400, VALUES // width))
    rng, step = np.random.default_rng(seed), max(1, HELD // width)
    passed = naive = 0
    for start in range(0, draws, step):
        challenger_RU, champion_RU = world(name, rng, min(step, draws - start), users, rate, truth)
        passed += int(above(challenger_RU, champion_RU, 1 - margin).sum())
        naive += int(plain(challenger_RU, champion_RU, margin, users).sum())
    return passed / draws, naive / draws, draws


def false_passes(worlds: list[str], sizes: list[int], draws: int) -> dict[str, float]:
    """Prints the share of false passes, the worst of all rates and margins; gives the worst of all."""
    print(f"{'world':<14}{'users':>8}{'gate %':>9}{'plain %':>9}   worst at (hit rate, margin); two standard errors")
    worst: dict[str, float] = {}
    for name in worlds:
        for users in sizes:
            found = {
                (rate, margin): rates(name, users, rate, margin, margin, draws, users)
                for rate in RATES for margin in MARGINS
            }  # fmt: skip
            where = max(found, key=lambda key: found[key][0])
            gate, count = found[where][0], found[where][2]
            error = 2 * math.sqrt(max(gate, 1 / count) * (1 - gate) / count)
            naive = max(share for _, share, _ in found.values())
            print(f"{name:<14}{users:>8}{100 * gate:>9.2f}{100 * naive:>9.2f}   {where} ± {100 * error:.2f}", flush=True)
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


def main() -> None:
    """Prints the tables, then one JSON line with the worst false pass of each world."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", default=",".join(WORLDS))
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--draws", type=int, default=20_000)
    parser.add_argument("--no-power", action="store_true")
    arguments = parser.parse_args()
    worlds, sizes = arguments.scenarios.split(","), [int(size) for size in arguments.sizes.split(",")]
    small = rates("rare", 40, 0.05, 0.02, 0.3, arguments.draws, 0)
    print(f"40 users, hit rate .05, a true loss of 30 %: gate {100 * small[0]:.2f} %, plain interval {100 * small[1]:.2f} %\n")
    worst = false_passes(worlds, sizes, arguments.draws)
    if not arguments.no_power:
        powers([name for name in worlds if name in ("seeds", "apart", "cluster")], [], arguments.draws)
    print(json.dumps({"worst_false_pass": worst}))


if __name__ == "__main__":
    main()
