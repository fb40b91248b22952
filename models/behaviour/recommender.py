"""The recommender: any source of item vectors, any sequence encoder, and the artifact that keeps both.

Shapes: B rows, L positions (newest last, LEFT-padded), V items + 1 (row 0 is padding), D width, N items, E LLM width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.behaviour.adapter import MlpAdapter, NullSpaceItems, ResidualItems, TextItems, Whitening
from models.behaviour.bert4rec import Bert4Rec
from models.behaviour.gru4rec import GRU4Rec
from models.behaviour.llm_esr import DualItems, DualView
from models.behaviour.sasrec import SASRec

SEQUENCES = {"sasrec": SASRec, "gru4rec": GRU4Rec, "bert4rec": Bert4Rec}


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A sequence encoder and its sizes."""

    name: Literal["sasrec", "gru4rec", "bert4rec"] = "sasrec"
    width: int = 64
    """Width of item and user vectors."""
    layers: int = 1
    heads: int = 1
    """Attention heads; GRU4Rec has none."""
    dropout: float = 0.2
    max_len: int = 50
    """Events of a history that are read, the newest."""


class Items(Protocol):
    """A source of item vectors; index 0 is padding and has a vector of zeros."""

    rows: int

    def __call__(self, items: Tensor) -> Tensor:
        """Vectors of some items, one dimension more."""

    def table(self) -> Tensor:
        """table_VD of all items."""


