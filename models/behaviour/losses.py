"""Losses of recommendation and alignment; each returns one value a row, so that the caller weighs and averages.

Shapes: P positions with a label, M candidates, S negatives a position, N items, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def full_softmax(hidden_PD: Tensor, table_MD: Tensor, label_P: Tensor) -> Tensor:
    """loss_P over all candidates; label_P indexes table_MD."""
    return F.cross_entropy(hidden_PD @ table_MD.T, label_P, reduction="none")


def sampled_softmax(positive_P: Tensor, negative_PS: Tensor, candidates: int) -> Tensor:
    """loss_P of the positive's logit against uniform negatives, logQ-corrected.

    Each negative stands for (candidates - 1) / S items, which its logit is raised by; then the denominator estimates the full
    softmax's (Bengio and Senécal 2008; the positive is certain to be there, so it takes no correction). Negatives that
    are the label itself come as -inf.
    """
    correction = math.log(max(candidates - 1, 1) / negative_PS.shape[1])
    logits_PC = torch.cat([positive_P[:, None], negative_PS + correction], dim=1)
    return logits_PC.logsumexp(1) - positive_P


def bce(positive_P: Tensor, negative_PS: Tensor, candidates: int = 0) -> Tensor:
    """loss_P: binary cross-entropy of the positive and each negative (SASRec's own loss, with S = 1)."""
    return -F.logsigmoid(positive_P) - F.logsigmoid(-negative_PS).sum(1)


def gbce(positive_P: Tensor, negative_PS: Tensor, candidates: int, calibration: float = 0.75) -> Tensor:
    """loss_P: generalised binary cross-entropy, which undoes the overconfidence of sampling (gSASRec, arXiv 2308.07192, eq. 11).

    calibration t: 0 leaves `bce`, 1 makes probabilities fully calibrated.
    """
    rate = min(negative_PS.shape[1] / max(candidates - 1, 1), 1.0)
    beta = rate * (calibration * (1 - 1 / rate) + 1 / rate)
    return -beta * F.logsigmoid(positive_P) - F.logsigmoid(-negative_PS).sum(1)


def alignment(
    adapted_ND: Tensor, teacher_ND: Tensor, weight_N: Tensor, temperature: float, text_N: Tensor | None = None
) -> Tensor:
    """One number: symmetric cosine InfoNCE between an item's adapted text and its teacher vector, weighed by weight_N.

    Rows are unique items. Those of weight 0 (padding, cold items) neither give a loss nor serve as negatives, and items of one
    text, by text_N, are no negatives of each other: their adapted text is the same.
    """
    logits_NN = F.normalize(adapted_ND, dim=1) @ F.normalize(teacher_ND, dim=1).T / temperature
    absent_N = weight_N == 0
    # an absent row keeps itself, or its softmax would be over nothing
    hidden_NN = absent_N[:, None] | absent_N[None]
    if text_N is not None:
        hidden_NN = hidden_NN | (text_N[:, None] == text_N[None])
    hidden_NN = hidden_NN & ~torch.eye(len(weight_N), dtype=torch.bool, device=weight_N.device)
    logits_NN = logits_NN.masked_fill(hidden_NN, -torch.inf)
    own_N = logits_NN.diagonal()
    loss_N = (logits_NN.logsumexp(1) + logits_NN.logsumexp(0)) / 2 - own_N
    return (loss_N * weight_N).sum() / weight_N.sum().clamp_min(1e-12)


class Loss(NamedTuple):
    """A loss over sampled negatives."""

    of: Callable[[Tensor, Tensor, int], Tensor]
    """(positive_P, negative_PS, number of candidates) -> loss_P; a negative that is the label itself comes as -inf."""
    one_each: bool = False
    """Whether each position takes one negative of its own, whatever `negatives` and `negatives_per` say."""


LOSSES: Mapping[str, Loss] = {
    "sampled": Loss(sampled_softmax),
    "gbce": Loss(gbce),
    "bce": Loss(bce, one_each=True),
}
"""What `training.loss` may name beside `full`. A new loss is a function above and a name here, with its test; no other file."""
