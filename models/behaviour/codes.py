"""Vectors as a few small integers: MoC's books, which all tell of the whole vector and share one decoder (arXiv 2410.09560).

The decoder reads the mean of the entries that the codes name. As published each book chooses apart: the entry nearest to a head
of its own. By default books choose jointly instead, each what the others leave over (additive quantisation, Babenko and
Lempitsky 2014): in turn a beam search finds the codes, and least squares find the entries that tell best of them. With a
linear decoder that minimises the same error without a gradient, and it keeps far more (BENCHMARKS.md). What the paper leaves
open is chosen here: linear heads and decoder, where training starts (residual k-means, or product quantisation of turned
directions).

Shapes: N items, D width, K books, C entries of a book, B items of a batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.behaviour.k_means import drawn, k_means, nearest
from models.behaviour.whitening import moments

CHUNK = 16_384
BEAM, WARM_BEAM = 8, 4
"""Ways of choosing that are followed from book to book, and while entries have noise."""
RIDGE = 1e-3
"""How strongly least squares holds entries to what they were, beside an entry's usual number of items."""
NOISE = 0.5
"""Noise on entries at first, beside the spread of the vectors that a book tells of."""
SETTLING, CALM = 16, 4
"""Rounds of choosing and least squares where books choose jointly, and how many of the last are without noise."""
Log = Callable[[dict[str, float], int], None]


@dataclass(frozen=True, kw_only=True)
class Codes:
    """How books are trained and read."""

    books: int = 4
    """Integers of an item."""
    entries: int = 256
    """Entries of a book: at 256 a code is a byte."""
    epochs: int = 30
    """Where books choose apart: times that training reads the sample."""
    batch: int = 1024
    """Where books choose apart: items of a step."""
    learning_rate: float = 1e-3
    """Where books choose apart: learning rate of Adam."""
    apart: bool = False
    """Each book chooses by a head of its own, as published; else all choose jointly, which keeps more and needs no gradient."""
    commitment: float = 0.25
    """Where books choose apart: how strongly heads are drawn to entries, beside entries to heads."""
    sample: int = 200_000
    """Items that books are trained on, at most."""

    def __post_init__(self) -> None:
        if min(self.books, self.epochs, self.batch, self.sample) < 1:
            raise ValueError("codes: books, epochs, batch and sample must be at least 1")
        if not 2 <= self.entries <= 65_536:
            raise ValueError(f"codes.entries is {self.entries}: a book has 2 to 65,536 entries")


