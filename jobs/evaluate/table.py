"""The table of an evaluation, for a person."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from jobs.evaluate.config import CHALLENGER, Config, Result, unseen_only
from jobs.evaluate.figures import columns
from jobs.lake.tensors import Catalogue
from models.judge.evaluation import SLICES

log = logging.getLogger(__name__)


def log_table(config: Config, result: Result, catalogue: Catalogue) -> None:
    """The table, for a person."""
    log.info("%s", "\n".join(table(config, result, catalogue)))


def table(config: Config, result: Result, catalogue: Catalogue) -> Iterator[str]:
    """Lines of the table: NDCG by model and slice, then the challenger's differences, the sampled ranking, and the leak test."""
    ndcg = f"ndcg@{config.k}"
    names = [name for name in SLICES if name != "paper_tail"]
    among = f"{len(catalogue.item_ids):,} {'unseen ' if unseen_only(config) else ''}items"
    yield f"evaluate: the last {config.part} event of {result.users['overall']:,} users, ranked among {among}; {ndcg}"
    yield line("", names)
    yield line("users", [f"{result.users[name]:,}" for name in names])
    for model, by_slice in result.values.items():
        yield line(model, [figure_text(by_slice[name][ndcg]) for name in names])
    for against in ("champion", "id_only", "popularity"):
        rows = {row.slice: row for row in result.differences if row.against == against}
        if rows:
            yield line(f"{CHALLENGER} - {against}", [figure_text(rows[name].value, "+") for name in names])
            yield line("   95 % from", [figure_text(rows[name].low, "+") for name in names])
            yield line("   to", [figure_text(rows[name].high, "+") for name in names])
            yield line("   could have shown", [figure_text(rows[name].detectable) for name in names])
            break
    yield f"overall, and for comparison with papers among {config.negatives} sampled negatives:"
    yield line("", columns(config))
    for model, by_slice in result.values.items():
        yield line(model, [figure_text(by_slice["overall"][name]) for name in columns(config)])
    if result.leak:
        warning = f" ABOVE {config.leak_bound}: a field of the prompt leaks popularity" if result.leaking else ""
        yield f"raw embeddings foretell log test popularity: R2 {result.leak['r2']:.3f}, rank correlation " \
              f"{result.leak['spearman']:.3f}{warning}"  # fmt: skip


def line(head: str, cells: list[str]) -> str:
    """One line of the table."""
    return f"  {head:<26}" + "".join(f"{cell:>{max(9, len(cell) + 2)}}" for cell in cells)


def figure_text(value: float | None, sign: str = "") -> str:
    """A figure with four digits; a dash where there is none."""
    return "-" if value is None else f"{value:{sign}.4f}"
