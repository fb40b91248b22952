"""The counting part: item-to-item tables in closed form from train rows, cut to low rank, so that what floors know is a part too.

A symmetric table (co-occurrence, EASE's partial correlations) is cut to its leading eigenvectors: users and items are read alike.
One with a direction (transitions, L3AE) is cut by its singular vectors: an item carries two sides, the vector that it is found
by and the one that a history is read from. What each is worth, alone and fused: BENCHMARKS.md.

Shapes: V items + 1 (row 0 is padding), N items, K whitened width, D width of the part, R rank, P pairs of items,
U users of a chunk.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.behaviour.data import Histories
from models.behaviour.items import TableItems

Counting = Literal["cooccurrence", "transitions", "ease", "l3ae"]
DIRECTED = frozenset({"transitions", "l3ae"})
"""Kinds whose table says what comes after an item, not what stands beside it."""
WINDOW = 3
"""Events apart that still count as together."""
POWER_STEPS = 12
DENSE = {"cuda": 20_000, "cpu": 6_000}
"""Items up to which a matrix of items by items is inverted, by device: seconds on each."""
INVERTED = frozenset({"ease", "l3ae"})
RIDGE = 20.0
"""EASE's ridge, in mean train events of an item."""
TEXT_RIDGE = 0.3
"""Ridge of the text's own item-to-item weights, in mean squares of a text: those have length one."""
TEXT_PULL = 5.0
"""How much L3AE is pulled towards them, in mean train events of an item."""


def counting_items(
    events: Histories, width: int, kind: Counting = "cooccurrence", white_NK: Tensor | None = None, seed: int = 0
) -> TableItems:
    """Items by what train rows count of them, `width` wide; of a directed kind half of that is each side.

    `cooccurrence`: cosines of how often two items stood within WINDOW events; memory grows with the pairs. `transitions`: what
    follows an item, as shares. `ease`: partial correlations of items (EASE, Steck, WWW 2019, in its symmetric form). `l3ae`:
    EASE pulled towards the weights that whitened text gives (L3AE, CIKM 2025). Raises ValueError for another word, for a
    catalogue that is too large to invert, or for `l3ae` without texts.
    """
    rows = events.catalogue + 1
    made = TableItems(rows, min(width, 2 * (rows - 1) if kind in DIRECTED else rows - 1)).to(events.items_N.device)
    if kind == "cooccurrence":
        fill_symmetric(made.weight, cosines(events), seed)
    elif kind == "transitions":
        fill_directed(made.weight, following(events), seed)
    elif kind in INVERTED:
        if not affordable(kind, events):
            raise ValueError(f"counting {kind!r} inverts a matrix of items by items: {rows - 1:,} items are more than "
                             f"{most(events):,}; take fusion.counting cooccurrence or transitions")  # fmt: skip
        if kind == "ease":
            fill_symmetric(made.weight, partial_correlations(events), seed)
        elif white_NK is None:
            raise ValueError("counting 'l3ae' reads whitened text: give white_NK")
        else:
            fill_directed(made.weight, pulled_to_text(events, white_NK), seed)
    else:
        raise ValueError(f"counting {kind!r} is none of cooccurrence, transitions, ease, l3ae")
    made.weight[0] = 0
    return made


def affordable(kind: Counting, events: Histories) -> bool:
    """Whether a kind can be counted for a catalogue of this size."""
    return kind not in INVERTED or events.catalogue <= most(events)


def most(events: Histories) -> int:
    """Items up to which a matrix of items by items is inverted on the device of the events."""
    return DENSE.get(events.items_N.device.type, DENSE["cpu"])


# ----------------------------------------------------------------------------------------------------------------- tables


def cosines(events: Histories) -> Tensor:
    """matrix_VV, sparse: how often two items stood together, over the root of how often each stood beside anything."""
    rows, device = events.catalogue + 1, events.items_N.device
    place_2P, times_P = cooccurrence(events)
    total_V = torch.zeros(rows, device=device).index_add_(0, place_2P[0], times_P)
    cosine_P = times_P / (total_V[place_2P[0]] * total_V[place_2P[1]]).sqrt()
    return torch.sparse_coo_tensor(place_2P, cosine_P, (rows, rows), check_invariants=False).coalesce()