class Books(nn.Module):
    """K books, the decoder that they share and, where books choose apart, a head for each."""

    mean_D: Tensor
    scale: Tensor

    def __init__(self, books: int, entries: int, width: int, *, heads: bool = False) -> None:
        super().__init__()
        self.head_KDD = nn.Parameter(torch.zeros(books, width, width)) if heads else None
        self.entry_KCD = nn.Parameter(torch.zeros(books, entries, width))
        self.decoder = nn.Linear(width, width)
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    def sized(self, emb_ND: Tensor) -> Tensor:
        """Vectors as the books see them: centred, of length one in the mean of squares."""
        return (emb_ND - self.mean_D) / self.scale

    def heads(self, emb_ND: Tensor) -> Tensor:
        """What each book looks at where books choose apart: z_KND."""
        assert self.head_KDD is not None
        return torch.einsum("nd,kde->kne", self.sized(emb_ND), self.head_KDD)

    @torch.no_grad()
    def decode(self, code_NK: Tensor) -> Tensor:
        """code_NK -> emb_ND as far as the codes tell."""
        book_K = torch.arange(len(self.entry_KCD), device=code_NK.device)
        means = (self.entry_KCD[book_K, some.long()].mean(1) for some in torch.split(code_NK, CHUNK))
        parts = [self.decoder(mean_ND) * self.scale + self.mean_D for mean_ND in means]
        return torch.cat(parts) if parts else self.mean_D.new_zeros(0, len(self.mean_D))

    @torch.no_grad()
    def encode(self, emb_ND: Tensor, beam: int = BEAM) -> Tensor:
        """code_NK int64; an item's codes depend on its own vector alone. Raises ValueError for another width or odd values."""
        if emb_ND.shape[1] != len(self.mean_D):
            raise ValueError(f"vectors are {emb_ND.shape[1]} wide, the books read {len(self.mean_D)}: they are of other vectors")
        if not bool(emb_ND.isfinite().all()):
            raise ValueError("a vector to be coded is not finite: make these vectors again")
        parts = [self.apart(some) if self.head_KDD is not None else self.jointly(some, beam)
                 for some in torch.split(emb_ND.float(), CHUNK)]  # fmt: skip
        return torch.cat(parts) if parts else torch.zeros(0, len(self.entry_KCD), dtype=torch.int64, device=emb_ND.device)

    def apart(self, emb_ND: Tensor) -> Tensor:
        """Each book takes the entry nearest to its head, whatever the others take."""
        return torch.stack([nearest(z_ND, c_CD) for z_ND, c_CD in zip(self.heads(emb_ND), self.entry_KCD, strict=True)], 1)

    def jointly(self, emb_ND: Tensor, beam: int) -> Tensor:
        """Book by book what the books before leave over; the `beam` best ways so far are followed, and the best one stays."""
        part_KCD = self.parts()
        left_NWD = (self.sized(emb_ND) - self.decoder.bias)[:, None]
        way_NWK = torch.zeros(len(emb_ND), 1, 0, dtype=torch.int64, device=emb_ND.device)
        for part_CD in part_KCD:
            entries = len(part_CD)
            error_NWC = left_NWD.square().sum(2, keepdim=True) + part_CD.square().sum(1) - 2 * left_NWD @ part_CD.T
            best_NW = error_NWC.flatten(1).topk(min(beam, error_NWC[0].numel()), largest=False).indices
            before_NW, code_NW = best_NW // entries, best_NW % entries
            way_NWK = torch.cat([taken(way_NWK, before_NW), code_NW[..., None]], 2)
            left_NWD = taken(left_NWD, before_NW) - part_CD[code_NW]
        best_N = left_NWD.square().sum(2).argmin(1)
        return taken(way_NWK, best_N[:, None])[:, 0]

    def parts(self) -> Tensor:
        """part_KCD: the decoder is linear, so what is read is a sum of one decoded entry a book, and the bias."""
        return self.entry_KCD @ self.decoder.weight.T / len(self.entry_KCD)


def taken(value_NWX: Tensor, place_NV: Tensor) -> Tensor:
    """value_NVX: of each item the named places."""
    return value_NWX.gather(1, place_NV[..., None].expand(-1, -1, value_NWX.shape[2]))


def fit_books(emb_ND: Tensor, config: Codes, *, seed: int, log: Log = lambda *_: None) -> Books:
    """Books of vectors. Raises ValueError for fewer different vectors than entries, or values that are not finite."""
    generator = torch.Generator().manual_seed(seed)
    some_N = torch.randperm(len(emb_ND), generator=generator)[: config.sample].to(emb_ND.device)
    emb_ND = emb_ND[some_N].float()
    different = different_up_to(emb_ND, config.entries)
    if different < config.entries:
        raise ValueError(f"{len(emb_ND):,} items have {different:,} different vectors, a book has {config.entries} entries: set "
                         "entries lower, or give more items, or a larger sample of them")  # fmt: skip
    books = started(emb_ND, config, generator)
    if config.apart:
        by_steps(books, emb_ND, config, generator, log)
    else:
        settle(books, emb_ND, generator, log)
    return books.eval().requires_grad_(False)


def different_up_to(emb_ND: Tensor, wanted: int) -> int:
    """How many different vectors there are; counting ends where they are enough: a large catalogue is not sorted whole."""
    found = emb_ND[:0]
    for some in torch.split(emb_ND, 4 * wanted):
        found = torch.unique(torch.cat([found, some]), dim=0)
        if len(found) >= wanted:
            break
    return len(found)


