"""`item_codes`, `sequences`, a recommender -> a report: what a model that writes the next item's tokens achieves, offline (TTDS).

Items' tokens are their published codes, users' those of books of their own. Test events are asked once, beside the recommender
that made the vectors. Nothing that serves changes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from jobs.engines import registry
from jobs.generate.config import Config as Config
from jobs.generate.config import Result as Result
from jobs.generate.tokens import Tokens, drift, read_tokens
from jobs.lake import artifacts
from jobs.lake.tensors import pick_device, read_catalogue, read_embeddings, read_histories
from models.behaviour.artifact import Loaded, load_recommender
from models.behaviour.codes import Books, fit_books
from models.behaviour.data import Histories, window
from models.behaviour.generative import Tree, Writer, beam_search, train_writer, vocabulary, written
from models.judge.bootstrap import bootstrap, estimate
from models.judge.evaluation import Encode
from models.judge.rerank import Lists, make_lists, placed

log = logging.getLogger(__name__)
USERS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Read:
    """What the lake tells."""

    recommender: Loaded
    recommender_id: str
    events: Histories
    table_VD: Tensor
    known: Tokens
    drift: float
    token_NT: Tensor
    words: int
    inputs: dict[str, str]


def run(config: Config) -> Result:
    """Trains and asks the writer. Raises InputError or ValueError for items without codes, too few users, no event to test on."""
    began, read = time.monotonic(), read_all(config)
    recommender, events, words = read.recommender, read.events, (read.token_NT, read.words)
    ndcg, item_CW, writer = beside(config, events, read.table_VD, recommender.encode, recommender.backbone.max_len, words)
    every_1C = torch.ones(1, len(item_CW), dtype=torch.bool)
    less = estimate(bootstrap(torch.stack(list(ndcg.values()), 1), every_1C, seed=config.run.seed), 0, 0, minus=1)
    result = Result(
        recommender_id=read.recommender_id, books_id=read.known.books_id, users=len(item_CW),
        words=writer.words.num_embeddings - 1, ndcg={name: round(float(value_C.mean()), 5) for name, value_C in ndcg.items()},
        difference=less.interval(),
        items_share=items_share(item_CW, len(read.token_NT)), drift=read.drift,
        seconds=round(time.monotonic() - began, 1), device=str(read.token_NT.device), inputs=read.inputs, outputs={}, rows={},
    )  # fmt: skip
    told = "  ".join(f"{name} {value:.4f}" for name, value in result.ndcg.items())
    log.info("NDCG@10 of %d users: %s; index drift %.4f", result.users, told, result.drift)
    return result


def beside(
    config: Config, events: Histories, table_VD: Tensor, encode: Encode, max_len: int, item_tokens: tuple[Tensor, int]
) -> tuple[dict[str, Tensor], Tensor, Writer]:
    """NDCG@10 of each test case, generated and by a recommender of these vectors; item_CW, best first; and the trained writer."""
    token_NT, _ = item_tokens
    lists = make_lists(events, "test", table_VD, encode, max_len,
                       top=config.training.beams, most=config.users, unseen=config.run.exclude_seen)  # fmt: skip
    everybody_U = torch.arange(len(events.train_end_U), device=token_NT.device)
    user_UD = users(encode, table_VD, window(events, everybody_U, events.train_end_U, max_len))
    books = fit_books(user_UD[events.train_end_U > 0], config.user_codes, seed=config.run.seed)
    writer = taught(config, events, books, user_UD, item_tokens, table_VD)
    history_CL = lists.history_CL.to(token_NT.device)
    prompt_CL = prompts(config, writer, history_CL, users(encode, table_VD, history_CL), books, item_tokens)
    item_CW = generated(writer, prompt_CL, Tree(token_NT), config.training.beams).cpu()
    ndcg = {"generated": beams_ndcg(item_CW, lists), "recommender": placed(lists.score_CM.double(), lists.place_C)}
    return ndcg, item_CW, writer


def read_all(config: Config) -> Read:
    """Reads the lake. Raises InputError for what is not there."""
    device = pick_device(config.run)
    chosen = registry.resolve(config.run, config.recommender)
    encoder_id, recommender_id = str(chosen["encoder_id"]), str(chosen["recommender_id"])
    recommender = load_recommender(artifacts.find(config.run.lake, "recommender", recommender_id), device)
    catalogue = read_catalogue(config.run)
    events, digest = read_histories(config.run, catalogue.item_ids)
    known = read_tokens(config, catalogue, encoder_id, recommender_id)
    llm_NE = read_embeddings(config.run, encoder_id, catalogue.content_hashes)
    emb_ND = recommender.project(llm_NE, catalogue.item_ids)
    token_NT, words = vocabulary(known.code_NK.to(device), known.number_N.to(device), known.entries)
    return Read(
        recommender=recommender, recommender_id=recommender_id, events=events.to(device), known=known, words=words,
        table_VD=torch.nn.functional.pad(emb_ND, (0, 0, 1, 0)), token_NT=token_NT,
        drift=drift(known, emb_ND if known.of_vectors else llm_NE.float().to(device)),
        inputs={"items": catalogue.digest, "sequences": digest, "recommender": recommender_id, "books": known.books_id},
    )  # fmt: skip


@torch.no_grad()
def users(encode: Encode, table_VD: Tensor, history_UL: Tensor) -> Tensor:
    """user_UD after histories."""
    return torch.cat([encode(table_VD[some], some != 0).float() for some in torch.split(history_UL, 1024)])


def taught(
    config: Config, events: Histories, books: Books, user_UD: Tensor, item_tokens: tuple[Tensor, int], table_VD: Tensor
) -> Writer:
    """A writer trained on train events; code embeddings are drawn to the items' vectors."""
    token_NT, words = item_tokens
    all_words = words + books.entry_KCD.shape[0] * books.entry_KCD.shape[1]
    longest = books.entry_KCD.shape[0] + (config.training.history + 1) * token_NT.shape[1]
    torch.manual_seed(config.run.seed)
    writer = Writer(all_words, config.training, longest, table_VD.shape[1] if config.training.text else 0).to(token_NT.device)
    users_U = torch.arange(len(events.train_end_U), device=token_NT.device)
    history_UH = window(events, users_U, events.train_end_U, config.training.history + 1)

    def log_step(figures: dict[str, float], step: int) -> None:
        if step % 200 == 0:
            log.info("step %d  loss %.4f", step, figures["loss"])

    train_writer(writer, history_UH, user_words(books, user_UD, words), token_NT, table_VD[1:], config.training,
                 seed=config.run.seed, log=log_step)  # fmt: skip
    return writer


