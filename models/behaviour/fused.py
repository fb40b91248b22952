"""A recommender of parts, fused late: their item vectors side by side, their weights on the user's side, one dot product.

Parts are trained apart. Trained together, text's share goes to nothing: warm items are learned without it, and cold and rare
items, where it helps, are what training hardly sees (measured, BENCHMARKS.md).

Shapes: B rows, L positions (newest last, LEFT-padded), N items, K whitened width, V items + 1 (row 0 is padding), D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.behaviour.recommender import Backbone, LoadedRecommender, Span, read_whitening, strip_prefix, whitened
from models.behaviour.whitening import Whitening

BANDS = (1, 5, 20)
"""Train events from which an item is in the next band: none, few, some, many."""
GATED = "text"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part before it is kept: what makes its item vectors, and what reads them."""

    name: str
    items: Any
    """A module that is a source of item vectors."""
    sequence: nn.Module
    backbone: Backbone
    """Its width and how many events it reads."""
    config: Mapping[str, Any]
    """What `item_sources.build_items` reads."""
    fading: float | None = None
    """Of a user that is a fading mean."""

    def meta(self) -> dict[str, Any]:
        """All that JSON tells of it."""
        known = {"name": self.name, "backbone": dataclasses.asdict(self.backbone), "items": dict(self.config)}
        return known if self.fading is None else known | {"fading": self.fading}

    def tensors(self) -> dict[str, Tensor]:
        """Its weights, as an artifact names them."""
        both = {"items": self.items, "sequence": self.sequence}
        found = {
            f"recommender.{kind}.{name}": value for kind, module in both.items() for name, value in module.state_dict().items()
        }
        return {name: value.detach() for name, value in found.items()}

    def loaded(self, item_ids: Sequence[str], whitening: Whitening, device: torch.device | str) -> LoadedRecommender:
        """The part alone, as it serves."""
        return LoadedRecommender(self.meta(), list(item_ids), self.tensors(), device, whitening)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How parts are joined; chosen on validation cases by `fusion.search`."""

    scale: Mapping[str, float]
    """What each part's user vector is multiplied by: its weight over the spread of its scores."""
    gates: tuple[float, ...] = (1.0,) * (len(BANDS) + 1)
    """Factors of the text part's item vectors, by band of train events."""
    centre: Mapping[str, float] = field(default_factory=dict)
    """How much of the mean user vector is taken from a part's users: the common direction is popularity."""


class FusedRecommender:
    """A kept recommender of parts; used as any `LoadedRecommender`."""

    def __init__(self, meta: dict[str, Any], item_ids: list[str], tensors: dict[str, Tensor], device: torch.device | str) -> None:
        self.meta, self.item_ids, self.device = meta, item_ids, torch.device(device)
        self.row = {item_id: row for row, item_id in enumerate(item_ids, start=1)}
        self.whitening = read_whitening(meta, tensors, device)
        self.members = [
            LoadedRecommender(part, item_ids, strip_prefix(tensors, f"{part['name']}."), device, self.whitening)
            for part in meta["parts"]
        ]
        self.scale = [float(part["scale"]) for part in meta["parts"]]
        centres = [tensors.get(f"{part['name']}.centre_D") for part in meta["parts"]]
        self.centre = [None if centre_D is None else centre_D.to(device) for centre_D in centres]
        band_V = torch.bucketize(tensors["count_V"].to(device), torch.tensor(BANDS, device=device), right=True)
        self.gate_V = torch.tensor(meta["gates"], device=device)[band_V]
        widths = [member.width for member in self.members]
        longest = max(member.backbone.max_len for member in self.members)
        self.backbone = dataclasses.replace(self.members[0].backbone, width=sum(widths), max_len=longest)
        stops = torch.tensor(widths).cumsum(0).tolist()
        names = [part["name"] for part in meta["parts"]]
        self.parts = tuple(Span(name=n, start=s - w, stop=s) for n, w, s in zip(names, widths, stops, strict=True))

    @property
    def width(self) -> int:
        """D, the width of item and user vectors: that of all parts together."""
        return self.backbone.width

    def table(self) -> Tensor:
        """A fused recommender keeps no table: raises ValueError."""
        raise ValueError("this recommender keeps no item table: project the items' LLM embeddings")

    @torch.no_grad()
    def project(self, llm_NE: Tensor, item_ids: Sequence[str]) -> Tensor:
        """emb_ND float32 of any items from their LLM embeddings: the parts' vectors side by side.

        Raises ValueError for another width than the encoder's, or a value that is not finite.
        """
        assert self.whitening is not None
        white_NK = whitened(self.whitening, llm_NE.to(self.device), str(self.meta.get("encoder_id")))
        row_N = torch.tensor([self.row.get(item_id, 0) for item_id in item_ids], device=self.device)
        return torch.cat([self.gated(part.name, member.from_white(white_NK, row_N), row_N)
                          for part, member in zip(self.parts, self.members, strict=True)], dim=1)  # fmt: skip

    def gated(self, name: str, emb_ND: Tensor, row_N: Tensor) -> Tensor:
        """A part's vectors times its items' gates. An item that was never met has the gate of items without events."""
        return emb_ND * self.gate_V[row_N][:, None] if name == GATED else emb_ND

    def encode(self, emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        """user_BD of histories given as item VECTORS, newest last, LEFT-padded; scores are dot products with item vectors."""
        return self.encode_some(emb_BLD, valid_BL, 0, self.width)

    @torch.no_grad()
    def encode_some(self, emb_BLD: Tensor, valid_BL: Tensor, start: int, stop: int) -> Tensor:
        """user_BD of the parts within some columns; zeros stand for the others."""
        users = []
        for part, member, scale, centre_D in zip(self.parts, self.members, self.scale, self.centre, strict=True):
            if part.start < start or part.stop > stop:
                users.append(torch.zeros(len(emb_BLD), part.stop - part.start, device=self.device))
                continue
            user_BD = member.encode(emb_BLD[..., part.start : part.stop], valid_BL).float()
            users.append(scale * (user_BD if centre_D is None else user_BD - centre_D))
        return torch.cat(users, dim=1)

    def carried(self, user_BD: Tensor, emb_BD: Tensor) -> dict[str, Tensor]:
        """What each part adds to the scores of (user, item) pairs: they sum up to the score."""
        return {p.name: (user_BD[:, p.start : p.stop] * emb_BD[:, p.start : p.stop]).sum(1) for p in self.parts}
