"""Parts of a recommender that need no gradient: text in chosen directions, a teacher shrunk to text (counting: `counting.py`).

Everything that behaviour teaches here comes from train rows. What they are worth, alone and fused: BENCHMARKS.md.

Shapes: V items + 1 (row 0 is padding), N items, K whitened width, D width of a part, P pairs of items.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.behaviour.data import Histories, neighbours
from models.behaviour.items import DirectionItems, ShrunkItems

CHUNK = 2**18
AGREEMENT_RIDGE = 0.01
"""Of the mean variance of a direction: what keeps rare directions from being chosen by chance."""
PREDICTION_RIDGE = 0.3


def text_items(white_NK: Tensor, events: Histories, width: int, directions: str = "agreement") -> DirectionItems:
    """Text in `width` of its whitened directions.

    `agreement`: those in which the texts of items that users took one after the other agree most (canonical correlation of
    neighbours in train rows, Hotelling 1936), so that text that no behaviour follows is left out. `random`: an orthonormal map
    of all directions, which keeps their dot products as well as so few numbers can (Johnson and Lindenstrauss 1984).
    `strongest`: the first ones. Raises ValueError for another word.
    """
    white = white_NK.shape[1]
    made = DirectionItems(white, min(width, white)).to(white_NK.device)
    if directions == "agreement":
        made.map_KD.copy_(agreement(F.normalize(white_NK, dim=1), neighbours(events) - 1, made.map_KD.shape[1]))
    elif directions == "random":
        draw_KK = torch.randn(white, white, generator=torch.Generator().manual_seed(white))
        made.map_KD.copy_(torch.linalg.qr(draw_KK).Q[:, :width])
    elif directions == "strongest":
        made.map_KD.copy_(torch.eye(white)[:, :width])
    else:
        raise ValueError(f"directions {directions!r} are none of agreement, random, strongest")
    return made


def agreement(text_NK: Tensor, pair_P2: Tensor, width: int) -> Tensor:
    """map_KD: the directions with the highest correlation between the texts of both items of a pair; any order of the two."""
    white = text_NK.shape[1]
    both_KK = torch.zeros(white, white, dtype=torch.float64, device=text_NK.device)
    own_KK = torch.zeros_like(both_KK)
    for start in range(0, len(pair_P2), CHUNK):
        one_PK, other_PK = (text_NK[pair_P2[start : start + CHUNK, side]].double() for side in (0, 1))
        both_KK += one_PK.T @ other_PK
        own_KK += one_PK.T @ one_PK + other_PK.T @ other_PK
    both_KK, own_KK = (both_KK + both_KK.T) / 2, own_KK / 2
    ridge = AGREEMENT_RIDGE * float(own_KK.diagonal().mean()) + 1e-12
    root_KK = torch.linalg.cholesky(own_KK + ridge * torch.eye(white, dtype=torch.float64, device=text_NK.device))
    inverse_KK = torch.linalg.solve_triangular(root_KK, torch.eye(white, dtype=torch.float64, device=root_KK.device), upper=False)
    _, direction_KK = torch.linalg.eigh(inverse_KK @ both_KK @ inverse_KK.T)
    map_KD: Tensor = inverse_KK.T @ direction_KK.flip(1)[:, :width]
    # an eigenvector's sign is the solver's whim
    return (map_KD * map_KD.gather(0, map_KD.abs().argmax(0)[None]).sign()).float()


def shrunk_items(teacher_VD: Tensor, counts_V: Tensor, white_NK: Tensor, k: float) -> ShrunkItems:
    """A teacher's table shrunk towards what a ridge map from whitened text foretells of it; k events weigh as much as text.

    Items are weighed by what is known of them, n / (n + k). Items without an event are their prediction. Raises ValueError where
    no item has one.
    """
    if not bool((counts_V > 0).any()):
        raise ValueError("no item has a train event: there is no teacher to shrink; extract a longer history")
    made = ShrunkItems(len(teacher_VD), white_NK.shape[1], teacher_VD.shape[1]).to(teacher_VD.device)
    share_N = (counts_V / (counts_V + k))[1:].double()
    text_NK, id_ND = F.normalize(white_NK, dim=1).double(), teacher_VD[1:].double()
    mean_D = (share_N[:, None] * id_ND).sum(0) / share_N.sum()
    gram_KK = (text_NK * share_N[:, None]).T @ text_NK
    gram_KK.diagonal().add_(PREDICTION_RIDGE * float(gram_KK.diagonal().mean()) + 1e-12)
    map_KD = torch.linalg.solve(gram_KK, (text_NK * share_N[:, None]).T @ (id_ND - mean_D))
    made.predict_KD.copy_(map_KD)
    made.mean_D.copy_(mean_D)
    guess_ND = made.predicted(white_NK)
    made.weight[1:] = share_N[:, None].float() * teacher_VD[1:] + (1 - share_N[:, None].float()) * guess_ND
    return made
