"""`item_embeddings` of a space, or `llm_embeddings` -> `item_codes` and their books (MoC), published beside the vectors.

Append-only: an item whose text stays keeps its codes bit by bit; new items and changed texts are coded by the published books.
New books, and with them other codes for every item, come by `refit` alone, with a report.
"""

from __future__ import annotations

import logging
import time

import pyarrow as pa

from jobs.codes import books, coding, figures
from jobs.codes.config import Config as Config
from jobs.codes.config import Result as Result
from jobs.lake import partitions
from jobs.lake.tables import ITEM_CODES
from jobs.lake.tensors import pick_device
from jobs.run import InputError

log = logging.getLogger(__name__)


def run(config: Config) -> Result:
    """Replaces partition `books=ID/ds=DATE` of `item_codes`, and brings it online where asked for.

    Raises InputError for vectors that are missing, books of another encoder or space, or fewer different vectors than entries.
    """
    began, device = time.monotonic(), pick_device(config.run)
    source = books.find_source(config)
    before = books.published(config)
    fresh = before is None or config.refit
    if before is not None and not fresh and before.source != source.name:
        raise InputError(f"books {before.books_id} are of {before.source}, these vectors of {source.name}: vectors of two spaces "
                         "can't be compared; make new books with --set codes.refit=true")  # fmt: skip
    sample_ND = coding.sample(config, source).to(device)
    used = before if before is not None and not fresh else books.keep(config, source, books.fitted(config, sample_ND))
    model = used.model.to(device)
    fitted_s = time.monotonic() - began
    rows, counts = coding.coded(config, source, used, model)
    commit = partitions.write(config.run.lake, ITEM_CODES, f"books={used.books_id}/ds={config.run.ds}", [rows])
    coded_s = time.monotonic() - began - fitted_s
    moved_from = before.books_id if before is not None and before.books_id != used.books_id else ""
    other = coding.codes_of(config.run, moved_from) if moved_from else None
    report = figures.report(config, rows, model, sample_ND, other, fresh=fresh)
    online = published(config, rows, used.books_id, source) if config.publish else 0
    result = Result(
        books_id=used.books_id, source=source.name, refit=fresh, books=model.entry_KCD.shape[0],
        entries=model.entry_KCD.shape[1], new=counts["new"], changed=counts["changed"], kept=counts["kept"], report=report,
        published=online, fit_seconds=round(fitted_s, 3), code_seconds=round(coded_s, 3), device=str(device),
        inputs={source.table: source.digest, "books": used.books_id},
        outputs={"item_codes": commit.digest, "books": used.books_id}, rows={"item_codes": commit.rows},
    )  # fmt: skip
    log.info("%s", "\n".join(figures.in_words(result)))
    return result


def published(config: Config, rows: pa.Table, books_id: str, source: books.Source) -> int:
    """Rows written online."""
    # GPU workers may lack Feast
    from jobs.codes import beside

    return beside.publish(config, rows, books_id, source)
