"""LLM-ESR, a baseline (Liu et al., arXiv 2405.20646): items as text and as ID, joined by attention; users learn from like users.

Two liberties, both against known faults: the attention between the views is causal, since every position has a loss, and the
adapter has an activation between its linear maps.

Shapes: B rows, L positions (newest last, LEFT-padded), N items, K whitened width, D width of an item (D / 2 a view), V items + 1,
U users, S like users.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.behaviour.data import Histories
from models.behaviour.items import MlpAdapter
from models.behaviour.sasrec import attention_mask

SCALE = 0.05
"""Size of a fresh ID vector's values."""
CHUNK = 2**24


class DualItems(nn.Module):
    """Item vectors of two halves: adapted text, frozen below the adapter, and an ID vector that starts as the text's PCA."""

    white_VK: Tensor

    def __init__(self, white_NK: Tensor, hidden: int, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"width {width} is odd: LLM-ESR gives half of it to each view")
        self.rows, self.view = len(white_NK) + 1, width // 2
        self.register_buffer("white_VK", torch.cat([torch.zeros_like(white_NK[:1]), white_NK]), persistent=False)
        self.adapter = MlpAdapter(white_NK.shape[1], hidden, self.view)
        self.learned = nn.Parameter(self.principal(self.white_VK))

    def principal(self, white_NK: Tensor) -> Tensor:
        """The strongest directions of the text, at the size of a fresh ID table: where an ID vector starts, or stays if cold."""
        found_NH = SCALE * white_NK[:, : self.view]
        return F.pad(found_NH, (0, self.view - found_NH.shape[1]))

    def project(self, white_NK: Tensor, row_N: Tensor) -> Tensor:
        """emb_ND of any items; row 0 stands for those that were never trained."""
        learned_NH = torch.where((row_N != 0)[:, None], self.learned[row_N], self.principal(white_NK))
        return torch.cat([self.adapter(white_NK), learned_NH], dim=1)

    def forward(self, items: Tensor) -> Tensor:
        """Item indices of any shape -> their vectors, one dimension more; padding is zero."""
        both = torch.cat([self.adapter(self.white_VK[items]), F.embedding(items, self.learned, padding_idx=0)], dim=-1)
        emb: Tensor = both * (items != 0).unsqueeze(-1)
        return emb

    def table(self) -> Tensor:
        """table_VD; row 0 is zero."""
        table_VD: Tensor = self(torch.arange(self.rows, device=self.learned.device))
        return table_VD


class DualView(nn.Module):
    """One sequence encoder for both views, each of which first attends to the other."""

    mask_share = 0.0

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        if getattr(encoder, "mask_share", 0.0):
            raise ValueError("LLM-ESR's views look at each other's items, masked ones too: take a causal backbone")
        self.encoder = encoder
        self.query, self.key, self.value = (nn.ModuleList(nn.Linear(width // 2, width // 2) for _ in range(2)) for _ in range(3))

    def forward(self, emb_BLD: Tensor, valid_BL: Tensor) -> Tensor:
        """emb_BLD, valid_BL -> hidden_BLD, text half first; position t sees items 0..t."""
        views = emb_BLD.chunk(2, dim=-1)
        mask_B1LL = attention_mask(valid_BL, causal=True)
        hidden = [self.encoder(self.attend(view, views[1 - view], own, mask_B1LL), valid_BL) for view, own in enumerate(views)]
        return torch.cat(hidden, dim=-1)

    def attend(self, view: int, other_BLH: Tensor, own_BLH: Tensor, mask_B1LL: Tensor) -> Tensor:
        """A view, with what it asks of the other added: keys and values of the other, queries its own."""
        query, key, value = self.query[view](own_BLH), self.key[view](other_BLH), self.value[view](other_BLH)
        asked: Tensor = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], attn_mask=mask_B1LL)
        return own_BLH + asked[:, 0]


def like_users(events: Histories, white_VK: Tensor, count: int) -> Tensor:
    """like_US: of each user the others whose train items' texts are nearest on average (cosine); white_VK has row 0 for padding.

    A user without train events has none, and fewer users than `count` are all like: U stands for nobody.
    """
    users = len(events.train_end_U)
    in_train_N = events.in_train_N
    sum_UK = torch.zeros(users, white_VK.shape[1], device=white_VK.device)
    sum_UK.index_add_(0, events.user_N[in_train_N], white_VK[events.items_N[in_train_N]].float())
    profile_UK = F.normalize(sum_UK, dim=1)
    nobody_U = events.train_end_U == 0
    found = []
    for start in range(0, users, step := max(1, CHUNK // max(users, 1))):
        near_BU = profile_UK[start : start + step] @ profile_UK.T
        near_BU[:, nobody_U] = -torch.inf
        rows = torch.arange(len(near_BU), device=near_BU.device)
        near_BU[rows, rows + start] = -torch.inf
        near_BU[nobody_U[start : start + step]] = -torch.inf
        value_BS, like_BS = near_BU.topk(min(count, users))
        found.append(torch.where(value_BS == -torch.inf, users, like_BS))
    return torch.cat(found)


class Distiller:
    """Pulls a user's vector towards the mean of like users' (self-distillation): each as it was when last trained on."""

    def __init__(self, events: Histories, like_US: Tensor, width: int, alpha: float) -> None:
        users, device = len(like_US), like_US.device
        self.train_end_U, self.like_US, self.alpha = events.train_end_U, like_US, alpha
        self.last_UD = torch.zeros(users + 2, width, device=device)
        """Two more: nobody, whom nobody is like, and a place where other rows write."""
        self.known_U = torch.zeros(users + 2, device=device)

    def state(self) -> dict[str, Tensor]:
        """What it remembers of users: part of a training's checkpoint."""
        return {"distiller.last_UD": self.last_UD, "distiller.known_U": self.known_U}

    def __call__(self, users_B: Tensor, ends_B: Tensor, user_BD: Tensor) -> Tensor:
        """One number for a batch of training rows; only a user's newest row, which ends where train does, counts."""
        newest_B = (ends_B == self.train_end_U[users_B]) & (ends_B > 0)
        like_BS = self.like_US[users_B]
        known_BS = self.known_U[like_BS]
        mean_BD = (self.last_UD[like_BS] * known_BS[..., None]).sum(1) / known_BS.sum(1).clamp_min(1)[:, None]
        counts_B = newest_B & (known_BS.sum(1) > 0)
        loss_B = (user_BD - mean_BD).square().mean(1) * counts_B
        place_B = torch.where(newest_B, users_B, len(self.like_US) + 1)
        self.last_UD[place_B] = user_BD.detach()
        self.known_U[place_B] = newest_B.float()
        return self.alpha * loss_B.sum() / counts_B.sum().clamp_min(1)