@torch.no_grad()
def settle(books: Books, emb_ND: Tensor, generator: torch.Generator, log: Log = lambda *_: None) -> None:
    """Codes given the entries, then entries given the codes, in turn; the decoder only adds.

    Codes are chosen with noise on the entries that fades away, so that they don't stay where they began (Martinez et al. 2018,
    "LSQ++", SR-D).
    """
    sized_ND, best_KCD = books.sized(emb_ND), books.parts()
    books.decoder.weight.copy_(len(best_KCD) * torch.eye(len(books.mean_D)))
    spread_D = NOISE * sized_ND.std(0) / len(best_KCD)
    for turn in range(SETTLING):
        heat = max(0.0, 1 - (turn + 1) / (SETTLING - CALM)) ** 0.5
        noise_KCD = torch.randn(best_KCD.shape, generator=generator).to(emb_ND.device)
        books.entry_KCD.copy_(best_KCD + heat * spread_D * noise_KCD)
        code_NK = books.encode(emb_ND, WARM_BEAM if heat else BEAM)
        books.entry_KCD.copy_(least_squares(sized_ND, code_NK, best_KCD))
        used_KC = torch.stack([torch.bincount(code_N, minlength=best_KCD.shape[1]) for code_N in code_NK.T])
        dead = revive(books, emb_ND, used_KC, generator) if heat else 0
        best_KCD = books.entry_KCD.clone()
        loss = (sized_ND - books.sized(books.decode(code_NK))).square().sum(1).mean()
        log({"loss": float(loss), "dead": float(dead)}, turn)


def least_squares(sized_ND: Tensor, code_NK: Tensor, part_KCD: Tensor) -> Tensor:
    """The part_KCD whose sums, by the codes, are nearest to the vectors; entries that no item took stay as they are."""
    books, entries, width = part_KCD.shape
    place_NK = code_NK + entries * torch.arange(books, device=code_NK.device)
    together = torch.zeros(books * entries, books * entries, device=sized_ND.device)
    for book in range(books):
        pair_NK = place_NK[:, book, None] * (books * entries) + place_NK
        together += torch.bincount(pair_NK.flatten(), minlength=(books * entries) ** 2).view_as(together)
    seen = torch.zeros(books * entries, width, device=sized_ND.device)
    for place_N in place_NK.T:
        seen.index_add_(0, place_N, sized_ND)
    hold = RIDGE * len(sized_ND) / entries
    solved: Tensor = torch.linalg.solve(together + hold * torch.eye(len(together), device=together.device),
                                        seen + hold * part_KCD.reshape(-1, width))  # fmt: skip
    return solved.view(books, entries, width)


def by_steps(books: Books, emb_ND: Tensor, config: Codes, generator: torch.Generator, log: Log) -> None:
    """Training as published, by the error's gradient; entries that no item took are moved to where they help."""
    optimizer = torch.optim.Adam(books.parameters(), lr=config.learning_rate)
    for epoch in range(config.epochs):
        order_N = torch.randperm(len(emb_ND), generator=generator).to(emb_ND.device)
        used_KC = torch.zeros(books.entry_KCD.shape[:2], device=emb_ND.device)
        total = 0.0
        for some in torch.split(order_N, config.batch):
            loss, code_KB = step_loss(books, emb_ND[some], config)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            used_KC.scatter_add_(1, code_KB, torch.ones_like(code_KB, dtype=used_KC.dtype))
            total += float(loss.detach()) * len(some)
        dead = revive(books, emb_ND, used_KC, generator) if epoch < config.epochs - 1 else 0
        log({"loss": total / len(emb_ND), "dead": float(dead)}, epoch)


def started(emb_ND: Tensor, config: Codes, generator: torch.Generator) -> Books:
    """Books before the first step: k-means of what the books before leave over, or of each head's own directions; a decoder that
    adds."""
    books = Books(config.books, config.entries, emb_ND.shape[1], heads=config.apart).to(emb_ND.device)
    mean_D, covariance_DD = moments(emb_ND)
    books.mean_D.copy_(mean_D)
    books.scale.copy_(covariance_DD.diagonal().sum().clamp_min(1e-30).sqrt())
    books.decoder.weight.data.copy_(config.books * torch.eye(emb_ND.shape[1]))
    books.decoder.bias.data.zero_()
    if books.head_KDD is not None:
        books.head_KDD.data.copy_(dealt(covariance_DD, config.books))
        seen_KND = books.heads(emb_ND).detach()
        books.entry_KCD.data.copy_(torch.stack([k_means(z_ND, config.entries, generator) for z_ND in seen_KND]))
        return books
    left_ND = books.sized(emb_ND)
    for entry_CD in books.entry_KCD.data:
        entry_CD.copy_(k_means(left_ND, config.entries, generator))
        left_ND = left_ND - entry_CD[nearest(left_ND, entry_CD)]
    return books


