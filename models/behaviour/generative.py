"""TTDS / ED² (arXiv 2409.09253): users and items as semantic tokens, and a causal model that writes the next item's tokens.

Items' tokens are their codes (`codes.py`) and a number that tells items of the same codes apart; users' tokens are codes of their
own books. A beam search walks the tree of all items' tokens, so that whatever comes out is an item. Code embeddings are drawn to
the items' text by InfoNCE. Books are frozen here: an index that moved under the model would be another language.

Shapes: N items, U users, T tokens of an item, B rows, L positions, H items of a history, W beams, K books, P paths of a depth,
M nodes, X words of the vocabulary, D width, E text width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.behaviour.sasrec import Block, attention_mask

Log = Callable[[dict[str, float], int], None]


@dataclass(frozen=True, kw_only=True)
class Generative:
    """The model that writes tokens, and its training."""

    width: int = 128
    """Width of its hidden states."""
    layers: int = 4
    """Transformer layers."""
    heads: int = 4
    """Attention heads."""
    dropout: float = 0.2
    """Share of hidden values that is set to zero in a training step."""
    history: int = 10
    """Newest items that are read."""
    steps: int = 4000
    """Training steps, a batch each."""
    batch: int = 128
    """Users of a step."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW."""
    text: float = 0.1
    """Share of the InfoNCE between code embeddings and texts in the loss."""
    temperature: float = 0.1
    """Temperature of that InfoNCE."""
    beams: int = 20
    """Unfinished items that the search keeps at each token."""

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.heads, self.history, self.steps, self.batch, self.beams) < 1:
            raise ValueError("generative: width, layers, heads, history, steps, batch and beams must be at least 1")
        if self.text < 0 or self.temperature <= 0:
            raise ValueError("generative: text must be at least 0, temperature above 0")


class Tree:
    """All items' tokens as a prefix tree: after any prefix of an item, the tokens that lead on to items."""

    def __init__(self, token_NT: Tensor) -> None:
        """Raises ValueError where two items have the same tokens."""
        self.tokens = token_NT.shape[1]
        self.prefix: list[Tensor] = [torch.zeros(len(token_NT), dtype=torch.int64, device=token_NT.device)]
        self.edges: list[tuple[Tensor, Tensor]] = []
        """By depth: sorted keys node * words + token, and the node that each leads to."""
        self.words = int(token_NT.max()) + 1
        for place in range(self.tokens):
            key_N = self.prefix[-1] * self.words + token_NT[:, place]
            key_P, node_N = torch.unique(key_N, return_inverse=True)
            self.edges.append((key_P, torch.arange(len(key_P), device=key_P.device)))
            self.prefix.append(node_N)
        if len(self.edges[-1][0]) < len(token_NT):
            raise ValueError(
                f"{len(token_NT) - len(self.edges[-1][0])} items share all their tokens with another: number them apart"
            )
        self.item_P = torch.empty_like(self.prefix[-1]).index_copy_(
            0, self.prefix[-1], torch.arange(1, len(token_NT) + 1).to(token_NT)
        )
        """Index of the item at each leaf."""

    def allowed(self, depth: int, node_M: Tensor) -> tuple[Tensor, Tensor]:
        """allowed_MX, and next_MX: the node that a token leads to from each node, -1 where it leads to no item."""
        wanted_MX = node_M[:, None] * self.words + torch.arange(self.words, device=node_M.device)
        key_P, node_P = self.edges[depth]
        place_MX = torch.searchsorted(key_P, wanted_MX).clamp_max(len(key_P) - 1)
        found_MX = key_P[place_MX] == wanted_MX
        return found_MX, torch.where(found_MX, node_P[place_MX], -1)


