"""What an encoder learns from beside views and pairs of items: a teacher's clusters and vectors, and users' titles.

Its heads are trained beside the encoder, and no artifact holds them.

Shapes: R rows (two views an item), B users, I items of the catalogue, E width, K clusters, D width of the teacher, W words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.processes import from_first
from models.text.base_model import output_embeddings
from models.text.embedding import embed_together
from models.text.encoder import Encoder
from models.text.moments import SAMPLE, whitening
from models.text.packing import Step, to_device
from models.text.prompts import Ints, Texts, prompts
from models.text.scft_batches import Pairs
from models.text.scft_settings import Scft
from models.text.users import DrawnUsers, Users
from models.text.view_retrieval import evaluating


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What else there is to learn from."""

    pairs: Pairs | None = None
    """Items that users took one after the other; pair_share needs them."""
    cluster_I: Ints | None = None
    """The number of each item's cluster, -1 where it has none; cluster_weight and user_weight need it."""
    teacher_ID: NDArray[np.float32] | None = None
    """A teacher's vector of each item, not a number where it has none; teacher_weight needs it."""
    users: Users | None = None
    """What users had; user_weight and title_weight need it."""

    def check(self, config: Scft) -> None:
        """Raises ValueError where something is missing that the settings need."""
        needs = {
            "pair_share": ("the items that users took one after the other", self.pairs),
            "cluster_weight": ("the teacher's clusters", self.cluster_I),
            "teacher_weight": ("the teacher's vectors", self.teacher_ID),
            "user_weight": ("users and the teacher's clusters", None if self.cluster_I is None else self.users),
            "title_weight": ("users and their titles", self.users),
        }
        for name, (what, given) in needs.items():
            if getattr(config, name) and given is None:
                raise ValueError(f"{name} needs {what}: none were given")


