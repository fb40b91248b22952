"""The recommender: any source of item vectors, any sequence encoder, and the artifact that keeps both.

Shapes: B rows, L positions (newest last, LEFT-padded), V items + 1 (row 0 is padding), D width, N items, E LLM width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.behaviour.bert4rec import Bert4Rec
from models.behaviour.gru4rec import GRU4Rec
from models.behaviour.item_sources import build_items
from models.behaviour.items import Items
from models.behaviour.llm_esr import DualView
from models.behaviour.sasrec import SASRec
from models.behaviour.whitening import Whitening

SEQUENCES = {"sasrec": SASRec, "gru4rec": GRU4Rec, "bert4rec": Bert4Rec}


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A sequence encoder and its sizes."""

    name: Literal["sasrec", "gru4rec", "bert4rec"] = "sasrec"
    """The kind of the sequence encoder: that of your own SRS."""
    width: int = 64
    """Width of item and user vectors."""
    layers: int = 1
    """Layers of the sequence encoder."""
    heads: int = 1
    """Attention heads; GRU4Rec has none."""
    dropout: float = 0.2
    """Share of hidden values that is set to zero in a training step."""
    max_len: int = 50
    """Events of a history that are read, the newest."""


TINY = 1e-12
"""Below which a vector counts as zero."""