def cooccurrence(events: Histories) -> tuple[Tensor, Tensor]:
    """place_2P, times_P: how often two items stood within WINDOW events of one user's train rows, both ways round."""
    keys = []
    for apart in range(1, WINDOW + 1):
        one_P, other_P = pairs(events, apart)
        keys += [one_P * (events.catalogue + 1) + other_P, other_P * (events.catalogue + 1) + one_P]
    return counted(torch.cat(keys), events.catalogue + 1)


def following(events: Histories) -> Tensor:
    """matrix_VV, sparse: of what came right after an item in train rows, the share that each other item has."""
    rows, device = events.catalogue + 1, events.items_N.device
    one_P, other_P = pairs(events, 1)
    place_2P, times_P = counted(one_P * rows + other_P, rows)
    total_V = torch.zeros(rows, device=device).index_add_(0, place_2P[0], times_P)
    share_P = times_P / total_V[place_2P[0]]
    return torch.sparse_coo_tensor(place_2P, share_P, (rows, rows), check_invariants=False).coalesce()


def pairs(events: Histories, apart: int) -> tuple[Tensor, Tensor]:
    """one_P, other_P: different items of a user's train rows that stand `apart` events from one another, in their order."""
    train_N = events.in_train_N
    same_P = train_N[apart:] & (events.position_N[apart:] >= apart)
    one_P, other_P = events.items_N[:-apart][same_P], events.items_N[apart:][same_P]
    return one_P[one_P != other_P], other_P[one_P != other_P]


