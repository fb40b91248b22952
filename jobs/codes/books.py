"""The vectors that are coded, and the books: found in the lake, or made and kept as an artifact `models/books/ID`."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import Tensor

from jobs.codes.config import Config
from jobs.engines import registry
from jobs.lake import artifacts, manifests, partitions
from jobs.lake.tables import space_of
from jobs.lake.tensors import embeddings_digest
from jobs.run import InputError, as_json
from models.behaviour.codes import Books, fit_books, load_books, save_books

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The vectors to be coded."""

    table: str
    name: str
    """`space ID` or `encoder ID`: what books are of."""
    space_id: str
    encoder_id: str
    digest: str


@dataclass(frozen=True, kw_only=True)
class Version:
    """Books of the lake."""

    books_id: str
    source: str
    model: Books


def find_source(config: Config) -> Source:
    """The space or encoder that the recipe asks for. Raises InputError where it is not in the lake."""
    chosen = registry.resolve(config.run, config.recommender)
    encoder_id = str(chosen["encoder_id"])
    space_id = space_of(encoder_id, str(chosen["recommender_id"]))
    if config.source == "llm_embeddings":
        name, digest = f"encoder {encoder_id}", embeddings_digest(config.run, encoder_id)
    else:
        name = f"space {space_id}"
        digest = partitions.read_commit(config.run.lake, config.source, f"space={space_id}/ds={config.run.ds}").digest
    return Source(table=config.source, name=name, space_id=space_id, encoder_id=encoder_id, digest=digest)


def published(config: Config) -> Version | None:
    """The books that new items are coded by; None before the first. Raises InputError for an id that is not in the lake."""
    books_id = config.books
    if books_id == "latest":
        try:
            books_id = str(manifests.latest(config.run, "codes")["books_id"])
        except InputError:
            return None
    return load(config, books_id)


def load(config: Config, books_id: str) -> Version:
    """Books by their id."""
    model, known = load_books(artifacts.find(config.run.lake, "books", books_id))
    return Version(books_id=books_id, source=known["source"], model=model)


def fitted(config: Config, sample_ND: Tensor) -> Books:
    """New books of a sample of the vectors, told by epoch."""

    def log_epoch(figures: dict[str, float], epoch: int) -> None:
        if epoch % 10 == 0:
            log.info("pass %d  loss %.4f  dead entries %d", epoch, figures["loss"], figures["dead"])

    return fit_books(sample_ND, config.training, seed=config.run.seed, log=log_epoch)


def keep(config: Config, source: Source, model: Books) -> Version:
    """Keeps new books; equal books are kept once."""
    staged = artifacts.stage(config.run.lake, "books")
    known = {"source": source.name, "training": as_json(config.training), "seed": config.run.seed}
    save_books(staged, model, known)
    return load(config, artifacts.keep(config.run.lake, "books", staged))
