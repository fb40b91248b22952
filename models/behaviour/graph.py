"""ELMRec's view (arXiv 2409.19979): random vectors of users and items, spread over the graph of who took what. Untrained.

What stands near in the graph ends up alike, since it collects the same random vectors. Everything comes from train rows. Powers
that lead from items to items are taken, without the first: an item's own random vector would drown what it collects, and it would
rank near chance (BENCHMARKS.md). Rows are of length one, as popular items collect more.

Shapes: U users, V items + 1 (row 0 is padding), D width, E different (user, item) pairs, M nodes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.behaviour.data import Histories
from models.behaviour.items import IdItems
from models.behaviour.recommender import Backbone, Recommender, build_sequence

LAYERS = 4
FADE = 0.7
"""How much an event weighs of the one after it, where a history is read by a fading mean."""


def graph_table(events: Histories, width: int, *, layers: int = LAYERS, seed: int = 0) -> Tensor:
    """table_VD: the items' rows, of length one, of mean over even l = 2..layers of (D^-1/2 A D^-1/2)^l R, with R Gaussian.

    Each pair of a user and an item counts once.

    Padding and items without a train event are zero: text has to fill them. Raises ValueError for an empty graph.
    """
    rows, users = events.catalogue + 1, len(events.train_end_U)
    train_N = events.in_train_N
    key_E = torch.unique(events.user_N[train_N] * rows + events.items_N[train_N])
    if not len(key_E):
        raise ValueError("no user has a train event: the graph is empty; extract a longer history or move the split")
    # drawn on the CPU, so that every device starts from the same
    drawn = torch.randn(users + rows, width, generator=torch.Generator().manual_seed(seed))
    spread = propagated(key_E // rows, key_E % rows + users, drawn.to(key_E.device), layers)
    table_VD = spread[users:]
    met_V = torch.zeros(rows, dtype=torch.bool, device=key_E.device)
    met_V[key_E % rows] = True
    return F.normalize(table_VD, dim=1) * met_V[:, None]


def propagated(one_E: Tensor, other_E: Tensor, start_MD: Tensor, layers: int) -> Tensor:
    """Mean over even l = 2..layers of (D^-1/2 A D^-1/2)^l start, in the undirected graph of these edges, each given once."""
    nodes = len(start_MD)
    place_2E = torch.cat([torch.stack([one_E, other_E]), torch.stack([other_E, one_E])], dim=1)
    root_M = torch.bincount(place_2E[0], minlength=nodes).clamp_min(1).float().rsqrt()
    value_E = root_M[place_2E[0]] * root_M[place_2E[1]]
    graph = torch.sparse_coo_tensor(place_2E, value_E, (nodes, nodes), check_invariants=False).coalesce()
    total_MD, layer_MD = torch.zeros_like(start_MD), start_MD
    for _ in range(layers // 2):
        layer_MD = graph @ (graph @ layer_MD)
        total_MD = total_MD + layer_MD
    mean_MD: Tensor = total_MD / (layers // 2)
    return mean_MD


def graph_recommender(events: Histories, backbone: Backbone, seed: int = 0) -> Recommender:
    """The view as a recommender by itself: its table, as wide as the backbone, read by a fading mean of as many events."""
    items = IdItems(events.catalogue + 1, backbone.width).to(events.items_N.device)
    items.weight.data.copy_(graph_table(events, backbone.width, seed=seed))
    return Recommender(items, build_sequence(backbone, fading=FADE)).to(events.items_N.device).eval()
