"""Measures what fusing parts late is worth: each part alone, parts added one by one, controls, widths, with paired intervals.

python tests/benchmarks/bench_fusion.py rank --data ../shared/data/amazon_beauty --embeddings zero.safetensors --out fused
    trains the collaborative teacher and RAT with one seed, makes the other parts, finds the weights on validation cases, and
    keeps each test case's rank under every model, in SETTING-SEED.safetensors; prints one JSON line
python tests/benchmarks/bench_fusion.py compare fused/*.safetensors
    means over the seeds by slice, and differences with 95 % intervals: users and seeds are resampled together
python tests/benchmarks/bench_fusion.py encode
    milliseconds of one user's vector, all parts beside one part alone

`--embeddings` holds llm_NE of every item, in the order of items.parquet (`bench_quality.py encode --encoders zero` makes it).
Needs torch, numpy, pyarrow, scikit-learn and safetensors only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.behaviour.artifact import load_recommender, save_fused
from models.behaviour.assembly import Assembled, Fusion, Material, assemble, centres
from models.behaviour.data import Histories, held_out, train_counts, without_items
from models.behaviour.fused import Part, Weights
from models.behaviour.items import DirectionItems, IdItems, MlpAdapter, NullSpaceItems, ShrunkItems, TableItems, TextItems
from models.behaviour.recommender import Backbone, FadingMean, LoadedRecommender, Recommender, build_sequence
from models.behaviour.training import Aligner, Training, train
from models.behaviour.whitening import fit_whitening
from models.judge.evaluation import SLICES, Cases, floor_ranks, make_cases, vector_ranks
from models.judge.metrics import by_rank
from tests.benchmarks.bench_rat import load

COLD_SHARE, COLD_SEED = 0.1, 42
WHITENED, HIDDEN, PRIOR, ALPHA, TEMPERATURE, COSINE = 1536, 256, 5.0, 0.01, 0.1, 0.07
TFIDF_WIDTH = 1536
LEAST = 30
DEFAULT = "cosine"
"""The kind of RAT that all variants are made with; of the other, the whole fusion alone."""
SHOWN = ("overall", "cold", "tail", "head", "short", "long")
REFERENCES = (
    "id_only",
    "llmemb",
    "cosine",
    "without_text",
    "popularity",
    "repeat_markov_popularity",
    "tfidf_text",
    "fused_tfidf",
)


@dataclass(frozen=True)
class Bench:
    """One split of the logs, with its cases."""

    name: str
    events: Histories
    counts_V: Tensor
    among_unseen: Cases
    among_all: Cases


def benches(arguments: argparse.Namespace) -> Iterator[Bench]:
    """The logs as they are, and with a tenth of the items never met in training."""
    whole = load(arguments.data, "cpu")
    ids = item_ids(arguments.data)
    options: dict[str, Any] = {"negatives": 1, "paper_tail": 4, "chunk": 4096, "seed": COLD_SEED}
    for name in arguments.settings:
        held_V = held_out(ids, COLD_SHARE if name == "cold" else 0.0, COLD_SEED)
        events = without_items(whole, held_V).to(arguments.device)
        unseen, every = (make_cases(events, "test", unseen=flag, **options) for flag in (True, False))
        yield Bench(name, events, train_counts(events), unseen, every)


def item_ids(data: Path) -> list[str]:
    """Ids in the order of the file."""
    return list(pq.read_table(data / "items.parquet", columns=["item_id"])["item_id"].to_pylist())


def trained(
    arguments: argparse.Namespace, bench: Bench, items: Any, aligner: Aligner | None = None, **more: Any
) -> tuple[Recommender, Backbone, dict[str, Any]]:
    """A recommender trained whole, validated as serving ranks."""
    backbone = Backbone(width=arguments.width, layers=2, dropout=arguments.dropout)
    torch.manual_seed(arguments.seed)
    recommender = Recommender(items(), build_sequence(backbone))
    began = time.perf_counter()
    config = Training(**{"epochs": arguments.epochs, "patience": arguments.patience, "loss": "full", **more})
    done = train(recommender, bench.events, config, max_len=backbone.max_len, seed=arguments.seed, log=lambda *_: None,
                 candidates_M=bench.counts_V.nonzero().flatten(), aligner=aligner, unseen=True)  # fmt: skip
    figures = {"epochs": done.epochs, "valid": round(done.ndcg, 4), "seconds": round(time.perf_counter() - began, 1)}
    print(f"{bench.name} {arguments.seed}: {figures}", file=sys.stderr, flush=True)
    return recommender.eval().requires_grad_(False), backbone, figures


def materials(arguments: argparse.Namespace, bench: Bench, llm_NE: Tensor, told: dict[str, Any]) -> dict[str, Material]:
    """What parts are made of, by the kind of RAT: dot products (aligned to the teacher), and a cosine softmax."""
    ids, white = item_ids(arguments.data), fit_whitening(llm_NE, min(WHITENED, max(1, len(llm_NE) // 8)))
    white_NK = white(llm_NE)
    teacher, backbone, told["id_only"] = trained(arguments, bench, lambda: IdItems(bench.events.catalogue + 1, arguments.width))
    teacher_VD = teacher.item_table().detach()
    kept = Part(name="id", items=teacher.items, sequence=teacher.sequence, backbone=backbone, config={"kind": "id"})
    weight_V = bench.counts_V / (bench.counts_V + PRIOR)
    aligner = Aligner(teacher_VD=teacher_VD, weight_V=weight_V, alpha=ALPHA, temperature=TEMPERATURE)
    made = {}
    for kind in arguments.kinds:
        source, config, more = sources(kind, white_NK, arguments.width)
        # AlphaFuse has no teacher
        rat, backbone, told[kind] = trained(arguments, bench, source, None if kind == "null_space" else aligner, **more)
        part = Part(name="llmemb", items=rat.items, sequence=rat.sequence, backbone=backbone, config=config)
        made[kind] = Material(
            events=bench.events, counts_V=bench.counts_V, white_NK=white_NK, whitening=white, item_ids=ids, llmemb=part,
            teacher=kept.loaded(ids, white, arguments.device), teacher_VD=teacher_VD, unseen=True,
        )  # fmt: skip
    return made


def sources(kind: str, white_NK: Tensor, width: int) -> tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]:
    """What makes a kind's items, what an artifact says of them, and settings of its training."""
    if kind == "null_space":  # as AlphaFuse trains: cosine softmax over 64 negatives
        config: dict[str, Any] = {"kind": kind, "text_width": width // 2, "added": True, "unit": True}
        more = {"cosine": COSINE, "loss": "sampled", "negatives": 64}
        return (lambda: NullSpaceItems(white_NK, width, width // 2, unit=True)), config, more
    unit = kind == "cosine"
    config = {"kind": "mlp", "hidden": HIDDEN, "unit": unit}
    made = lambda: TextItems(white_NK, MlpAdapter(white_NK.shape[1], HIDDEN, width), unit=unit)  # noqa: E731
    return made, config, {"cosine": COSINE if unit else 0.0}


def tfidf(data: Path) -> Tensor:
    """llm_NE of the same texts without an LLM: TF-IDF and SVD."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    rows = pq.read_table(data / "items.parquet").to_pylist()
    fields = [name for name in ("title", "brand", "categories", "price", "year", "genres", "tags") if name in rows[0]]
    texts = [
        " ".join(" ".join(map(str, row[f])) if isinstance(row[f], list) else str(row[f] or "") for f in fields) for row in rows
    ]
    found = TfidfVectorizer(sublinear_tf=True, min_df=2).fit_transform(texts)
    width = min(TFIDF_WIDTH, found.shape[1] - 1, len(texts) - 1)
    return torch.from_numpy(TruncatedSVD(width, random_state=0, n_iter=2).fit_transform(found)).float()


def fused(given: Material, config: Fusion, llm_NE: Tensor) -> tuple[Assembled, Any, Tensor]:
    """The assembled recommender through its artifact, and its table_VD."""
    assembled = assemble(config, given)
    with tempfile.TemporaryDirectory() as home:
        save_fused(Path(home), assembled.parts, assembled.found.weights, item_ids=given.item_ids, counts_V=given.counts_V,
                   whitening=given.whitening,
                   centres=centres(assembled.found.weights.centre, assembled.mean_users, {}),
                   meta={"encoder_id": "bench"})  # fmt: skip
        recommender = load_recommender(Path(home), given.white_NK.device)
    emb_ND = recommender.project(llm_NE, given.item_ids)
    return assembled, recommender, torch.nn.functional.pad(emb_ND, (0, 0, 1, 0))


def variants(arguments: argparse.Namespace) -> dict[str, Fusion]:
    """Fusions by name; the first is the default."""
    some = {
        "fused": Fusion(),
        "without_counting": Fusion(parts=("collaborative", "llmemb", "text")),
        "without_text": Fusion(parts=("collaborative", "llmemb", "counting")),
        "llmemb_text": Fusion(parts=("llmemb", "text")),
        "collaborative_text": Fusion(parts=("collaborative", "text")),
        "collaborative_llmemb": Fusion(parts=("collaborative", "llmemb")),
        "collaborative": Fusion(parts=("collaborative",)),
        "text": Fusion(parts=("text",)),
        "counting": Fusion(parts=("counting",)),
        "text_random": Fusion(parts=("text",), text_directions="random"),
        "text_strongest": Fusion(parts=("text",), text_directions="strongest"),
        "text_all": Fusion(parts=("text",), text_directions="random", text_width=4096),
        "fused_random": Fusion(text_directions="random"),
        "fused_64_64": Fusion(text_width=64, counting_width=64),
        "fused_16_16": Fusion(text_width=16, counting_width=16),
        "llmemb_text_counting": Fusion(parts=("llmemb", "text", "counting")),
        "fused_transitions": Fusion(counting=("transitions",)),
        "fused_ease": Fusion(counting=("ease",)),
        "fused_l3ae": Fusion(counting=("l3ae",)),
        "transitions": Fusion(parts=("counting",), counting=("transitions",)),
        "ease": Fusion(parts=("counting",), counting=("ease",)),
        "l3ae": Fusion(parts=("counting",), counting=("l3ae",)),
        "fused_no_gates": Fusion(gates=False),
        "fused_no_centre": Fusion(centre=False),
    }
    return {name: config for name, config in some.items() if name in arguments.variants or "all" in arguments.variants}


def rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """Ranks of every model, kept for `compare`."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    llm_NE = load_file(arguments.embeddings)["llm_NE"].float().to(arguments.device)
    told: dict[str, Any] = {"seed": arguments.seed}
    for bench in benches(arguments):
        mine: dict[str, Any] = {}
        kept = {"slices": bench.among_all.slices_SC.to(torch.uint8).cpu()}
        for kind, cases in (("unseen", bench.among_unseen), ("all", bench.among_all)):
            kept |= {f"{name}/{kind}": full_C.float().cpu() for name, (full_C, _) in floor_ranks(cases).items()}
        made = materials(arguments, bench, llm_NE, mine)
        for kind, given in made.items():
            assert given.teacher is not None
            kept |= ranked("id_only", bench, given.teacher.table().float(), given.teacher)
            part = given.llmemb.loaded(given.item_ids, given.whitening, arguments.device)
            row_N = torch.arange(1, len(bench.counts_V), device=arguments.device)
            table_VD = torch.nn.functional.pad(part.from_white(given.white_NK, row_N), (0, 0, 1, 0))
            kept |= ranked(kind, bench, table_VD, part)
            kept |= every_variant(arguments, bench, kind, given, llm_NE, mine)
        if arguments.controls:
            kept |= controls(arguments, bench, made[DEFAULT], llm_NE, mine)
        if arguments.tfidf and bench.name == "cold":
            kept |= without_an_llm(arguments, bench, mine)
        told[bench.name] = mine
        (arguments.out / f"{bench.name}-{arguments.seed}.json").write_text(json.dumps(mine))
        save_file(kept, arguments.out / f"{bench.name}-{arguments.seed}.safetensors")
    return told


def every_variant(
    arguments: argparse.Namespace, bench: Bench, kind: str, given: Material, llm_NE: Tensor, told: dict[str, Any]
) -> dict[str, Tensor]:
    """Ranks of all fusions over one kind of RAT."""
    kept: dict[str, Tensor] = {}
    for name, config in variants(arguments).items():
        if kind != DEFAULT and name != "fused":
            continue
        label = name if kind == DEFAULT else f"{name}_{kind}"
        kept |= measured(label, bench, given, config, llm_NE, told)
    return kept


def measured(
    label: str, bench: Bench, given: Material, config: Fusion, llm_NE: Tensor, told: dict[str, Any]
) -> dict[str, Tensor]:
    """Ranks of one fusion, and what its search came to."""
    began = time.perf_counter()
    assembled, recommender, table_VD = fused(given, config, llm_NE)
    seconds = time.perf_counter() - began
    found = ranked(label, bench, table_VD, recommender)
    if label == "fused":
        found |= ranked("fused_float16", bench, table_VD.half().float(), recommender)
    ndcg_C = by_rank(found[f"{label}/unseen"])["ndcg"]
    slices = dict(zip(SLICES, bench.among_all.slices_SC.cpu(), strict=True))
    told[label] = {
        "weights": {name: round(value, 3) for name, value in assembled.found.relative.items()},
        "gates": assembled.found.weights.gates, "centre": dict(assembled.found.weights.centre), "chosen": assembled.chosen,
        "counted": assembled.counted,
        "gains": {name: round(value, 5) for name, value in assembled.gains.items()}, "width": table_VD.shape[1],
        "cases": assembled.found.cases, "seconds": round(seconds, 1),
        "valid": {name: round(value, 4) for name, value in assembled.found.ndcg.items()},
        "test": {name: round(float(ndcg_C[slices[name]].mean()), 4) for name in SHOWN if bool(slices[name].any())},
    }  # fmt: skip
    print(f"{bench.name} {label}: {json.dumps(told[label])}", file=sys.stderr, flush=True)
    return found


def controls(
    arguments: argparse.Namespace, bench: Bench, given: Material, llm_NE: Tensor, told: dict[str, Any]
) -> dict[str, Tensor]:
    """Fusions whose untrained text part reads texts that mean nothing: shuffled over the items, and Gaussian."""
    kept: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(arguments.seed)
    order_N = torch.randperm(len(llm_NE), generator=generator).to(llm_NE.device)
    gauss_NK = torch.randn(given.white_NK.shape, generator=generator).to(llm_NE.device)
    for name, other_NK in {"shuffled": given.white_NK[order_N], "gaussian": gauss_NK}.items():
        instead = dataclasses.replace(given, other_text_NK=other_NK)
        assembled = assemble(dataclasses.replace(Fusion(), controls=False), instead)
        members = [(part, part.loaded(given.item_ids, given.whitening, llm_NE.device)) for part in assembled.parts]
        row_N = torch.arange(1, len(bench.counts_V), device=llm_NE.device)
        tables = [member.from_white(other_NK if part.name == "text" else given.white_NK, row_N) for part, member in members]
        table_VD = torch.nn.functional.pad(torch.cat(tables, 1), (0, 0, 1, 0))
        widths = [table.shape[1] for table in tables]

        def encode(
            emb_BLD: Tensor, valid_BL: Tensor, members: Any = members, widths: Any = widths, found: Any = assembled
        ) -> Tensor:
            read = zip(members, emb_BLD.split(widths, dim=2), strict=True)
            scale = found.found.weights.scale
            return torch.cat([scale[part.name] * member.encode(emb, valid_BL) for (part, member), emb in read], dim=1)

        longest = max(member.backbone.max_len for _, member in members)
        for kind, cases in (("unseen", bench.among_unseen), ("all", bench.among_all)):
            kept[f"fused_{name}/{kind}"] = vector_ranks(cases, table_VD, encode, longest)[0].float().cpu()
        told[f"fused_{name}"] = {"weights": assembled.found.relative, "valid": assembled.found.ndcg}
    return kept


def without_an_llm(arguments: argparse.Namespace, bench: Bench, told: dict[str, Any]) -> dict[str, Tensor]:
    """The whole fusion over TF-IDF texts, and those texts ranked untrained: what no LLM is needed for."""
    other_NE = tfidf(arguments.data).to(arguments.device)
    arguments = argparse.Namespace(**{**vars(arguments), "kinds": [DEFAULT]})
    given = materials(arguments, bench, other_NE, {})[DEFAULT]
    alone = Fusion(parts=("text",), text_directions="random", text_width=4096)
    return measured("fused_tfidf", bench, given, Fusion(), other_NE, told) | measured(
        "tfidf_text", bench, given, alone, other_NE, told
    )


def ranked(name: str, bench: Bench, table_VD: Tensor, recommender: LoadedRecommender | Any) -> dict[str, Tensor]:
    """A model's ranks among unseen and among all items."""
    longest = recommender.backbone.max_len
    return {
        f"{name}/{kind}": vector_ranks(cases, table_VD, recommender.encode, longest)[0].float().cpu()
        for kind, cases in (("unseen", bench.among_unseen), ("all", bench.among_all))
    }


# ---------------------------------------------------------------------------------------------------------------- compare


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """NDCG@10 and HR@10 of every model that all seeds have, and the fused models less the references."""
    result: dict[str, Any] = {}
    for setting in sorted({file.name.partition("-")[0] for file in arguments.ranks}):
        files = [load_file(file) for file in sorted(arguments.ranks) if file.name.startswith(f"{setting}-")]
        shared = set.intersection(*(set(file) for file in files)) - {"slices"}
        slices = {
            name: mine for name, mine in zip(SLICES, files[0]["slices"].bool(), strict=True) if name in SHOWN and bool(mine.any())
        }
        told: dict[str, Any] = {"seeds": len(files), "users": {name: int(mine.sum()) for name, mine in slices.items()}}
        for kind in ("unseen", "all"):
            names = sorted(name.removesuffix(f"/{kind}") for name in shared if name.endswith(f"/{kind}"))
            found = [[by_rank(file[f"{name}/{kind}"]) for file in files] for name in names]
            ndcg_MSC = torch.stack([torch.stack([one["ndcg"] for one in seeds]) for seeds in found]).float()
            told[kind] = {
                name: {slice_: round(float(ndcg_MSC[m][:, mine].mean()), 4) for slice_, mine in slices.items()}
                | {"hr": round(float(torch.stack([one["hr"] for one in found[m]]).mean()), 4)}
                for m, name in enumerate(names)
            }
            drawn = {slice_: resampled(ndcg_MSC[:, :, mine]) for slice_, mine in slices.items() if int(mine.sum()) >= LEAST}
            told[f"{kind}_differences"] = {
                f"{name} - {other}": {
                    slice_: interval(ndcg_MSC[m] - ndcg_MSC[o], slices[slice_], mean_RM[:, m] - mean_RM[:, o])
                    for slice_, mean_RM in drawn.items()
                }
                for m, name in enumerate(names) if name.startswith("fused")
                for o, other in enumerate(names) if other in REFERENCES and other != name
            }  # fmt: skip
        result[setting] = told
    return result


def resampled(ndcg_MSC: Tensor, resamples: int = 1000) -> Tensor:
    """mean_RM of each model in each resample; seeds and users are drawn anew, the same for all models."""
    models, seeds, users = ndcg_MSC.shape
    generator = torch.Generator().manual_seed(COLD_SEED)
    weight_RC = torch.poisson(torch.ones(resamples, users), generator=generator)
    share_RS = torch.zeros(resamples, seeds)
    drawn_RS = torch.randint(seeds, (resamples, seeds), generator=generator)
    share_RS.scatter_add_(1, drawn_RS, torch.full((resamples, seeds), 1 / seeds))
    mean_RMS = (weight_RC @ ndcg_MSC.reshape(models * seeds, users).T / weight_RC.sum(1, keepdim=True)).view(-1, models, seeds)
    return (mean_RMS * share_RS[:, None]).sum(2)


def interval(less_SC: Tensor, in_C: Tensor, less_R: Tensor) -> list[float]:
    """Mean difference and its 95 % interval."""
    low, high = less_R.quantile(torch.tensor([0.025, 0.975])).tolist()
    return [round(value, 4) for value in (float(less_SC[:, in_C].mean()), low, high)]


def pair(one_SC: Tensor, other_SC: Tensor, mine: Tensor) -> list[float]:
    """Mean difference of two rows among some cases and its 95 % interval."""
    mean_RM = resampled(torch.stack([one_SC, other_SC])[:, :, mine])
    return interval(one_SC - other_SC, mine, mean_RM[:, 0] - mean_RM[:, 1])


# ----------------------------------------------------------------------------------------------------------------- encode


def encode(arguments: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of user vectors from histories of 50 items: the llmemb part alone, and all four parts."""
    width, device = arguments.width, arguments.device
    llm_NE = torch.randn(500, 96, generator=torch.Generator().manual_seed(0))
    whitening = fit_whitening(llm_NE, 62)
    backbone, flat = Backbone(width=width, layers=2), Backbone(width=width, max_len=20)
    ids = [str(number) for number in range(500)]
    adapter = MlpAdapter(62, HIDDEN, width)
    parts = [
        Part(name="llmemb", items=TextItems(torch.zeros(0, 62), adapter), sequence=build_sequence(backbone), backbone=backbone,
             config={"kind": "mlp", "hidden": HIDDEN, "unit": True}),
        Part(name="collaborative", items=ShrunkItems(501, 62, width), sequence=build_sequence(backbone), backbone=backbone,
             config={"kind": "shrunk"}),
        Part(name="text", items=DirectionItems(62, width), sequence=FadingMean(0.7, 20), backbone=flat,
             config={"kind": "directions"}, fading=0.7),
        Part(name="counting", items=TableItems(501, width), sequence=FadingMean(0.7, 20), backbone=flat,
             config={"kind": "table"}, fading=0.7),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as home:
        weights = Weights(scale={part.name: 1.0 for part in parts})
        save_fused(Path(home), parts, weights, item_ids=ids, counts_V=torch.ones(501), whitening=whitening, meta={})
        fused_, alone = load_recommender(Path(home), device), parts[0].loaded(ids, whitening, device)
    told: dict[str, Any] = {"device": device, "width": width, "users": arguments.users, "threads": torch.get_num_threads()}
    valid_BL = torch.ones(arguments.users, 50, dtype=torch.bool, device=device)
    times: dict[str, list[float]] = {"one_part": [], "all_parts": []}
    models = {"one_part": alone, "all_parts": fused_}
    inputs = {name: torch.randn(arguments.users, 50, model.width, device=device) for name, model in models.items()}
    for _ in range(300):  # in turns: what disturbs one disturbs the other
        for name, model in models.items():
            began = time.perf_counter()
            model.encode(inputs[name], valid_BL).sum().item()
            times[name].append(1000 * (time.perf_counter() - began))
    told |= {name: round(sorted(values[50:])[len(values[50:]) // 2], 3) for name, values in times.items()}
    return told | {"ratio": round(told["all_parts"] / told["one_part"], 2)}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first, second, third = (commands.add_parser(name) for name in ("rank", "compare", "encode"))
    third.add_argument("--width", type=int, default=128)
    third.add_argument("--users", type=int, default=1)
    third.add_argument("--device", default="cpu")
    first.add_argument("--data", type=Path, required=True)
    first.add_argument("--embeddings", type=Path, required=True)
    first.add_argument("--out", type=Path, required=True)
    first.add_argument("--seed", type=int, default=42)
    first.add_argument("--settings", type=lambda text: text.split(","), default=["cold", "all"])
    first.add_argument("--kinds", type=lambda text: text.split(","), default=["llmemb", "cosine"], help="of RAT")
    first.add_argument("--variants", type=lambda text: text.split(","), default=["all"])
    first.add_argument("--controls", action="store_true", help="also shuffled and Gaussian texts")
    first.add_argument("--tfidf", action="store_true", help="with items held out, also the whole fusion over TF-IDF texts")
    first.add_argument("--epochs", type=int, default=150)
    first.add_argument("--patience", type=int, default=15)
    first.add_argument("--width", type=int, default=128)
    first.add_argument("--dropout", type=float, default=0.5)
    first.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    second.add_argument("ranks", type=Path, nargs="+")
    return parser.parse_args()


def main() -> None:
    """Prints one JSON line."""
    arguments = parse()
    if arguments.command == "compare":
        print(json.dumps(compare(arguments)))
        return
    if arguments.command == "encode":
        print(json.dumps(encode(arguments)))
        return
    device = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch": torch.__version__}
    print(json.dumps(device | rank(arguments)))


if __name__ == "__main__":
    main()
