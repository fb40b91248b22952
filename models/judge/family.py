"""Names of the family's systems -> what makes them from a kit. A new system is a function here and its name in FAMILY.

P2Rec, Laser and DARec differ in the encoder: their embeddings come as further ones of the kit, and give `llmemb_NAME` and
`fused_NAME`. The first encoder of the kit is the main one.

Shapes: N items, K whitened width, V items + 1 (row 0 is padding), D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.behaviour import parts
from models.behaviour.code_figures import error, neighbours_kept
from models.behaviour.code_items import CodeItems
from models.behaviour.codes import fit_books
from models.behaviour.graph import FADE
from models.behaviour.items import NullSpaceItems
from models.behaviour.llm_esr import Distiller, DualItems, like_users
from models.behaviour.recommender import FadingMean, Recommender, build_sequence
from models.judge.systems import FLOAT, Kit, System

Made = Iterator[tuple[str, System]]
CHAMPION = "fused"
ALPHA_FUSE: Mapping[str, Any] = {"loss": "sampled", "negatives": 64}
"""As AlphaFuse trains, beside the cosine softmax."""


def id_only(kit: Kit) -> Made:
    """The SRS without text."""
    yield "id_only", kit.served(kit.teacher())


def text(kit: Kit) -> Made:
    """The main encoder's texts, whitened and read by a fading mean: nothing is trained, and new items need no log."""
    known = kit.settings.fusion
    white_NK = kit.white(main(kit))[1]
    items, seconds = kit.once("text", lambda: parts.text_items(white_NK, kit.events, known.text_width, known.text_directions))
    row_N = torch.arange(1, len(white_NK) + 1, device=kit.device)
    yield "text", faded(F.pad(items.project(white_NK, row_N), (0, 0, 1, 0)), known.newest, seconds)


def llmemb(kit: Kit) -> Made:
    """LLMEmb as one part: RAT over text, aligned to the ID-only teacher."""
    yield "llmemb", kit.served(kit.rat(main(kit)))


def llmemb_graph_teacher(kit: Kit) -> Made:
    """The same, aligned to ELMRec's graph view, which takes no training."""
    yield "llmemb_graph_teacher", kit.served(kit.rat(main(kit), "graph"))


def graph(kit: Kit) -> Made:
    """ELMRec's graph view by itself."""
    yield "graph", kit.served(kit.graph())


def llm_esr(kit: Kit) -> Made:
    """LLM-ESR: dual view with distillation, dot products."""
    known, white_NK = kit.settings, kit.white(main(kit))[1]

    def make() -> Recommender:
        items = DualItems(white_NK, known.hidden, known.backbone.width)
        like_US = like_users(kit.events, items.white_VK, known.like_users)
        distiller = Distiller(kit.events, like_US, known.backbone.width, known.distil)
        return kit.trained(Recommender(items, build_sequence(known.backbone, "llm_esr")), known.training, distiller=distiller)

    yield "llm_esr", kit.served(kit.once("llm_esr", make))