class Writer(nn.Module):
    """A causal Transformer over tokens; scores are dot products with the same token embeddings.

    Places count from the left, so that a token stands in its item's place whether the item was read or is being written.
    """

    def __init__(self, words: int, config: Generative, longest: int, text: int = 0) -> None:
        super().__init__()
        self.words = nn.Embedding(words + 1, config.width)
        nn.init.normal_(self.words.weight, std=0.02)
        self.position = nn.Parameter(torch.randn(longest, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.to_text = nn.Linear(config.width, text) if text else None

    def forward(self, token_BL: Tensor) -> Tensor:
        """token_BL, the last word standing for padding on the left -> logit_BLX of the token after each position."""
        padding = self.words.num_embeddings - 1
        x_BLD = self.words(token_BL) + self.position[: token_BL.shape[1]]
        mask_B1LL = attention_mask(token_BL != padding, causal=True)
        for block in self.blocks:
            x_BLD = block(x_BLD, mask_B1LL)
        logit_BLX: Tensor = self.norm(x_BLD) @ self.words.weight[:padding].T
        return logit_BLX

    def text_loss(self, token_BT: Tensor, text_BE: Tensor, temperature: float) -> Tensor:
        """InfoNCE of items' mean code embeddings, mapped to text, and their texts; items of the same tokens are no negatives."""
        assert self.to_text is not None
        coded_BE = F.normalize(self.to_text(self.words(token_BT).mean(1)), dim=1)
        logit_BB = coded_BE @ F.normalize(text_BE, dim=1).T / temperature
        twins_BB = (token_BT[:, None] == token_BT[None]).all(2) & ~torch.eye(
            len(token_BT), dtype=torch.bool, device=token_BT.device
        )
        return F.cross_entropy(logit_BB.masked_fill(twins_BB, -torch.inf), torch.arange(len(token_BT), device=logit_BB.device))


def vocabulary(code_NK: Tensor, number_N: Tensor, entries: int) -> tuple[Tensor, int]:
    """token_NT of items (a word of its own for each book's entry, then the number) and how many words that takes."""
    books = code_NK.shape[1]
    place_NK = code_NK + entries * torch.arange(books, device=code_NK.device)
    token_NT = torch.cat([place_NK, books * entries + number_N[:, None]], dim=1)
    return token_NT, books * entries + int(number_N.max()) + 1


def written(history_BH: Tensor, user_BK: Tensor, token_NT: Tensor, padding: int) -> Tensor:
    """token_BL of a prompt: the user's tokens, then those of each item of the history (0 is none), padded on the left."""
    row_BHT = F.pad(token_NT, (0, 0, 1, 0), value=padding)[history_BH]
    # users' tokens stand right before the first item: what is left of them is padding
    both_BL = torch.cat([user_BK, row_BHT.flatten(1)], dim=1)
    empty_B = (history_BH == 0).sum(1) * token_NT.shape[1]
    place_BL = torch.arange(both_BL.shape[1], device=both_BL.device)[None] - empty_B[:, None]
    moved_BL = both_BL.gather(1, place_BL.clamp_min(0))
    moved_BL = torch.where((place_BL >= 0) & (place_BL < user_BK.shape[1]), moved_BL, both_BL)
    return torch.where(place_BL < 0, padding, moved_BL)


def train_writer(
    model: Writer, history_UH: Tensor, user_UK: Tensor, token_NT: Tensor, text_NE: Tensor | None, config: Generative, *,
    seed: int, log: Log = lambda *_: None,
) -> None:  # fmt: skip
    """Trains in place: each token of an item from all before it. history_UH holds one item more than a prompt does.

    Raises ValueError where no history has two items, or the loss is not finite.
    """
    rows_R = ((history_UH != 0).sum(1) >= 2).nonzero().flatten()
    if not len(rows_R):
        raise ValueError("no user has two train events: nothing to train on; extract a longer history or move the split")
    optimizer, padding = torch.optim.AdamW(model.parameters(), lr=config.learning_rate), model.words.num_embeddings - 1
    items = int(token_NT.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model.train()
    for step in range(config.steps):
        some_B = rows_R[torch.randint(len(rows_R), (config.batch,), generator=generator).to(rows_R.device)]
        token_BL = written(history_UH[some_B], user_UK[some_B], token_NT, padding)
        logit_BLX = model(token_BL[:, :-1])
        label_BL = token_BL[:, 1:].masked_fill(token_BL[:, :-1] == padding, -100)
        # users' tokens are given, not foretold
        label_BL = label_BL.masked_fill(label_BL >= items, -100)
        loss = F.cross_entropy(logit_BLX.flatten(0, 1), label_BL.flatten(), ignore_index=-100)
        if text_NE is not None and config.text:
            item_B = history_UH[some_B, -1] - 1
            loss = loss + config.text * model.text_loss(token_NT[item_B], text_NE[item_B], config.temperature)
        if not bool(loss.isfinite()):
            raise ValueError(f"loss is {float(loss)} at step {step}: lower learning_rate")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        log({"loss": float(loss.detach())}, step)
    model.eval()


@torch.no_grad()
def beam_search(model: Writer, prompt_BL: Tensor, tree: Tree, beams: int) -> tuple[Tensor, Tensor]:
    """item_BW and score_BW (log-probabilities), best first; every beam is an item, 0 and -inf where there are fewer items."""
    rows = len(prompt_BL)
    score_BW = torch.zeros(rows, 1, device=prompt_BL.device)
    node_BW = torch.zeros(rows, 1, dtype=torch.int64, device=prompt_BL.device)
    token_BWL = prompt_BL[:, None]
    for depth in range(tree.tokens):
        flat_ML = token_BWL.flatten(0, 1)
        logp_MX = model(flat_ML)[:, -1, : tree.words].float().log_softmax(1)
        allowed_MX, next_MX = tree.allowed(depth, node_BW.flatten())
        total_BX = (score_BW[..., None] + logp_MX.masked_fill(~allowed_MX, -torch.inf).view(rows, -1, tree.words)).flatten(1)
        score_BW, place_BW = total_BX.topk(min(beams, total_BX.shape[1]))
        from_BW, token_BW = place_BW // tree.words, place_BW % tree.words
        node_BW = next_MX.view(rows, -1).gather(1, place_BW).clamp_min(0)
        kept_BWL = token_BWL.gather(1, from_BW[..., None].expand(-1, -1, token_BWL.shape[2]))
        token_BWL = torch.cat([kept_BWL, token_BW[..., None]], dim=2)
    return torch.where(score_BW.isfinite(), tree.item_P[node_BW], 0), score_BW