def user_words(books: Books, user_UD: Tensor, words: int) -> Tensor:
    """user_UK: users' codes as words behind those of items."""
    books_K = torch.arange(books.entry_KCD.shape[0], device=user_UD.device)
    return words + books.encode(user_UD) + books.entry_KCD.shape[1] * books_K


def prompts(
    config: Config, writer: Writer, history_CL: Tensor, user_CD: Tensor, books: Books, item_tokens: tuple[Tensor, int]
) -> Tensor:
    """prompt_CL of histories."""
    token_NT, words = item_tokens
    newest_CH = torch.nn.functional.pad(history_CL, (config.training.history, 0))[:, -config.training.history :]
    return written(newest_CH, user_words(books, user_CD, words), token_NT, writer.words.num_embeddings - 1)


def generated(writer: Writer, prompt_CL: Tensor, tree: Tree, beams: int) -> Tensor:
    """item_CW, best first."""
    return torch.cat([beam_search(writer, some, tree, beams)[0] for some in torch.split(prompt_CL, USERS_AT_ONCE)])


def items_share(item_CW: Tensor, items: int) -> float:
    """Share of the beams that are items, each another; there are no more beams than items."""
    sorted_CW = item_CW.sort(1).values
    different_C = (sorted_CW[:, :1] > 0).sum(1) + ((sorted_CW[:, 1:] > 0) & sorted_CW.diff(dim=1).bool()).sum(1)
    return round(float(different_C.double().mean()) / min(items, item_CW.shape[1]), 5)


def beams_ndcg(item_CW: Tensor, lists: Lists) -> Tensor:
    """NDCG@10 of each case's beams, without what the recommender's lists leave out."""
    own_CW = item_CW == lists.target_C[:, None]
    left_CW = (item_CW > 0) & ~(item_CW[:, :, None] == lists.out_CH[:, None]).any(2)
    ahead_C = (left_CW & (own_CW.int().cumsum(1) == 0)).sum(1)
    return torch.where(own_CW.any(1) & (ahead_C < 10), 1 / (ahead_C + 2).double().log2(), 0.0)
