"""Measures which way of tuning an encoder pays, in the currency that matters: ranks without training, and under the fused model.

python tests/benchmarks/bench_encoder.py tune --data ../shared/data/amazon_beauty --out encoded --rows views,pairs_white --seed 42
    tunes one encoder a row by the production code, a tenth of the items held out of what users teach; the best step is that of
    the highest NDCG on validation events. Keeps every item's embedding in OUT/ROW-SEED.safetensors and the NDCG of each test
    event, plain and whitened, in OUT/ndcg/ROW-SEED.safetensors; prints one JSON line
python tests/benchmarks/bench_encoder.py compare --data ../shared/data/amazon_beauty --encoded encoded
    what OUT/ndcg tells: test events ranked without any training, plain and whitened, beside TF-IDF; differences with 95 %
    intervals, users and seeds resampled together
python tests/benchmarks/bench_encoder.py fused --ranks fused-zero fused-pairs
    two folders of `bench_fusion.py rank`, over two encoders: what the second has more under each model

Needs torch, transformers, peft, numpy, pyarrow, safetensors and scikit-learn only. Rows that learn from a teacher train it first:
an ID-only SASRec by the production code, on train rows without the items held out as cold.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.behaviour.data import Histories, followers, held_out, train_counts, without_items
from models.behaviour.items import IdItems
from models.behaviour.recommender import Backbone, Recommender, build_sequence
from models.behaviour.training import Training, train
from models.judge.evaluation import SLICES, make_cases
from models.judge.metrics import by_rank
from models.judge.text_floor import text_ranks, tfidf_table
from models.judge.untrained import Trial, untrained_ndcg
from models.text.embedding import embed_items
from models.text.encoder import Encoder
from models.text.objectives import Signals
from models.text.prompts import Attributes, FieldPolicy
from models.text.scft import Scft, fine_tune
from models.text.scft_batches import Pairs, shuffle_texts
from models.text.users import users_of
from tests.benchmarks.bench_fusion import interval, pair, resampled
from tests.benchmarks.bench_quality import COLD_SEED, COLD_SHARE, fresh, quietly, read_items
from tests.benchmarks.bench_rat import load

PAIRS: dict[str, Any] = {"pair_share": 1.0, "ratio": 0.0, "temperature": 0.1, "learning_rate": 4e-4}
ALONE: dict[str, Any] = {"contrast_weight": 0.0, "ratio": 0.0}
TEACHER: dict[str, Any] = {**ALONE, "teacher_weight": 1.0}
ROWS: dict[str, dict[str, Any]] = {
    "zero": {"steps": 0},
    "views": {},
    "views_slow": {"learning_rate": 1e-4},
    "views_white": {"whiten": True},
    "views_white_slow": {"whiten": True, "learning_rate": 1e-4},
    "pairs": PAIRS,
    "pairs_slow": {**PAIRS, "learning_rate": 1e-4},
    "pairs_white": {**PAIRS, "whiten": True},
    "pairs_white_slow": {**PAIRS, "whiten": True, "learning_rate": 2e-4},
    "pairs_white_popular": {**PAIRS, "whiten": True, "popularity": 0.0},
    "zero_both": {"steps": 0, "attention": "both"},
    "pairs_white_both": {**PAIRS, "whiten": True, "attention": "both"},
    "darec": {**TEACHER, "attention": "both"},
    "darec_slow": {**TEACHER, "attention": "both", "learning_rate": 5e-5},
    "pairs_white_r32": {**PAIRS, "whiten": True, "r": 32},
    "suffix_pairs": {**PAIRS, "suffix_tokens": 8, "learning_rate": 1e-2},
    "suffix_pairs_slow": {**PAIRS, "suffix_tokens": 8, "learning_rate": 2e-3},
    "suffix_views": {"suffix_tokens": 8, "learning_rate": 1e-2},
    "teacher": TEACHER,
    "teacher_slow": {**TEACHER, "learning_rate": 5e-5},
    "p2rec": {**ALONE, "cluster_weight": 1.0, "user_weight": 1.0},
    "p2rec_slow": {**ALONE, "cluster_weight": 1.0, "user_weight": 1.0, "learning_rate": 5e-5},
    "p2rec_views": {"cluster_weight": 0.3, "user_weight": 0.3},
    "titles": {**ALONE, "title_weight": 1.0},
    "titles_slow": {**ALONE, "title_weight": 1.0, "learning_rate": 5e-5},
    "shuffled": {**PAIRS, "whiten": True},
}
"""What each row changes of SCFT and of the encoder; `shuffled` learns from shuffled texts and reads true ones.