def dealt(covariance_DD: Tensor, books: int) -> Tensor:
    """head_KDD: projections on shares of the principal directions, dealt out there and back: each book has as much to tell."""
    _, direction_DD = torch.linalg.eigh(covariance_DD)
    strong_DD = direction_DD.flip(1).float()
    place_D = torch.arange(len(strong_DD), device=strong_DD.device) % (2 * books)
    shares = (strong_DD[:, (place_D == book) | (place_D == 2 * books - 1 - book)] for book in range(books))
    return torch.stack([basis_DH @ basis_DH.T for basis_DH in shares])


def step_loss(books: Books, emb_BD: Tensor, config: Codes) -> tuple[Tensor, Tensor]:
    """The squared error of what is read, and entries drawn to heads and heads to entries; code_KB.

    The error's gradient reaches entries and decoder, and passes through to the heads.
    """
    code_KB = books.encode(emb_BD).T
    entry_KBD = torch.stack([c_CD[code_B] for c_CD, code_B in zip(books.entry_KCD, code_KB, strict=True)])
    z_KBD = books.heads(emb_BD)
    read_BD = books.decoder((entry_KBD + z_KBD - z_KBD.detach()).mean(0))
    loss = (books.sized(emb_BD) - read_BD).square().sum(1).mean()
    apart_KB = (z_KBD.detach() - entry_KBD).square().sum(2) + config.commitment * (z_KBD - entry_KBD.detach()).square().sum(2)
    return loss + apart_KB.sum(0).mean(), code_KB


@torch.no_grad()
def revive(books: Books, emb_ND: Tensor, used_KC: Tensor, generator: torch.Generator) -> int:
    """Puts entries that no item took in an epoch where items are worst described; how many there were."""
    dead_KC = used_KC == 0
    if not bool(dead_KC.any()):
        return 0
    some_ND = emb_ND[drawn(len(emb_ND), 4096, generator)[:4096].to(emb_ND.device)]
    code_NK = books.encode(some_ND)
    missing_ND = books.sized(some_ND) - books.sized(books.decode(code_NK))
    worst_N = missing_ND.square().sum(1).argsort(descending=True)
    # as much more of an entry as makes the decoder read what is missing
    more_ND = len(used_KC) * missing_ND @ torch.linalg.pinv(books.decoder.weight.T)
    for book in range(len(used_KC)):
        dead_C = dead_KC[book].nonzero().flatten()
        item_C = worst_N[torch.arange(len(dead_C), device=worst_N.device) % len(worst_N)]
        here = books.heads(some_ND)[book] if books.head_KDD is not None else books.entry_KCD[book, code_NK[:, book]] + more_ND
        books.entry_KCD[book, dead_C] = here[item_C]
    return int(dead_KC.sum())


def save_books(folder: Path, books: Books, known: Mapping[str, Any]) -> None:
    """Writes books and what is known of them, as JSON, into a folder: what `load_books` reads."""
    save_file({name: value.cpu().contiguous() for name, value in books.state_dict().items()}, folder / "books.safetensors")
    sizes = dict(zip(("books", "entries", "width"), books.entry_KCD.shape, strict=True))
    (folder / "books.json").write_text(json.dumps({**known, **sizes}, indent=1, sort_keys=True))


def load_books(folder: Path) -> tuple[Books, dict[str, Any]]:
    """Frozen books of an artifact, on the CPU, and what its books.json tells of them (`source`, `entries`, …)."""
    known: dict[str, Any] = json.loads((folder / "books.json").read_text())
    books = Books(known["books"], known["entries"], known["width"], heads=known["training"]["apart"])
    books.load_state_dict(load_file(folder / "books.safetensors"))
    return books.eval().requires_grad_(False), known