class FadingMean(nn.Module):
    """A user as the mean of the newest events' directions, each weighing `fade` of the one after it, of length one. Untrained.

    `sides`: vectors hold two halves, the one that an item is found by and the one that it is read by in a history.
    """

    mask_share = 0.0

    weight_L: Tensor

    def __init__(self, fade: float, newest: int, *, sides: bool = False) -> None:
        super().__init__()
        self.fade, self.newest, self.sides = fade, newest, sides
        self.register_buffer("weight_L", fade ** torch.arange(newest - 1, -1, -1), persistent=False)

    def forward(self, emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        """emb_BLD, valid_BL -> hidden_B1D after the newest event; events whose vector is zero do not count."""
        width = emb_BLD.shape[2]
        read_BLD = emb_BLD[:, -self.newest :, width // 2 if self.sides else 0 :].float()
        valid_BL = valid_BL[:, -self.newest :]
        # few operations: for one user each costs more than what it computes
        weight_BL = valid_BL * self.weight_L[-valid_BL.shape[1] :] / read_BLD.norm(dim=2).clamp_min(TINY)
        mean_B1D = F.normalize(torch.bmm(weight_BL[:, None], read_BLD), dim=2)
        # the side that items are read by is never asked for
        return F.pad(mean_B1D, (0, width - mean_B1D.shape[2])) if self.sides else mean_B1D


def build_sequence(backbone: Backbone, kind: str = "id", fading: float | None = None) -> nn.Module:
    """The sequence encoder of a backbone for items of a kind: `forward(emb_BLD, valid_BL) -> hidden_BLD`."""
    if fading is not None:
        return FadingMean(fading, backbone.max_len, sides=kind == "sides")
    sizes = {name: value for name, value in dataclasses.asdict(backbone).items() if name != "name"}
    if kind == "llm_esr":
        return DualView(SEQUENCES[backbone.name](**{**sizes, "width": backbone.width // 2}), backbone.width)
    return SEQUENCES[backbone.name](**sizes)


def newest(sequence: Any, emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
    """user_BD after the newest event; an encoder that can leaves the other positions out."""
    alone = getattr(sequence, "newest", None)
    user_BD: Tensor = alone(emb_BLD, valid_BL) if callable(alone) else sequence(emb_BLD, valid_BL)[:, -1]
    return user_BD


class Recommender(nn.Module):
    """Items and a sequence encoder; scores are dot products of the user's vector with the same item vectors."""

    def __init__(self, items: Items, sequence: nn.Module) -> None:
        super().__init__()
        self.items = items
        self.sequence = sequence

    def item_table(self) -> Tensor:
        """table_VD; row 0 is zero."""
        return self.items.table()

    def forward(self, input_BL: Tensor) -> Tensor:
        """input_BL -> hidden_BLD; causal encoders predict item t + 1 at position t."""
        hidden_BLD: Tensor = self.sequence(self.items(input_BL), input_BL != 0)
        return hidden_BLD

    def encode(self, input_BL: Tensor, table_VD: Tensor | None = None) -> Tensor:
        """input_BL -> user_BD, the vector after the newest event. A table at hand saves making the items' vectors again."""
        emb_BLD = self.items(input_BL) if table_VD is None else F.embedding(input_BL, table_VD)
        return newest(self.sequence, emb_BLD, input_BL != 0)


def score(user_BD: Tensor, table_VD: Tensor) -> Tensor:
    """scores_BV in float32, -inf for padding: half precision would tie items that differ."""
    scores_BV = user_BD.float() @ table_VD.float().T
    scores_BV[:, 0] = -torch.inf
    return scores_BV


@dataclass(frozen=True, kw_only=True)
class Span:
    """A part's columns in item and user vectors."""

    name: str
    start: int
    stop: int


class LoadedRecommender:
    """A kept recommender: makes item vectors from LLM embeddings, also of items it never saw, and user vectors from those."""

    def __init__(
        self,
        meta: dict[str, Any],
        item_ids: list[str],
        tensors: dict[str, Tensor],
        device: torch.device | str,
        whitening: Whitening | None = None,
    ) -> None:
        self.meta, self.item_ids, self.device = meta, item_ids, torch.device(device)
        self.row = {item_id: row for row, item_id in enumerate(item_ids, start=1)}
        self.backbone = Backbone(**meta["backbone"])
        self.whitening = whitening or read_whitening(meta, tensors, device)
        # no text: vectors are made by `project`
        white_0K = None if self.whitening is None else torch.zeros(0, self.whitening.map_EK.shape[1])
        self.items = build_items(meta["items"], self.backbone.width, len(item_ids), white_0K).to(device)
        self.sequence = build_sequence(self.backbone, meta["items"]["kind"], meta.get("fading")).to(device).eval()
        self.items.load_state_dict(strip_prefix(tensors, "recommender.items."))
        self.sequence.load_state_dict(strip_prefix(tensors, "recommender.sequence."))
        self.items.eval().requires_grad_(False)
        self.sequence.requires_grad_(False)
        served = getattr(self.sequence, "served", None)
        self.encoder = served() if callable(served) else self.sequence
        self.unit = bool(meta["items"].get("unit", False))
        turn_DD = tensors.get("turn_DD")
        if turn_DD is not None and not torch.allclose(turn_DD @ turn_DD.T, torch.eye(self.width), atol=1e-4):
            raise RuntimeError("turn_DD is no rotation: scores would change under it")
        self.turn_DD = None if turn_DD is None else turn_DD.to(device)

    @property
    def width(self) -> int:
        """D, the width of item and user vectors."""
        return self.backbone.width

    @property
    def parts(self) -> tuple[Span, ...]:
        """One part: the vector is all of it."""
        return (Span(name="llmemb", start=0, stop=self.width),)

    def table(self) -> Tensor:
        """table_VD of an ID-only recommender, in the order of `item_ids` after the padding row.

        Raises ValueError for any other: its vectors come from `project`.
        """
        if self.meta["items"]["kind"] != "id":
            raise ValueError("this recommender keeps no item table: project the items' LLM embeddings")
        return self.turned(self.items.table())

    def carried(self, user_BD: Tensor, emb_BD: Tensor) -> dict[str, Tensor]:
        """What each part adds to the scores of (user, item) pairs: here the one part all of it."""
        return {"llmemb": (user_BD * emb_BD).sum(1)}

    @torch.no_grad()
    def project(self, llm_NE: Tensor, item_ids: Sequence[str]) -> Tensor:
        """emb_ND float32 of any items from their LLM embeddings: whitening, adapter, the ID part where there is one, the turn.

        Raises ValueError for another width than the encoder's, a value that is not finite, or an ID-only recommender.
        """
        if self.whitening is None:
            raise ValueError("an ID-only recommender can't project text: give the id of one that `rat` trained")
        white_NK = whitened(self.whitening, llm_NE.to(self.device), str(self.meta.get("encoder_id")))
        row_N = torch.tensor([self.row.get(item_id, 0) for item_id in item_ids], device=self.device)
        return self.from_white(white_NK, row_N)

    def from_white(self, white_NK: Tensor, row_N: Tensor) -> Tensor:
        """emb_ND of items whose text is whitened already; row 0 stands for those that were never met."""
        return self.turned(self.items.project(white_NK, row_N))

    @torch.no_grad()
    def encode(self, emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        """user_BD of histories given as item VECTORS, newest last, LEFT-padded; scores are dot products with item vectors."""
        most = self.backbone.max_len
        emb_BLD, valid_BL = emb_BLD[:, -most:].to(self.device), valid_BL[:, -most:].to(self.device)
        if self.turn_DD is not None:
            emb_BLD = emb_BLD @ self.turn_DD.T  # the sequence encoder knows items as it was trained on them
        user_BD = newest(self.encoder, emb_BLD, valid_BL)
        return self.turned(F.normalize(user_BD, dim=1) if self.unit else user_BD)

    def turned(self, emb_D: Tensor) -> Tensor:
        """Vectors in the basis of the space that they were aligned to; items and users turn alike, so no score changes."""
        return emb_D if self.turn_DD is None else emb_D @ self.turn_DD


def read_whitening(meta: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device | str) -> Whitening | None:
    """The whitening of an artifact; None where it reads no text."""
    if "whitening.mean_E" not in tensors:
        return None
    return Whitening(tensors["whitening.mean_E"], tensors["whitening.map_EK"], meta["explained_variance"]).to(device)


def whitened(whitening: Whitening, llm_NE: Tensor, encoder_id: str) -> Tensor:
    """white_NK. Raises ValueError for embeddings of another width than the whitening's, or a value that is not finite."""
    if llm_NE.shape[1] != len(whitening.mean_E):
        raise ValueError(f"LLM embeddings are {llm_NE.shape[1]} wide, the recommender reads {len(whitening.mean_E)}: "
                         f"embed with its encoder {encoder_id}")  # fmt: skip
    white_NK: Tensor = whitening(llm_NE)
    if not bool(white_NK.isfinite().all()):
        raise ValueError("an LLM embedding is not finite: embed these items again")
    return white_NK


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