def counted(key_P: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Keys row * rows + column -> place_2P of each different one, and how often it stands there."""
    key_P, times_P = torch.unique(key_P, return_counts=True)
    return torch.stack([key_P // rows, key_P % rows]), times_P.float()


def gram(events: Histories, at_once: int = 4096) -> Tensor:
    """gram_VV float64: how many users had both items in train rows, each user counted once."""
    rows, users = events.catalogue + 1, len(events.train_end_U)
    gram_VV = torch.zeros(rows, rows, dtype=torch.float64, device=events.items_N.device)
    train_N = events.in_train_N
    for start in range(0, users, at_once):
        mine_N = train_N & (events.user_N >= start) & (events.user_N < start + at_once)
        had_UV = torch.zeros(min(at_once, users - start), rows, device=gram_VV.device)
        had_UV[events.user_N[mine_N] - start, events.items_N[mine_N]] = 1
        gram_VV += (had_UV.T @ had_UV).double()  # whole numbers below 2**24: exact
    return gram_VV


def partial_correlations(events: Histories) -> Tensor:
    """matrix_VV: -P_ij / sqrt(P_ii P_jj) of the ridge's inverse P; EASE's own weights are -P_ij / P_jj. Zeros on the diagonal.

    An item without an event has no neighbour: its row is zero.
    """
    gram_VV = gram(events)
    inverse_VV = ridge_inverse(gram_VV, RIDGE * mean_count(gram_VV))
    root_V = inverse_VV.diagonal().sqrt()
    matrix_VV = -inverse_VV / (root_V[:, None] * root_V[None])
    return matrix_VV.fill_diagonal_(0).float()


def pulled_to_text(events: Histories, white_NK: Tensor) -> Tensor:
    """matrix_VV, B of L3AE: argmin |X - XB|^2 + r |B|^2 + p |B - S|^2 with zeros on the diagonal; S is EASE of the texts.

    In closed form: B = I + p P S - P diag((1 + p (P S)_jj) / P_jj), P = (X'X + (r + p) I)^-1.
    """
    gram_VV = gram(events)
    mean = mean_count(gram_VV)
    pull = TEXT_PULL * mean
    inverse_VV = ridge_inverse(gram_VV, RIDGE * mean + pull)
    toward_VV = pull * inverse_VV @ text_weights(white_NK)
    back_V = (1 + toward_VV.diagonal()) / inverse_VV.diagonal()
    return (toward_VV - inverse_VV * back_V[None]).fill_diagonal_(0).float()


def text_weights(white_NK: Tensor) -> Tensor:
    """weight_VV float64: each text as a ridge sum of the others (EASE with texts in the users' place). Row and column 0 are zero.

    By the identity of Woodbury only a matrix of K by K is inverted.
    """
    text_NK = F.normalize(white_NK, dim=1).double()
    small_KK = ridge_inverse(text_NK.T @ text_NK, TEXT_RIDGE)
    # P = (I - Z (Z'Z + t I)^-1 Z') / t; its scale falls out
    inverse_NN = -(text_NK @ small_KK @ text_NK.T)
    inverse_NN.diagonal().add_(1)
    weight_NN = -inverse_NN / inverse_NN.diagonal()[None]
    return F.pad(weight_NN.fill_diagonal_(0), (1, 0, 1, 0))


def ridge_inverse(gram_DD: Tensor, ridge: float) -> Tensor:
    """(gram + ridge I)^-1 of a symmetric matrix, by Cholesky."""
    shifted_DD = gram_DD.clone()
    shifted_DD.diagonal().add_(ridge + 1e-12)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted_DD))


def mean_count(gram_VV: Tensor) -> float:
    """Mean number of users of an item that has any."""
    count_V = gram_VV.diagonal()
    return float(count_V.sum() / (count_V > 0).sum().clamp_min(1)) or 1.0


# --------------------------------------------------------------------------------------------------------------- low rank


def fill_symmetric(weight_VD: Tensor, matrix_VV: Tensor, seed: int) -> None:
    """Leading eigenvectors of a symmetric table, each times the root of its eigenvalue: dot products rebuild it."""
    basis_VR = subspace(matrix_VV, weight_VD.shape[1], seed, symmetric=True)
    if not basis_VR.shape[1]:
        return
    small_RR = basis_VR.T @ (matrix_VV @ basis_VR)
    value_R, turn_RR = torch.linalg.eigh((small_RR + small_RR.T) / 2)
    few = min(weight_VD.shape[1], len(value_R))
    value_R, turn_RR = value_R.flip(0)[:few].clamp_min(0), turn_RR.flip(1)[:, :few]
    emb_VR = (basis_VR @ turn_RR) * value_R.sqrt()
    weight_VD[:, :few] = emb_VR * emb_VR.gather(0, emb_VR.abs().argmax(0)[None]).sign()


def fill_directed(weight_VD: Tensor, matrix_VV: Tensor, seed: int) -> None:
    """Singular vectors of a table from row to column: the first half finds an item, the second reads it in a history."""
    rank = weight_VD.shape[1] // 2
    basis_VR = subspace(matrix_VV, rank, seed, symmetric=False)
    if not basis_VR.shape[1]:
        return
    left_RR, value_R, right_VR = torch.linalg.svd((matrix_VV.T @ basis_VR).T, full_matrices=False)
    few = min(rank, len(value_R))
    read_VR = (basis_VR @ left_RR)[:, :few] * value_R[:few].sqrt()
    found_VR = right_VR.T[:, :few] * value_R[:few].sqrt()
    sign_1R = read_VR.gather(0, read_VR.abs().argmax(0)[None]).sign()
    weight_VD[:, :few], weight_VD[:, rank : rank + few] = found_VR * sign_1R, read_VR * sign_1R


def subspace(matrix_VV: Tensor, width: int, seed: int, *, symmetric: bool) -> Tensor:
    """basis_VR, orthonormal, of the leading directions of the rows: a subspace iteration, the same on every run.

    Rows without a value stay zero. Empty where the table is.
    """
    filled_V = (matrix_VV.abs() @ torch.ones(len(matrix_VV), 1, device=matrix_VV.device)).flatten() != 0
    rank = min(width + 8, int(filled_V.sum()))
    drawn_VR = torch.randn(len(matrix_VV), rank, generator=torch.Generator().manual_seed(seed))
    basis_VR = drawn_VR.to(matrix_VV.device) * filled_V[:, None]
    for _ in range(POWER_STEPS if rank else 0):
        # a symmetric table is shifted by one, so that the largest eigenvalues, not the most negative ones, stand out
        turned_VR = matrix_VV @ basis_VR + basis_VR if symmetric else matrix_VV @ (matrix_VV.T @ basis_VR)
        basis_VR = torch.linalg.qr(turned_VR).Q
    return basis_VR
