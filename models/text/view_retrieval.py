"""Judges an encoder: how often it finds a held-out view's item in the catalogue, the shape of its space, and its gates.

Shapes: Q queries, C candidates, N items of a sample, E width.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.processes import from_first
from models.text.embedding import embed, embed_together
from models.text.encoder import Encoder
from models.text.prompts import Ints, Prompts, Texts, prompts
from models.text.views import views

HELD_OUT = 0.2
"""Share of a small catalogue that is kept for validation, at most."""
QUIET = 5.0
"""Seconds between two reports of progress, at least."""
CPU_TOKENS = 1024
"""Tokens of a step on a CPU while progress is reported: progress comes after a step, and a larger one can take over 10 s."""
Progress = Callable[[int, int], None]
"""Gets the prompts done and the prompts in all."""


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

    @property
    def parts(self) -> tuple[Prompts, Prompts, Prompts]:
        """Views a, views b and candidates: all that is embedded."""
        return self.view_a, self.view_b, self.candidates


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


def validate_views(
    encoder: Encoder, validation: Validation, log: Progress | None = None
) -> tuple[dict[str, float], NDArray[np.float32]]:
    """An encoder -> its figures on the validation set, and its candidates' embeddings. `log` is called every few seconds."""
    parts, options = validation.parts, embedding_options(encoder, validation, 1, log)
    with evaluating(encoder):
        a_QE, b_QE, items_CE = (embed(encoder, part, **options) for part in parts)
    return view_figures(*map(torch.from_numpy, (a_QE, b_QE, items_CE, validation.target_Q))), items_CE


def validate_together(encoder: Encoder, validation: Validation, log: Progress | None = None) -> dict[str, float]:
    """An encoder -> its figures on the validation set, the same in all processes of torch.distributed.

    Each process embeds a share of the prompts, and the first one computes the figures. All processes must call this.
    """
    if not dist.is_initialized():
        return validate_views(encoder, validation, log)[0]
    options = embedding_options(encoder, validation, dist.get_world_size(), log)
    with evaluating(encoder):
        parts = [embed_together(encoder, part, **options) for part in validation.parts]

    def judged() -> bytes:
        a_QE, b_QE, items_CE = (torch.from_numpy(emb) for emb in parts if emb is not None)
        return json.dumps(view_figures(a_QE, b_QE, items_CE, torch.from_numpy(validation.target_Q))).encode()

    figures: dict[str, float] = json.loads(from_first(judged))
    return figures


@contextmanager
def evaluating(encoder: Encoder) -> Iterator[None]:
    """Evaluation mode and the base model's arithmetic; the mode from before comes back at the end."""
    was = encoder.training
    encoder.eval()
    try:
        with autocast_like_base(encoder):
            yield
    finally:
        encoder.train(was)


def embedding_options(encoder: Encoder, validation: Validation, processes: int, log: Progress | None) -> dict[str, Any]:
    """Options of `embed`, so that `log(done, total)` is called about every QUIET seconds, with this process's share."""
    if log is None:
        return {}
    total, done, told = sum(len(part.length_B) for part in validation.parts) // processes, 0, time.monotonic()

    def count(prompts: int, tokens: int) -> None:
        nonlocal done, told
        done += prompts
        if time.monotonic() - told >= QUIET:
            told = time.monotonic()
            log(min(done, total), total)

    return {"log": count, "budget": CPU_TOKENS if encoder.device.type == "cpu" else 0}


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