class IdItems(nn.Module):
    """Items that are their index alone."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.randn(rows, width) * 0.02)
        with torch.no_grad():
            self.weight[0] = 0.0

    def forward(self, items: Tensor) -> Tensor:
        """Item indices of any shape -> their vectors; the padding row takes no gradient and so stays zero."""
        return F.embedding(items, self.weight, padding_idx=0)

    def table(self) -> Tensor:
        """table_VD; row 0 is zero."""
        return self.weight


def build_sequence(backbone: Backbone, kind: str = "id") -> nn.Module:
    """The sequence encoder of a backbone for items of a kind: `forward(emb_BLD, valid_BL) -> hidden_BLD`."""
    sizes = {name: value for name, value in dataclasses.asdict(backbone).items() if name != "name"}
    if kind == "llm_esr":
        return DualView(SEQUENCES[backbone.name](**{**sizes, "width": backbone.width // 2}), backbone.width)
    return SEQUENCES[backbone.name](**sizes)


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
        user_BD: Tensor = self.sequence(emb_BLD, input_BL != 0)[:, -1]
        return user_BD

    def scores(self, input_BL: Tensor, table_VD: Tensor | None = None) -> Tensor:
        """scores_BV of all items, -inf for padding. The caller bounds B x V."""
        table_VD = self.item_table() if table_VD is None else table_VD
        return score(self.encode(input_BL, table_VD), table_VD)


def score(user_BD: Tensor, table_VD: Tensor) -> Tensor:
    """scores_BV in float32, -inf for padding: half precision would tie items that differ."""
    scores_BV = user_BD.float() @ table_VD.float().T
    scores_BV[:, 0] = -torch.inf
    return scores_BV


class LoadedRecommender:
    """A kept recommender: makes item vectors from LLM embeddings, also of items it never saw, and user vectors from those."""

    def __init__(self, meta: dict[str, Any], item_ids: list[str], tensors: dict[str, Tensor], device: torch.device | str) -> None:
        self.meta, self.item_ids, self.device = meta, item_ids, torch.device(device)
        self.row = {item_id: row for row, item_id in enumerate(item_ids, start=1)}
        self.backbone = Backbone(**meta["backbone"])
        self.whitening: Whitening | None = None
        if "whitening.mean_E" in tensors:
            mean_E, map_EK = tensors["whitening.mean_E"], tensors["whitening.map_EK"]
            self.whitening = Whitening(mean_E, map_EK, meta["explained_variance"]).to(device)
        self.items = build_items(meta["items"], self.backbone, self.whitening, len(item_ids)).to(device)
        self.sequence = build_sequence(self.backbone, meta["items"]["kind"]).to(device).eval()
        self.items.load_state_dict(below(tensors, "recommender.items."))
        self.sequence.load_state_dict(below(tensors, "recommender.sequence."))
        self.items.eval().requires_grad_(False)
        self.sequence.requires_grad_(False)
        turn_DD = tensors.get("turn_DD")
        if turn_DD is not None and not torch.allclose(turn_DD @ turn_DD.T, torch.eye(self.width), atol=1e-4):
            raise RuntimeError("turn_DD is no rotation: scores would change under it")
        self.turn_DD = None if turn_DD is None else turn_DD.to(device)

    @property
    def width(self) -> int:
        """D, the width of item and user vectors."""
        return self.backbone.width

    def table(self) -> Tensor:
        """table_VD of an ID-only recommender, in the order of `item_ids` after the padding row.

        Raises ValueError for any other: its vectors come from `project`.
        """
        if not isinstance(self.items, IdItems):
            raise ValueError("this recommender keeps no item table: project the items' LLM embeddings")
        return self.turned(self.items.table())

    @torch.no_grad()
    def project(self, llm_NE: Tensor, item_ids: Sequence[str]) -> Tensor:
        """emb_ND float32 of any items from their LLM embeddings: whitening, adapter, the ID part where there is one, the turn.

        Raises ValueError for another width than the encoder's, a value that is not finite, or an ID-only recommender.
        """
        if self.whitening is None:
            raise ValueError("an ID-only recommender can't project text: give the id of one that `rat` trained")
        if llm_NE.shape[1] != len(self.whitening.mean_E):
            raise ValueError(f"LLM embeddings are {llm_NE.shape[1]} wide, the recommender reads {len(self.whitening.mean_E)}: "
                             f"embed with its encoder {self.meta.get('encoder_id')}")  # fmt: skip
        white_NK = self.whitening(llm_NE.to(self.device))
        if not bool(white_NK.isfinite().all()):
            raise ValueError("an LLM embedding is not finite: embed these items again")
        row_N = torch.tensor([self.row.get(item_id, 0) for item_id in item_ids], device=self.device)
        if isinstance(self.items, DualItems):
            return self.turned(self.items.project(white_NK, row_N))
        if isinstance(self.items, NullSpaceItems):
            return self.turned(torch.cat([self.items.text(white_NK), self.items.learned[row_N]], dim=1))
        emb_ND = self.items.adapter(white_NK)
        return self.turned(emb_ND + self.items.learned[row_N] if isinstance(self.items, ResidualItems) else emb_ND)

    @torch.no_grad()
    def encode(self, emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        """user_BD of histories given as item VECTORS, newest last, LEFT-padded; scores are dot products with item vectors."""
        newest = self.backbone.max_len
        emb_BLD, valid_BL = emb_BLD[:, -newest:].to(self.device), valid_BL[:, -newest:].to(self.device)
        if self.turn_DD is not None:
            emb_BLD = emb_BLD @ self.turn_DD.T  # the sequence encoder knows items as it was trained on them
        return self.turned(self.sequence(emb_BLD, valid_BL)[:, -1])

    def turned(self, emb_D: Tensor) -> Tensor:
        """Vectors in the basis of the space that they were aligned to; items and users turn alike, so no score changes."""
        return emb_D if self.turn_DD is None else emb_D @ self.turn_DD


def build_items(config: Mapping[str, Any], backbone: Backbone, whitening: Whitening | None, catalogue: int) -> Any:
    """The item source that `config["kind"]` names, without its table of texts."""
    if config["kind"] == "id":
        return IdItems(catalogue + 1, backbone.width)
    assert whitening is not None
    width = whitening.map_EK.shape[1]
    if config["kind"] == "mlp":
        return TextItems(torch.zeros(0, width), MlpAdapter(width, config["hidden"], backbone.width))
    if config["kind"] == "residual":
        return ResidualItems(torch.zeros(catalogue, width), MlpAdapter(width, config["hidden"], backbone.width), backbone.width)
    if config["kind"] == "llm_esr":
        return DualItems(torch.zeros(catalogue, width), config["hidden"], backbone.width)
    return NullSpaceItems(torch.zeros(catalogue, width), backbone.width, config["text_width"])


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def save_recommender(
    path: Path,
    recommender: Recommender,
    *,
    item_ids: Sequence[str],
    backbone: Backbone,
    items: Mapping[str, Any],
    whitening: Whitening | None = None,
    turn_DD: Tensor | None = None,
    meta: Mapping[str, Any],
) -> None:
    """Writes recommender.safetensors, recommender.json and item_ids.json into a folder: all that serving needs.

    `items` is {"kind": "id"}, {"kind": "mlp", "residual" or "llm_esr", "hidden": …} or {"kind": "null_space", "text_width": …};
    `turn_DD` is an orthogonal map that all vectors take on their way out, none leaves them as they are; `meta` is JSON.
    """
    tensors = {f"recommender.{name}": value for name, value in recommender.state_dict().items()}
    known: dict[str, Any] = {**meta, "backbone": dataclasses.asdict(backbone), "items": dict(items), "width": backbone.width}
    if whitening is not None:
        tensors |= {f"whitening.{name}": value for name, value in whitening.state_dict().items()}
        known["explained_variance"] = whitening.explained
    if turn_DD is not None:
        tensors["turn_DD"] = turn_DD
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path / "recommender.safetensors")
    (path / "recommender.json").write_text(json.dumps(known, indent=1, sort_keys=True))
    (path / "item_ids.json").write_text(json.dumps(list(item_ids)))


def load_recommender(path: Path, device: torch.device | str = "cpu") -> LoadedRecommender:
    """Reads what `save_recommender` wrote. Raises ValueError where a file is missing or tensors do not fit."""
    missing = [name for name in ("recommender.safetensors", "recommender.json", "item_ids.json") if not (path / name).exists()]
    if missing:
        raise ValueError(f"{path} holds no {missing[0]}: it is not a recommender's folder")
    meta = json.loads((path / "recommender.json").read_text())
    item_ids = json.loads((path / "item_ids.json").read_text())
    try:
        return LoadedRecommender(meta, item_ids, load_file(path / "recommender.safetensors"), device)
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
