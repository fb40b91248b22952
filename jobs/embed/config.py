"""Which texts `embed` takes, by which encoder, and in which portions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jobs.lake.arrivals import ARRIVING_ITEMS
from jobs.lake.tables import ITEMS, Table
from jobs.run import InputError, Run


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which texts are embedded, by which encoder, and in which portions."""

    run: Run
    encoder: str = "champion"
    """`champion` (the one that serves), `latest` (of the newest `scft` run), `opponent` (of the recommender that `evaluate` will
    measure the newest one against) or `reference` (of the fixed reference; both do nothing where there is none yet), or an
    encoder's id."""
    arriving: bool = False
    """Embeds what arrived since the snapshot of ds (`extract.arriving`), beside the embeddings of the nights."""
    shards: int = 1
    """Tasks that share the catalogue, by content hash."""
    shard: int = 0
    """This process's share of the texts, from 0 to `shards` - 1."""
    part_items: int = 50_000
    """Texts of a part: what a kill can cost, and what memory holds."""
    token_budget: int = 0
    """Tokens of a step; 0 suits the device. It halves where memory is short."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the stored values."""
    compile: bool = False
    """Compiles the model's layers: worth half a minute's start from some 50,000 texts on, on a GPU."""
    fp8: bool = False
    """8-bit linear layers (Hopper and later), which must first pass the gate against bf16 below."""
    fp8_cosine: float = 0.99
    """Smallest mean cosine between an 8-bit embedding and its bf16 one, on a sample."""
    fp8_overlap: float = 0.8
    """Smallest share of a text's 10 nearest neighbours in bf16 that stay so in 8 bits, on a sample."""
    gpu_hour_price: float = 2.5
    """What an hour of the device costs, for the cost per million items."""

    def __post_init__(self) -> None:
        if not 0 <= self.shard < self.shards:
            raise InputError(f"embed.shard {self.shard} must lie in [0, {self.shards}): shards are counted from 0")
        if self.part_items < 1 or self.token_budget < 0:
            raise InputError("embed.part_items must be at least 1 and embed.token_budget at least 0")

    @property
    def items(self) -> Table:
        """Where the texts are."""
        return ARRIVING_ITEMS if self.arriving else ITEMS

    @property
    def manifest(self) -> str:
        """A shard's manifest stands beside the others, and the opponent's beside the challenger's: all are of one date."""
        name = f"embed-{self.encoder}" if self.encoder in ("opponent", "reference") else "embed"
        name = f"arriving-{name}" if self.arriving else name
        return name if self.shards == 1 else f"{name}-{self.shard:05d}-of-{self.shards:05d}"
