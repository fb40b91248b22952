"""The moments of a catalogue's embeddings, taken anew as training goes: a loss on whitened embeddings sees what RAT will see.

A contrastive loss is lowered most easily by spreading items evenly, which whitening gives for nothing (METHOD §8). On whitened
embeddings that way is shut.

Shapes: R rows, E width, N items of the sample.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.processes import from_first
from models.text.embedding import embed_together
from models.text.encoder import Encoder
from models.text.prompts import Texts, prompts
from models.text.view_retrieval import evaluating

SAMPLE = 8192
"""Items that the moments are taken of, at most."""
RIDGE = 1e-2
"""Share of the mean variance that every direction's is raised by: weak ones would be noise."""


class Moments:
    """Mean and whitening map of a fixed sample of the catalogue."""

    def __init__(self, encoder: Encoder, texts: Texts, seed: int) -> None:
        self.encoder = encoder
        rows = np.sort(np.random.default_rng([seed, 8]).permutation(len(texts))[:SAMPLE])
        self.sample, _ = prompts(texts, rows, encoder.limit)
        self.mean_E = torch.zeros(encoder.spec.width, device=encoder.device)
        self.map_EE = torch.eye(encoder.spec.width, device=encoder.device)

    def take(self) -> None:
        """Embeds the sample with the weights of now; all processes must call this. Raises ValueError for what isn't finite."""
        with evaluating(self.encoder):
            emb_NE = embed_together(self.encoder, self.sample)

        def fitted() -> bytes:
            assert emb_NE is not None
            mean_E, map_EE = whitening(torch.from_numpy(emb_NE).to(self.encoder.device))
            return torch.cat([mean_E[None], map_EE]).cpu().numpy().tobytes()

        both = torch.frombuffer(bytearray(from_first(fitted)), dtype=torch.float32).view(-1, len(self.mean_E))
        self.mean_E, self.map_EE = both[0].to(self.encoder.device), both[1:].to(self.encoder.device)

    def whiten(self, emb_RE: Tensor) -> Tensor:
        """emb_RE -> white_RE, of the same width."""
        return (emb_RE - self.mean_E) @ self.map_EE

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"mean": self.mean_E, "map": self.map_EE}

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes a checkpoint's state up."""
        self.mean_E, self.map_EE = state["mean"].to(self.encoder.device), state["map"].to(self.encoder.device)


def whitening(emb_NE: Tensor) -> tuple[Tensor, Tensor]:
    """mean_E and the symmetric map_EE that makes every direction's variance one, but for the ridge.

    Raises ValueError for embeddings that are not finite.
    """
    if not bool(emb_NE.isfinite().all()):
        raise ValueError("the embeddings are not finite: lower learning_rate")
    mean_E = emb_NE.mean(0)
    centred_NE = (emb_NE - mean_E).double()
    value_E, vector_EE = torch.linalg.eigh(centred_NE.T @ centred_NE / len(emb_NE))
    scale_E = (value_E.clamp_min(0) + RIDGE * value_E.mean().clamp_min(1e-12)).rsqrt()
    return mean_E, ((vector_EE * scale_E) @ vector_EE.T).float()
