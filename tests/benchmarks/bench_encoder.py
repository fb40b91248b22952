"""Measures which way of tuning an encoder pays, in the currency that matters: ranks without training, and under the fused model.

python tests/benchmarks/bench_encoder.py tune --data ../shared/data/amazon_beauty --out encoded --rows views,pairs_white --seed 42
    tunes one encoder a row by the production code, a tenth of the items held out of what users teach; the best step is that of
    the highest NDCG on validation events. Keeps every item's embedding in OUT/ROW-SEED.safetensors; prints one JSON line
python tests/benchmarks/bench_encoder.py compare --data ../shared/data/amazon_beauty --encoded encoded
    ranks of test events without any training, plain and whitened, beside TF-IDF; differences with 95 % intervals, users and
    seeds resampled together
python tests/benchmarks/bench_encoder.py fused --ranks fused-zero fused-pairs
    two folders of `bench_fusion.py rank`, over two encoders: what the second has more under each model

Needs torch, transformers, peft, numpy, pyarrow and scikit-learn only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.behaviour.data import Histories, followers, held_out, without_items
from models.judge.evaluation import SLICES, make_cases
from models.judge.metrics import by_rank
from models.judge.text_floor import text_ranks, tfidf_table
from models.judge.untrained import Trial, untrained_ndcg
from models.text.embedding import embed_items
from models.text.encoder import Encoder
from models.text.prompts import Attributes, FieldPolicy
from models.text.scft import Scft, fine_tune
from models.text.scft_batches import Pairs, shuffle_texts
from tests.benchmarks.bench_fusion import interval, resampled
from tests.benchmarks.bench_quality import COLD_SEED, COLD_SHARE, fresh, quietly, read_items
from tests.benchmarks.bench_rat import load

PAIRS: dict[str, Any] = {"pair_share": 1.0, "ratio": 0.0, "temperature": 0.1, "learning_rate": 4e-4}
ROWS: dict[str, dict[str, Any]] = {
    "zero": {"steps": 0},
    "views": {},
    "views_slow": {"learning_rate": 1e-4},
    "views_white": {"whiten": True},
    "views_white_slow": {"whiten": True, "learning_rate": 1e-4},
    "pairs": PAIRS,
    "pairs_white": {**PAIRS, "whiten": True},
    "pairs_white_slow": {**PAIRS, "whiten": True, "learning_rate": 2e-4},
    "pairs_white_popular": {**PAIRS, "whiten": True, "popularity": 0.0},
    "shuffled": {**PAIRS, "whiten": True},
}
"""What each row changes of SCFT; `shuffled` learns from shuffled texts and reads true ones."""
SHOWN = ("overall", "tail", "cold", "head")


def events_of(arguments: argparse.Namespace) -> Histories:
    """The logs, without the events of items held out as cold, on the CPU."""
    item_ids = pq.read_table(arguments.data / "items.parquet", columns=["item_id"])["item_id"].to_pylist()
    return without_items(load(arguments.data, "cpu"), held_out(item_ids, COLD_SHARE, COLD_SEED))


def trial_of(events: Histories, part: Any, device: str) -> Trial:
    """All cases of a part over the whole catalogue."""
    cases = make_cases(events.to(device), part, negatives=1, paper_tail=4, chunk=4096, seed=COLD_SEED, unseen=True)
    return Trial(rows_N=torch.arange(events.catalogue), cases=cases)


# ------------------------------------------------------------------------------------------------------------------- tune


def tune(arguments: argparse.Namespace) -> dict[str, Any]:
    """Tunes each row with one seed."""
    items, events = read_items(arguments.data), events_of(arguments)
    index_P = followers(events)
    pair_P2 = torch.stack([events.items_N[index_P - 1], events.items_N[index_P]], dim=1).numpy() - 1
    pairs = Pairs(pair_P2=pair_P2, user_P=events.user_N[index_P].numpy())
    valid = trial_of(events, "valid", arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for row in arguments.rows:
        try:
            found[row] = tuned(arguments, row, items, pairs, valid)
        except Exception as error:  # the other rows are not lost
            found[row] = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(f"{row}-{arguments.seed}: {json.dumps(found[row])}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    return {"seed": arguments.seed, "base": arguments.base, "layers": arguments.layers, **found}


def tuned(arguments: argparse.Namespace, row: str, items: list[Attributes], pairs: Pairs, valid: Trial) -> dict[str, Any]:
    """One row's encoder: its embeddings are kept; the course of its worth on validation events."""
    began, settings = time.perf_counter(), {"steps": arguments.steps, "batch": arguments.batch, **ROWS[row]}
    config = Scft(validate_every=max(1, arguments.steps // 4), patience=99, compile=arguments.compile, **settings)
    policy = FieldPolicy(domain=arguments.domain)
    encoder = fresh(arguments.base, policy, "mean", arguments.layers, arguments.seed, torch.device(arguments.device))
    texts = encoder.tokenize(shuffle_texts(items, arguments.seed) if row == "shuffled" else items)

    def worth(encoder: Encoder) -> float:
        return float(untrained_ndcg(valid, torch.from_numpy(embed_items(encoder, items))).mean())

    told: dict[str, Any] = {}
    if config.steps:
        own = pairs if config.pair_share else None
        done = fine_tune(encoder, texts, config, seed=arguments.seed, log=quietly, pairs=own, worth=worth)
        told = {"best_step": done.best_step, "tokens_per_s": round(done.tokens_per_second),
                "worth": {int(entry["step"]): round(entry["worth"], 5) for entry in done.history}}  # fmt: skip
    llm_NE = torch.from_numpy(embed_items(encoder.eval(), items))
    save_file({"llm_NE": llm_NE.half()}, arguments.out / f"{row}-{arguments.seed}.safetensors")
    return told | {"seconds": round(time.perf_counter() - began, 1)}


# ---------------------------------------------------------------------------------------------------------------- compare


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each row's NDCG@10 on test events, and what it has more than `zero` and than TF-IDF."""
    events = events_of(arguments)
    test = trial_of(events, "test", arguments.device)
    rows: dict[str, dict[str, Tensor]] = {}
    for file in sorted(arguments.encoded.glob("*.safetensors")):
        name, _, seed = file.stem.rpartition("-")
        llm_NE = load_file(file)["llm_NE"].float()
        rows.setdefault(f"{name} whitened", {})[seed] = untrained_ndcg(test, llm_NE)
        table_VE = F.pad(F.normalize(llm_NE - llm_NE.mean(0), dim=1), (0, 0, 1, 0)).to(arguments.device)
        rows.setdefault(f"{name} plain", {})[seed] = by_rank(text_ranks(test.cases, table_VE)[0])["ndcg"].cpu()
    texts = ["; ".join(value for _, value in item) for item in read_items(arguments.data)]
    tfidf_VD = tfidf_table(texts)
    assert tfidf_VD is not None
    rows["tfidf"] = {"": by_rank(text_ranks(test.cases, tfidf_VD.to(arguments.device))[0])["ndcg"].cpu()}
    most = max(len(seeds) for seeds in rows.values())
    # what has no seeds of its own stands beside each seed of the others
    ndcg = {name: torch.stack((list(seeds.values()) * most)[:most]).float() for name, seeds in rows.items()}
    slices = {name: test.cases.slices_SC[SLICES.index(name)].cpu() for name in SHOWN}
    table = {name: {key: round(float(value[:, mine].mean()), 4) for key, mine in slices.items()} for name, value in ndcg.items()}
    pairs = [(name, other) for name in ndcg for other in ("zero whitened", "zero plain", "tfidf")
             if other in ndcg and name != other and name.rpartition(" ")[2] in (*other.split(), "whitened")]  # fmt: skip
    return {
        "seeds": {name: sorted(seeds) for name, seeds in rows.items()},
        "users": {name: int(mine.sum()) for name, mine in slices.items()},
        "ndcg": table,
        "differences": {f"{one} - {other}": differences(ndcg[one], ndcg[other], slices) for one, other in pairs},
    }


def differences(one_SC: Tensor, other_SC: Tensor, slices: dict[str, Tensor]) -> dict[str, list[float]]:
    """Mean difference of two rows and its 95 % interval, by slice."""
    both = torch.stack([one_SC, other_SC])
    result = {}
    for name, mine in slices.items():
        mean_RM = resampled(both[:, :, mine])
        result[name] = interval(one_SC - other_SC, mine, mean_RM[:, 0] - mean_RM[:, 1])
    return result


# ------------------------------------------------------------------------------------------------------------------ fused


def fused(arguments: argparse.Namespace) -> dict[str, Any]:
    """The second folder's ranks less the first's, for each model that both have, among unseen items."""
    first, second = arguments.ranks
    names = sorted({file.name for file in first.glob("*.safetensors")} & {file.name for file in second.glob("*.safetensors")})
    found = [(load_file(first / name), load_file(second / name)) for name in names]
    slices_SC = found[0][0]["slices"].bool()
    slices = {name: slices_SC[SLICES.index(name)] for name in SHOWN if bool(slices_SC[SLICES.index(name)].any())}
    models = [
        key for key in sorted(found[0][0]) if key.endswith("/unseen") and all(key in one and key in two for one, two in found)
    ]
    result: dict[str, Any] = {"files": names}
    for model in models:
        one_SC, two_SC = (torch.stack([by_rank(pair[place][model])["ndcg"] for pair in found]).float() for place in (0, 1))
        result[model.removesuffix("/unseen")] = {
            "first": round(float(one_SC.mean()), 4), "second": round(float(two_SC.mean()), 4),
            "second - first": differences(two_SC, one_SC, slices),
        }  # fmt: skip
    return result


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first, second, third = (commands.add_parser(name) for name in ("tune", "compare", "fused"))
    for command in (first, second):
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    first.add_argument("--out", type=Path, required=True)
    first.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS), help=f"some of {', '.join(ROWS)}")
    first.add_argument("--seed", type=int, default=42)
    first.add_argument("--base", default="embedded")
    first.add_argument("--layers", type=int, default=0, help="layers of the base in use, from the bottom; 0 is all")
    first.add_argument("--domain", default="The beauty product has the following attributes:")
    first.add_argument("--steps", type=int, default=240)
    first.add_argument("--batch", type=int, default=384)
    first.add_argument("--compile", action="store_true", help="compiles the layers; pays in trainings of some minutes")
    second.add_argument("--encoded", type=Path, required=True)
    third.add_argument("--ranks", type=Path, nargs=2, required=True, help="two folders of bench_fusion.py rank")
    return parser.parse_args()


def main() -> None:
    """Prints one JSON line."""
    arguments = parse()
    found = {"tune": tune, "compare": compare, "fused": fused}[arguments.command](arguments)
    device = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__}
    print(json.dumps(device | found))


if __name__ == "__main__":
    main()
