"""Users who keep to one kind of item each, items whose texts tell their kind, and a few items that nobody met in training."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from models.behaviour.assembly import Material
from models.behaviour.data import Histories, histories, train_counts
from models.behaviour.fused import Part
from models.behaviour.items import IdItems, MlpAdapter, TextItems
from models.behaviour.recommender import Backbone, LoadedRecommender, build_sequence
from models.behaviour.whitening import Whitening, fit_whitening

KINDS, EACH, USERS, LENGTH = 6, 20, 400, 10
ITEMS = KINDS * EACH
COLD = (EACH, 2 * EACH, 3 * EACH)
"""Of three kinds one item that only validation and test events name."""


def events(seed: int = 0) -> Histories:
    """Each user walks over items of one kind; the last two events validate and test."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for user in range(USERS):
        kind = user % KINDS
        order = torch.randperm(EACH - 1, generator=generator)[:LENGTH] + 1 + kind * EACH
        items = order.tolist()
        if kind < len(COLD) and (turn := user // KINDS % 3) < 2:
            items[-2 + turn] = COLD[kind]
        rows += items
    return histories(
        offsets=[LENGTH * user for user in range(USERS + 1)], items=rows, timestamps=list(range(len(rows))),
        train_end=[LENGTH - 2] * USERS, valid_end=[LENGTH - 1] * USERS, catalogue=ITEMS,
    )  # fmt: skip


def later_changed(logs: Histories) -> Histories:
    """The same train rows, with other items after them."""
    changed = logs.items_N.clone()
    late_N = logs.position_N >= logs.train_end_U[logs.user_N]
    changed[late_N] = changed[late_N] % ITEMS + 1
    return dataclasses.replace(logs, items_N=changed)


def texts(width: int = 16, seed: int = 0, noise: float = 0.7) -> Tensor:
    """llm_NE: a direction of its own for each kind, and louder noise that says nothing."""
    generator = torch.Generator().manual_seed(seed)
    kind_N = torch.arange(ITEMS) // EACH
    centre_KE = torch.zeros(KINDS, width)
    centre_KE[:, :KINDS] = torch.eye(KINDS)
    return centre_KE[kind_N] + noise * torch.randn(ITEMS, width, generator=generator)


def material(seed: int = 0, *, teacher: bool = True, llm_NE: Tensor | None = None, width: int = 8) -> Material:
    """An untrained llmemb part and a teacher that knows the kinds of the items it met."""
    logs, read = events(seed), texts(seed=seed) if llm_NE is None else llm_NE
    counts_V = train_counts(logs)
    whitening: Whitening = fit_whitening(read, 12)
    white_NK = whitening(read)
    torch.manual_seed(seed)
    backbone = Backbone(width=width, max_len=6, dropout=0.0)
    items = TextItems(white_NK, MlpAdapter(white_NK.shape[1], 12, width))
    llmemb = Part(name="llmemb", items=items.eval(), sequence=build_sequence(backbone).eval(), backbone=backbone,
                  config={"kind": "mlp", "hidden": 12})  # fmt: skip
    ids = [f"i{number}" for number in range(1, ITEMS + 1)]
    known, table_VD = None, None
    if teacher:
        id_items = IdItems(ITEMS + 1, width)
        table_VD = F.pad(torch.eye(KINDS, width)[torch.arange(ITEMS) // EACH], (0, 0, 1, 0)) * (counts_V > 0)[:, None]
        id_items.weight.data.copy_(table_VD)
        part = Part(name="id", items=id_items, sequence=build_sequence(backbone).eval(), backbone=backbone, config={"kind": "id"})
        known = part.loaded(ids, whitening, "cpu")
        assert isinstance(known, LoadedRecommender)
    return Material(
        events=logs, counts_V=counts_V, white_NK=white_NK, whitening=whitening, item_ids=ids, llmemb=llmemb, teacher=known,
        teacher_VD=table_VD, unseen=True,
    )  # fmt: skip