DARec: `_both` and `darec`; Laser: `suffix_`; P2Rec: `p2rec`. Rows with `_both` and `titles` need a base that writes,
and `titles` all of its layers: a state of the eighth tells no word before it is trained to.
"""
SHAPE = ("attention", "suffix_tokens", "r")
"""Keys of a row that are the encoder's."""
CLUSTERS = 100
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
    given = Given(events, items, arguments)
    valid, test = (trial_of(events, part, arguments.device) for part in ("valid", "test"))
    (arguments.out / "ndcg").mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for row in arguments.rows:
        try:
            file = arguments.out / f"{row}-{arguments.seed}.safetensors"
            found[row], llm_NE = tuned(arguments, row, items, given, valid)
            save_file({"llm_NE": llm_NE.half()}, file)
            save_file(ranked(test, llm_NE), file.parent / "ndcg" / file.name)
        except Exception as error:  # the other rows are not lost
            found[row] = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(f"{row}-{arguments.seed}: {json.dumps(found[row])}", file=sys.stderr, flush=True)
        torch.cuda.empty_cache()
    return {"seed": arguments.seed, "base": arguments.base, "layers": arguments.layers, **found}


class Given:
    """What rows learn from beside texts. A teacher is trained where a row asks for it: an ID-only SASRec by the production code,
    on train rows without the items held out as cold."""

    def __init__(self, events: Histories, items: list[Attributes], arguments: argparse.Namespace) -> None:
        self.events, self.items, self.arguments = events, items, arguments

    def signals(self, encoder: Encoder, config: Scft) -> Signals:
        """Those that a row's settings weigh."""
        in_train_N = self.events.in_train_N
        item_N, user_N = self.events.items_N[in_train_N].numpy() - 1, self.events.user_N[in_train_N].numpy()
        titles = [dict(item).get("title", "") for item in self.items]
        return Signals(
            pairs=self.pairs() if config.pair_share else None,
            teacher_ID=self.teacher[0] if config.teacher_weight else None,
            cluster_I=self.teacher[1] if config.cluster_weight or config.user_weight else None,
            users=users_of(encoder, item_N, user_N, titles) if config.reads_users else None,
        )

    def pairs(self) -> Pairs:
        """What users took one after the other."""
        index_P = followers(self.events)
        pair_P2 = torch.stack([self.events.items_N[index_P - 1], self.events.items_N[index_P]], dim=1).numpy() - 1
        return Pairs(pair_P2=pair_P2, user_P=self.events.user_N[index_P].numpy())

    @cached_property
    def teacher(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The teacher's vectors, not a number where an item has no train event, and the clusters of their directions."""
        arguments, counts_V = self.arguments, train_counts(self.events)
        backbone = Backbone(width=arguments.teacher_width, layers=2, dropout=0.5)
        torch.manual_seed(arguments.seed)
        recommender = Recommender(IdItems(self.events.catalogue + 1, backbone.width), build_sequence(backbone))
        config = Training(epochs=arguments.teacher_epochs, patience=5, loss="full")
        among_M = counts_V.nonzero().flatten().to(arguments.device)
        done = train(recommender, self.events.to(arguments.device), config, max_len=backbone.max_len, seed=arguments.seed,
                     log=lambda *_: None, candidates_M=among_M, unseen=True)  # fmt: skip
        print(f"teacher: {done.epochs} epochs, ndcg {done.ndcg:.4f}", file=sys.stderr, flush=True)
        vector_ID = recommender.item_table().detach().float().cpu().numpy()[1:]
        known_I = counts_V[1:].numpy() > 0
        vector_ID[~known_I] = np.nan
        unit_MD = F.normalize(torch.from_numpy(vector_ID[known_I]), dim=1).numpy()
        cluster_I = np.full(len(vector_ID), -1, dtype=np.int64)
        count = min(CLUSTERS, len(unit_MD) // 4)
        cluster_I[known_I] = KMeans(count, n_init=2, random_state=arguments.seed).fit_predict(unit_MD)
        return vector_ID, cluster_I


def tuned(
    arguments: argparse.Namespace, row: str, items: list[Attributes], given: Given, valid: Trial
) -> tuple[dict[str, Any], Tensor]:
    """One row's encoder: the course of its worth on validation events, and its llm_NE."""
    began, settings = time.perf_counter(), {"steps": arguments.steps, "batch": arguments.batch, **ROWS[row]}
    shape = {name: settings.pop(name) for name in SHAPE if name in settings}
    config = Scft(validate_every=max(1, arguments.steps // 4), patience=99, compile=arguments.compile, **settings)
    policy = FieldPolicy(domain=arguments.domain)
    encoder = fresh(arguments.base, policy, "mean", arguments.layers, arguments.seed, torch.device(arguments.device), **shape)
    texts = encoder.tokenize(shuffle_texts(items, arguments.seed) if row == "shuffled" else items)

    def worth(encoder: Encoder) -> float:
        return float(untrained_ndcg(valid, torch.from_numpy(embed_items(encoder, items))).mean())

    told: dict[str, Any] = {}
    if config.steps:
        signals = given.signals(encoder, config)
        done = fine_tune(encoder, texts, config, seed=arguments.seed, log=quietly, signals=signals, worth=worth)
        told = {"best_step": done.best_step, "tokens_per_s": round(done.tokens_per_second),
                "worth": {int(entry["step"]): round(entry["worth"], 5) for entry in done.history}}  # fmt: skip
    llm_NE = torch.from_numpy(embed_items(encoder.eval(), items))
    return told | {"seconds": round(time.perf_counter() - began, 1)}, llm_NE


def ranked(test: Trial, llm_NE: Tensor) -> dict[str, Tensor]:
    """NDCG@10 of each test case without any training, by how embeddings are read."""
    table_VE = F.pad(F.normalize(llm_NE - llm_NE.mean(0), dim=1), (0, 0, 1, 0)).to(test.cases.target_C.device)
    return {"whitened": untrained_ndcg(test, llm_NE).float(), "plain": by_rank(text_ranks(test.cases, table_VE)[0])["ndcg"].cpu()}


# ---------------------------------------------------------------------------------------------------------------- compare


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Each row's NDCG@10 on test events, and what it has more than `zero` and than TF-IDF."""
    events = events_of(arguments)
    test = trial_of(events, "test", arguments.device)
    rows: dict[str, dict[str, Tensor]] = {}
    for file in sorted((arguments.encoded / "ndcg").glob("*.safetensors")):
        name, _, seed = file.stem.rpartition("-")
        for kind, ndcg_C in load_file(file).items():
            rows.setdefault(f"{name} {kind}", {})[seed] = ndcg_C
    texts = ["; ".join(value for _, value in item) for item in read_items(arguments.data)]
    tfidf_VD = tfidf_table(texts)
    if tfidf_VD is not None:  # a handful of texts has none
        rows["tfidf"] = {"": by_rank(text_ranks(test.cases, tfidf_VD.to(arguments.device))[0])["ndcg"].cpu()}
    most = max(len(seeds) for seeds in rows.values())
    # what has no seeds of its own stands beside each seed of the others
    ndcg = {name: torch.stack((list(seeds.values()) * most)[:most]).float() for name, seeds in rows.items()}
    slices = {name: test.cases.slices_SC[SLICES.index(name)].cpu() for name in SHOWN}
    table = {name: {key: round(float(value[:, mine].mean()), 4) for key, mine in slices.items()} for name, value in ndcg.items()}
    differences: dict[str, dict[str, list[float]]] = {}
    for slice_, mine in slices.items():
        mean_RM = dict(zip(ndcg, resampled(torch.stack(list(ndcg.values()))[:, :, mine]).T, strict=True))
        for name, other in beside(ndcg):
            less = interval(ndcg[name] - ndcg[other], mine, mean_RM[name] - mean_RM[other])
            differences.setdefault(f"{name} - {other}", {})[slice_] = less
    return {
        "seeds": {name: sorted(seeds) for name, seeds in rows.items()},
        "users": {name: int(mine.sum()) for name, mine in slices.items()},
        "ndcg": table,
        "differences": differences,
    }


def beside(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each row and what it stands beside: zero-shot read the same way, zero-shot whitened, TF-IDF."""
    for name in (names := list(names)):
        same = f"zero {name.rpartition(' ')[2]}"
        yield from (
            (name, other) for other in dict.fromkeys((same, "zero whitened", "tfidf")) if other in names and other != name
        )


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
            "second - first": {name: pair(two_SC, one_SC, mine) for name, mine in slices.items()},
        }  # fmt: skip
    return result


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
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
    first.add_argument("--teacher-epochs", type=int, default=40, help="of the ID-only SASRec that some rows learn from, at most")
    first.add_argument("--teacher-width", type=int, default=128)
    first.add_argument("--compile", action="store_true", help="compiles the layers; pays in trainings of some minutes")
    second.add_argument("--encoded", type=Path, required=True)
    third.add_argument("--ranks", type=Path, nargs=2, required=True, help="two folders of bench_fusion.py rank")
    return parser.parse_args(argv)


def main() -> None:
    """Prints one JSON line."""
    arguments = parse()
    found = {"tune": tune, "compare": compare, "fused": fused}[arguments.command](arguments)
    device = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__}
    print(json.dumps(device | found))


if __name__ == "__main__":
    main()