class Heads:
    """Maps from embeddings to what is to be told of items and users, and their losses."""

    def __init__(self, encoder: Encoder, config: Scft, signals: Signals) -> None:
        signals.check(config)
        self.config, self.signals, width = config, signals, encoder.spec.width
        self.words_WE = output_embeddings(encoder.model, encoder.spec.base) if config.title_weight else None
        if config.title_weight and not encoder.causal:
            raise ValueError('title_weight needs attention = "base": both ways, the LLM would see the title that it is to tell')
        if encoder.suffix_SE is not None and (config.user_weight or config.title_weight):
            raise ValueError("suffix tokens are learned from items: set user_weight and title_weight to 0, or suffix_tokens")
        shapes: dict[str, tuple[int, ...]] = {}
        clusters = 0 if signals.cluster_I is None else int(signals.cluster_I.max(initial=0)) + 1
        if config.cluster_weight:
            shapes |= {"cluster": (clusters, width), "cluster_bias": (clusters,)}
        if config.user_weight:
            shapes |= {"user": (clusters, width), "user_bias": (clusters,)}
        if config.teacher_weight:
            assert signals.teacher_ID is not None
            self.target_ID = directions(signals.teacher_ID)
            shapes |= {"teacher": (self.target_ID.shape[1], width), "teacher_bias": (self.target_ID.shape[1],)}
        self.learned = {name: torch.zeros(shape, device=encoder.device, requires_grad=True) for name, shape in shapes.items()}
        self.frozen: dict[str, Tensor] = {}
        """The base's whitening, through which vectors are told."""
        if config.teacher_weight:
            self.frozen = {"mean": torch.zeros(width, device=encoder.device), "map": torch.eye(width, device=encoder.device)}

    @property
    def shared_out(self) -> list[Tensor]:
        """Those of whose gradient each process has a part."""
        return [value for name, value in self.learned.items() if name.startswith("user")]

    @property
    def told_of_items(self) -> bool:
        """Whether anything is learned of items here."""
        return bool(self.config.cluster_weight or self.config.teacher_weight)

    def fit(self, encoder: Encoder, texts: Texts, items: Ints, seed: int) -> None:
        """The map to the teacher's vectors, in closed form, on the base's whitened embeddings; all processes must call this.

        Raises ValueError where no item has a vector, or embeddings are not finite.
        """
        if not self.config.teacher_weight:
            return
        known = items[np.isfinite(self.target_ID[items, 0])]
        if not len(known):
            raise ValueError("no item to train on has a vector of the teacher: run pretrain again, or set teacher_weight to 0")
        some = np.sort(np.random.default_rng([seed, 11]).permutation(known)[:SAMPLE])
        with evaluating(encoder):
            emb_NE = embed_together(encoder, prompts(texts, some, encoder.limit)[0])
        names = ("mean", "map", "teacher", "teacher_bias")
        whole = self.frozen | self.learned

        def fitted() -> bytes:
            assert emb_NE is not None
            found = ridge(torch.from_numpy(emb_NE), torch.from_numpy(self.target_ID[some]))
            return torch.cat([value.flatten() for value in found]).numpy().tobytes()

        flat = torch.frombuffer(bytearray(from_first(fitted)), dtype=torch.float32)
        with torch.no_grad():
            for name, part in zip(names, torch.split(flat, [whole[name].numel() for name in names]), strict=True):
                whole[name].copy_(part.view_as(whole[name]))

    def item_loss(self, all_RE: Tensor, item_R: Ints, scale: Tensor) -> Tensor:
        """All processes' rows and their items -> the loss over the teacher's clusters and vectors, weighed."""
        config, loss = self.config, all_RE.new_zeros(())
        if config.cluster_weight:
            assert self.signals.cluster_I is not None
            label_R = to_device(self.signals.cluster_I[item_R], all_RE.device)
            logits_RK = scale * F.linear(F.normalize(all_RE, dim=1), self.learned["cluster"], self.learned["cluster_bias"])
            told = F.cross_entropy(logits_RK, label_R, ignore_index=-1, reduction="sum")
            loss = loss + config.cluster_weight * told / (label_R >= 0).sum().clamp_min(1)
        if config.teacher_weight:
            target_RD = to_device(self.target_ID[item_R], all_RE.device)
            known_R = target_RD.isfinite().all(1)
            white_RE = (all_RE - self.frozen["mean"]) @ self.frozen["map"]
            found_RD = F.linear(white_RE, self.learned["teacher"], self.learned["teacher_bias"])
            apart_R = 1 - F.cosine_similarity(found_RD, target_RD.nan_to_num(), dim=1)
            loss = loss + config.teacher_weight * (apart_R * known_R).sum() / known_R.sum().clamp_min(1)
        return loss

    def user_loss(self, hidden_TE: Tensor, step: Step, users: DrawnUsers, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Some users' states -> their sums of both losses: over clusters (P2Rec), over the next title's tokens."""
        length_B = users.rows.length_B
        place_N = np.arange(length_B.sum()) - np.repeat(length_B.cumsum() - length_B, length_B)
        read_N = place_N < np.repeat(users.context_B, length_B)
        clusters = titles = hidden_TE.new_zeros((), dtype=torch.float32)
        if self.config.user_weight:
            context_NE = hidden_TE[step.own_N[to_device(np.flatnonzero(read_N), hidden_TE.device)]].float()
            context_B = to_device(users.context_B, hidden_TE.device)
            user_BE = F.normalize(torch.segment_reduce(context_NE, "mean", lengths=context_B, unsafe=True), dim=1)
            logits_BK = scale * F.linear(user_BE, self.learned["user"], self.learned["user_bias"])
            clusters = F.kl_div(logits_BK.log_softmax(1), to_device(users.share_BK, hidden_TE.device), reduction="sum")
        if self.words_WE is not None:
            told_M = step.own_N[to_device(np.flatnonzero(~read_N), hidden_TE.device)]
            # a token is told by the state of the one before it
            logits_MW = hidden_TE[told_M - 1].to(self.words_WE.dtype) @ self.words_WE.T
            titles = F.cross_entropy(logits_MW.float(), step.token_T[told_M], reduction="sum")
        return clusters, titles

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {name: value.detach() for name, value in (self.learned | self.frozen).items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Takes a checkpoint's state up."""
        with torch.no_grad():
            for name, value in (self.learned | self.frozen).items():
                value.copy_(state[name])


def directions(vector_ID: NDArray[np.float32]) -> NDArray[np.float32]:
    """A teacher's vectors, not a number where there is none -> their directions from the mean of all directions.

    What all items have in common is their popularity and no matter of texts.
    """
    known_I = np.isfinite(vector_ID).all(axis=1)
    if not known_I.any():
        return vector_ID
    unit_ID = vector_ID / np.maximum(np.linalg.norm(vector_ID, axis=1, keepdims=True), 1e-12)
    centred_ID = unit_ID - unit_ID[known_I].mean(axis=0)
    norm_I1 = np.maximum(np.linalg.norm(centred_ID, axis=1, keepdims=True), 1e-12)
    direction_ID: NDArray[np.float32] = (centred_ID / norm_I1).astype(np.float32)
    return direction_ID


def ridge(emb_NE: Tensor, target_ND: Tensor, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean_E and map_EE of the whitening, then weight_DE and bias_D of the linear map from white embeddings to the targets.

    Raises ValueError for embeddings that are not finite.
    """
    mean_E, map_EE = whitening(emb_NE)
    white_NE = ((emb_NE - mean_E) @ map_EE).double()
    bias_D = target_ND.double().mean(0)
    gram_EE = white_NE.T @ white_NE / len(white_NE)
    gram_EE += strength * gram_EE.diagonal().mean() * torch.eye(len(gram_EE))
    weight_ED = torch.linalg.solve(gram_EE, white_NE.T @ (target_ND.double() - bias_D) / len(white_NE))
    return mean_E, map_EE, weight_ED.T.float().contiguous(), bias_D.float()
