"""DELRec (arXiv 2406.11156): an LLM scores titles after a history of titles; soft tokens distil what a recommender knows.

The base stays frozen; only the soft tokens before the prompt learn, from the recommender's own pick and from what came next.
With no soft token a score is that of the plain prompt. The language head is the input embedding: other bases are refused.

Shapes: B users, M candidates of a user, S soft tokens, T tokens of a title, L tokens of a sequence, E width of the base, W words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from models.text.base_model import base_folder, default_dtype, is_causal

Log = Callable[[dict[str, float], int], None]


@dataclass(frozen=True, kw_only=True)
class Distilling:
    """How soft tokens are trained."""

    tokens: int = 100
    """Soft tokens before the prompt; 0 leaves the plain prompt."""
    steps: int = 200
    """Training steps of the soft tokens, a batch each."""
    batch: int = 4
    """Users of a step."""
    learning_rate: float = 3e-3
    """Learning rate of Adam."""
    temperature: float = 0.2
    """Temperature of the softmax over candidates' scores, which are mean log-probabilities of a token."""
    pick: float = 0.5
    """Share of the loss that is the recommender's own pick; the rest is what came next."""

    def __post_init__(self) -> None:
        if self.tokens < 0 or min(self.steps, self.batch) < 1 or self.temperature <= 0 or not 0 <= self.pick <= 1:
            raise ValueError("distilling: tokens at least 0, steps and batch at least 1, temperature above 0, pick in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A history and the candidates for what comes next."""

    history: tuple[str, ...]
    """Titles, newest last."""
    candidates: tuple[str, ...]
    """Titles in the recommender's order, its pick first."""
    target: int = -1
    """Place of what came next among them; -1 where it is not there."""


class Reranker(nn.Module):
    """A frozen base with soft tokens before its prompt."""

    def __init__(self, base: nn.Module, tokenizer: object, *, tokens: int, domain: str, seed: int = 0) -> None:
        super().__init__()
        if not getattr(base.config, "tie_word_embeddings", False):
            raise ValueError("this base has a language head of its own, which is not kept here: take one with tied embeddings")
        if not is_causal(base):
            raise ValueError("this base reads both ways, so it can't tell what comes next: take a decoder")
        self.base, self.tokenizer, self.domain = base.requires_grad_(False).eval(), tokenizer, domain
        self.words: Tensor = base.get_input_embeddings().weight  # type: ignore[operator]
        drawn_S = torch.randint(len(self.words), (tokens,), generator=torch.Generator().manual_seed(seed))
        self.soft_SE = nn.Parameter(self.words[drawn_S.to(self.words.device)].float().clone())

    def prompt(self, history: Sequence[str]) -> list[int]:
        """Tokens of a history."""
        return self.ids(f"{self.domain}\n" + "\n".join(history) + "\n")

    def ids(self, text: str) -> list[int]:
        """Tokens of a text without special ones."""
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        return found

    def title(self, text: str) -> list[int]:
        """Tokens of a title. Raises ValueError for a title of which the base knows nothing."""
        found, unknown = self.ids(text), getattr(self.tokenizer, "unk_token_id", None)
        if not found or all(token == unknown for token in found):
            raise ValueError(
                f"title {text!r} holds no token that the base knows: it is outside its vocabulary; take another base"
            )
        return found

    def forward(self, question: Question) -> Tensor:
        """score_M: the mean log-probability of a title's tokens after the prompt, of each candidate."""
        prompt, titles = self.prompt(question.history), [self.title(text) for text in question.candidates]
        longest = max(map(len, titles))
        token_ML = torch.tensor([prompt + title + [0] * (longest - len(title)) for title in titles], device=self.words.device)
        inside_MT = torch.tensor([[1] * len(title) + [0] * (longest - len(title)) for title in titles], device=token_ML.device)
        soft_MSE = self.soft_SE.to(self.words.dtype).expand(len(titles), -1, -1)
        read_MLE = torch.cat([soft_MSE, F.embedding(token_ML, self.words)], dim=1)
        # what is padded stands behind all that is asked for, and attention is causal
        hidden_MLE = self.base(inputs_embeds=read_MLE).last_hidden_state[:, -longest - 1 : -1]
        logp_MTW = (hidden_MLE @ self.words.T).float().log_softmax(-1)
        own_MT = logp_MTW.gather(2, token_ML[:, -longest:, None])[..., 0]
        score_M: Tensor = (own_MT * inside_MT).sum(1) / inside_MT.sum(1)
        return score_M


def load_reranker(name: str, config: Distilling, *, domain: str, device: torch.device, seed: int) -> Reranker:
    """A base by its folder, hub name or `embedded`, frozen, with fresh soft tokens."""
    disable_progress_bar()
    folder = base_folder(name)
    if getattr(AutoConfig.from_pretrained(folder), "is_encoder_decoder", False):
        raise ValueError(f"base model {name!r} is an encoder-decoder: take a decoder")
    base = AutoModel.from_pretrained(folder, dtype=default_dtype(device), use_safetensors=True).to(device)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Reranker(base, tokenizer, tokens=config.tokens, domain=domain, seed=seed).to(device)


def distil(model: Reranker, questions: Sequence[Question], config: Distilling, *, seed: int, log: Log = lambda *_: None) -> None:
    """Trains the soft tokens in place. Raises ValueError for no question with candidates, or a loss that is not finite."""
    if not config.tokens:
        return
    if not questions:
        raise ValueError("there is no question to learn from: no user has a validation event; move the split")
    optimizer = torch.optim.Adam([model.soft_SE], lr=config.learning_rate)
    generator = torch.Generator().manual_seed(seed)
    for step in range(config.steps):
        total = 0.0
        optimizer.zero_grad()
        for place in torch.randint(len(questions), (config.batch,), generator=generator).tolist():
            loss = step_loss(model, questions[place], config) / config.batch
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not total < float("inf"):
            raise ValueError(f"loss is {total} at step {step}: lower learning_rate")
        optimizer.step()
        log({"loss": total}, step)


def step_loss(model: Reranker, question: Question, config: Distilling) -> Tensor:
    """Cross-entropy to the recommender's pick and, where it is among the candidates, to what came next."""
    logp_M = (model(question) / config.temperature).log_softmax(0)
    loss: Tensor = -config.pick * logp_M[0]
    return loss if question.target < 0 else loss - (1 - config.pick) * logp_M[question.target]
