"""Judges an encoder: how often it finds a held-out view's item in the catalogue, the shape of its space, and its gates.

Shapes: Q queries, C candidates, N items of a sample, E width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.text.embedding import embed
from models.text.encoder import Encoder
from models.text.prompts import Ints, Prompts, Texts, prompts
from models.text.views import views

HELD_OUT = 0.2
"""Share of a small catalogue that is kept for validation, at most."""


@dataclass(frozen=True, kw_only=True)
class Gates:
    """When an encoder is refused (METHOD §1)."""

    mean_cosine: float = 0.98
    """Largest mean cosine between two different items: above it the space has collapsed."""
    effective_rank: float = 4.0
    """Smallest effective rank of the items' embeddings (Roy and Vetterli 2007); a quarter of the items in tiny catalogues."""
    moved: float = 1e-3
    """Smallest relative distance from the base model's embeddings."""
    recall_drop: float = 0.0
    """How much less often than the base model it may find held-out views; more than 0 is for small validation sets."""


class ViewSettings(Protocol):
    """What the validation set needs of a training's settings (models.text.scft.Scft has them)."""

    @property
    def ratio(self) -> float:
        """Share of an item's attributes that a view drops, on average."""

    @property
    def validation_items(self) -> int:
        """Held-out items, at most."""

    @property
    def candidates(self) -> int:
        """Items among which views are searched, at most."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Views of held-out items, and the whole items among which they must be found."""

    view_a: Prompts
    view_b: Prompts
    candidates: Prompts
    target_Q: Ints
    """The row of each view's item among the candidates."""
    items: Ints
    """The held-out items."""


def hold_out_views(texts: Texts, settings: ViewSettings, limit: int, seed: int) -> tuple[Validation, Ints]:
    """A catalogue -> the validation set, and the items left to train on. Of items with equal texts only the first is taken.

    Raises ValueError where there are fewer than 4 different texts.
    """
    unique = np.unique(texts.text_I, return_index=True)[1]
    if len(unique) < 4:
        raise ValueError(f"the catalogue has {len(unique)} different texts: SCFT needs at least 4, and thousands to be of use")
    random = np.random.default_rng([seed, 0])
    order = random.permutation(unique)
    count = max(2, min(settings.validation_items, int(len(unique) * HELD_OUT)))
    items, rest = np.sort(order[:count]), np.sort(order[count:])
    looked = np.concatenate([items, order[count : max(count, settings.candidates)]])
    first, second = (views(texts, items, settings.ratio, limit, random)[0] for _ in range(2))
    whole, _ = prompts(texts, looked, limit)
    return Validation(view_a=first, view_b=second, candidates=whole, target_Q=np.arange(count), items=items), rest


def validate_views(encoder: Encoder, validation: Validation) -> tuple[dict[str, float], NDArray[np.float32]]:
    """An encoder -> its figures on the validation set, and its candidates' embeddings."""
    was = encoder.training
    encoder.eval()
    with autocast_like_base(encoder):
        a_QE, b_QE, items_CE = (embed(encoder, part) for part in (validation.view_a, validation.view_b, validation.candidates))
    encoder.train(was)
    return view_figures(*map(torch.from_numpy, (a_QE, b_QE, items_CE, validation.target_Q))), items_CE


def view_figures(a_QE: Tensor, b_QE: Tensor, items_CE: Tensor, target_Q: Tensor) -> dict[str, float]:
    """Embeddings of views a, views b and candidates -> how often view a's item is found, and the shape of the space.

    NaN where an embedding is not finite. Alignment and uniformity: Wang and Isola 2020, arXiv 2005.10242;
    effective rank: Roy and Vetterli 2007.
    """
    a_QE, b_QE, items_CE = (F.normalize(emb.float(), dim=1) for emb in (a_QE, b_QE, items_CE))
    rank_Q = torch.cat(
        [target_ranks(a_QE[start : start + 512], items_CE, target_Q[start : start + 512]) for start in range(0, len(a_QE), 512)]
    )
    shape_NE = items_CE[torch.linspace(0, len(items_CE) - 1, min(2048, len(items_CE))).long()]
    cosine_NN = shape_NE @ shape_NE.T
    others = ~torch.eye(len(shape_NE), dtype=torch.bool)
    return {
        "recall_1": float((rank_Q <= 1).float().mean()),
        "recall_10": float((rank_Q <= 10).float().mean()),
        "mrr": float((1 / rank_Q).mean()),
        "alignment": float((a_QE - b_QE).square().sum(1).mean()),
        "uniformity": float((4 * cosine_NN[others] - 4).exp().mean().log()),
        "mean_cosine": float(cosine_NN[others].mean()),
        "effective_rank": effective_rank(shape_NE),
    }


def target_ranks(query_QE: Tensor, items_CE: Tensor, target_Q: Tensor) -> Tensor:
    """Queries, candidates, targets -> rank_Q of each target, 1 is best. Ties count half; NaN where a score is not finite."""
    scores_QC = query_QE @ items_CE.T
    own_Q1 = scores_QC.gather(1, target_Q[:, None])
    rank_Q = 1 + (scores_QC > own_Q1).sum(1) + ((scores_QC == own_Q1).sum(1) - 1) / 2
    return rank_Q.masked_fill(~scores_QC.isfinite().all(1), math.nan)


def effective_rank(emb_NE: Tensor) -> float:
    """emb_NE -> how many directions the embeddings use: exp of the entropy of the singular values' shares, after centring."""
    if not bool(emb_NE.isfinite().all()):
        return math.nan
    values = torch.linalg.svdvals(emb_NE - emb_NE.mean(0))
    share = values / values.sum().clamp(min=1e-12)
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()))


def refusals(
    tuned: Mapping[str, float], base: Mapping[str, float], moved: float, gates: Gates, *, candidates: int, zero_shot: bool = False
) -> list[str]:
    """Figures of an encoder and of its base -> the reasons to refuse it, with the figures. Empty where it passes.

    `moved` is the relative distance of its embeddings from the base model's.
    """
    if not all(map(math.isfinite, (*tuned.values(), moved))):
        return ["its embeddings are not finite"]
    wrong = []
    smallest = min(gates.effective_rank, candidates / 4)
    if tuned["mean_cosine"] > gates.mean_cosine:
        wrong.append(f"the space has collapsed: mean cosine {tuned['mean_cosine']:.4f} is above {gates.mean_cosine}")
    if tuned["effective_rank"] < smallest:
        wrong.append(f"the space has collapsed: effective rank {tuned['effective_rank']:.2f} is below {smallest:.2f}")
    if not zero_shot and moved < gates.moved:
        wrong.append(f"its embeddings are the base model's: relative distance {moved:.1e} is below {gates.moved}")
    if tuned["recall_1"] < base["recall_1"] - gates.recall_drop:
        wrong.append(f"it finds held-out views less often than the base model: {tuned['recall_1']:.4f} < {base['recall_1']:.4f}")
    return wrong


def relative_distance(emb_CE: NDArray[np.float32], base_CE: NDArray[np.float32]) -> float:
    """Two encoders' embeddings of the same texts -> their distance, relative to the norm of the second."""
    return float(np.linalg.norm(emb_CE - base_CE) / max(float(np.linalg.norm(base_CE)), 1e-12))


def autocast_like_base(encoder: Encoder) -> AbstractContextManager[Any]:
    """Autocast to bf16 where the base model is in bf16. LoRA weights stay in float32 and are cast where they are used."""
    half = next(encoder.model.parameters()).dtype == torch.bfloat16
    return torch.autocast(encoder.device.type, torch.bfloat16, enabled=half)