def alpha_fuse(kit: Kit) -> Made:
    """AlphaFuse: frozen text, an ID part added in its weakest directions."""
    known, white_NK = kit.settings, kit.white(main(kit))[1]
    training = dataclasses.replace(known.training, cosine=known.cosine, **ALPHA_FUSE)
    items = NullSpaceItems(white_NK, known.backbone.width, known.backbone.width // 2, unit=True)
    yield (
        "alpha_fuse",
        kit.served(kit.once("alpha_fuse", lambda: kit.trained(Recommender(items, build_sequence(known.backbone)), training))),
    )


def codes(kit: Kit) -> Made:
    """MoC: a sequence encoder that knows items by the codes of their LLM embeddings alone; and by controls of as many bits."""
    known, llm_NE = kit.settings.codes, kit.llm[main(kit)].float()

    def make() -> Tensor:
        return fit_books(llm_NE, known, seed=kit.seed).encode(llm_NE)

    sources = {"codes": kit.once("books", make)}
    for name, (_, code_NK) in controls(kit, "quantised text", llm_NE).items():
        if code_NK is not None:
            sources[f"codes_{name}"] = code_NK, kit.made["quantised text"][1]
    for name, (code_NK, before) in sources.items():
        made, seconds = kit.once(f"on {name}", lambda code_NK=code_NK: on_codes(kit, code_NK))  # type: ignore[misc]
        yield name, kit.served((made, before + seconds), bytes_per_item=size(kit))


def on_codes(kit: Kit, code_NK: Tensor) -> Recommender:
    """A sequence encoder over items' codes, trained."""
    backbone = kit.settings.backbone
    items = CodeItems(code_NK, kit.settings.codes.entries, backbone.width)
    return kit.trained(Recommender(items, build_sequence(backbone)), kit.settings.training)


def fused(kit: Kit) -> Made:
    """The champion: all parts, fused late."""
    yield CHAMPION, kit.fused(CHAMPION, main(kit), kit.settings.fusion)


def fused_graph(kit: Kit) -> Made:
    """The champion with ELMRec's graph view as one part more."""
    more = dataclasses.replace(kit.settings.fusion, parts=(*kit.settings.fusion.parts, "graph"))
    yield "fused_graph", kit.fused("fused_graph", main(kit), more)


def fused_codes(kit: Kit) -> Made:
    """The champion's vectors as codes: what an index of a few bytes an item keeps; beside the controls."""
    whole, known = kit.fused(CHAMPION, main(kit), kit.settings.fusion), kit.settings.codes
    emb_ND = whole.table_VD[1:]

    def make() -> Tensor:
        books = fit_books(emb_ND, known, seed=kit.seed)
        return books.decode(books.encode(emb_ND))

    reads = {"fused_codes": kit.once("fused books", make)}
    for name, (read_ND, _) in controls(kit, "quantised vectors", emb_ND).items():
        reads[f"fused_{name}"] = read_ND, kit.made["quantised vectors"][1]
    for name, (read_ND, seconds) in reads.items():
        told = {"recall_at_10": round(neighbours_kept(emb_ND, read_ND), 4), "error": round(error(emb_ND, read_ND), 4)}
        table_VD = F.pad(read_ND, (0, 0, 1, 0))
        yield name, dataclasses.replace(
            whole, table_VD=table_VD, seconds=whole.seconds + seconds, bytes_per_item=size(kit), told=told
        )  # fmt: skip


def encoders(kit: Kit) -> Made:
    """Every further encoder of the kit in the main one's place."""
    for name in list(kit.llm)[1:]:
        yield f"llmemb_{name}", kit.served(kit.rat(name))
        yield f"{CHAMPION}_{name}", kit.fused(name, name, kit.settings.fusion)


def main(kit: Kit) -> str:
    """The name of the main encoder."""
    return next(iter(kit.llm))


def controls(kit: Kit, name: str, emb_ND: Tensor) -> Mapping[str, tuple[Tensor, Tensor | None]]:
    """Controls of as many bits, where the caller has a library for them."""
    quantise, known = kit.quantise, kit.settings.codes
    found: Mapping[str, tuple[Tensor, Tensor | None]] = {}
    return found if quantise is None else kit.once(name, lambda: quantise(emb_ND, known.books, known.entries))[0]


def faded(table_VD: Tensor, newest: int, seconds: float) -> System:
    """A fixed table read by a fading mean."""
    reads = FadingMean(FADE, newest).to(table_VD.device)
    return System(table_VD=table_VD, encode=lambda emb_BLD, valid_BL: reads(emb_BLD, valid_BL)[:, -1], max_len=newest,
                  seconds=seconds, bytes_per_item=FLOAT * table_VD.shape[1])  # fmt: skip


def size(kit: Kit) -> float:
    """Bytes of an item's codes."""
    return kit.settings.codes.books * (kit.settings.codes.entries - 1).bit_length() / 8


FAMILY: Mapping[str, Callable[[Kit], Made]] = {
    "id_only": id_only,
    "text": text,
    "graph": graph,
    "llmemb": llmemb,
    "llmemb_graph_teacher": llmemb_graph_teacher,
    "llm_esr": llm_esr,
    "alpha_fuse": alpha_fuse,
    "codes": codes,
    "fused": fused,
    "fused_graph": fused_graph,
    "fused_codes": fused_codes,
    "encoders": encoders,
}
"""What `bakeoff.systems` may name."""
