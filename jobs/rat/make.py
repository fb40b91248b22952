"""What is read -> the pieces of a training: item source, alignment, parts. Written once, for the judged and for all events.

Shapes: N items, V items + 1 (row 0 is padding), K whitened width, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from jobs.lake.tensors import Catalogue, texts_of
from jobs.rat.config import Config
from jobs.run import as_json
from models.behaviour.assembly import Fusion
from models.behaviour.item_sources import build_items
from models.behaviour.items import Items
from models.behaviour.training import Aligner, Training


def make_items(config: Config, white_NK: Tensor, spread_K: Tensor | None = None) -> Items:
    """The item source of the configured adapter over the catalogue's whitened embeddings; `spread_K` undoes their whitening."""
    width, count = config.backbone.width, len(white_NK)
    items: Items = build_items(item_config(config), width, count, white_NK, config.drop_ids, spread_K)
    return items


def training_of(config: Config) -> Training:
    """The configured training. LLM-ESR is a baseline of dot products, as published."""
    return dataclasses.replace(config.training, cosine=0.0) if config.adapter == "llm_esr" else config.training


def make_aligner(config: Config, teacher_VD: Tensor, known_V: Tensor, catalogue: Catalogue, counts_V: Tensor) -> Aligner | None:
    """The alignment to a teacher's table; items that it lacks (`known_V`) weigh nothing. None where the recipe has none."""
    if config.alpha == 0 or config.adapter == "llm_esr":
        return None
    weight_V = counts_V / (counts_V + config.popularity_prior).clamp_min(1e-9) * known_V
    text_V = texts_of(catalogue).to(counts_V.device)
    return Aligner(teacher_VD=teacher_VD, weight_V=weight_V, alpha=config.alpha, temperature=config.temperature, text_V=text_V)


def fusion_of(config: Config) -> Fusion:
    """The configured fusion. LLM-ESR is a baseline that stands alone."""
    return Fusion(parts=("llmemb",)) if config.adapter == "llm_esr" else config.fusion


def item_config(config: Config) -> dict[str, Any]:
    """What builds the item source, now and again from an artifact."""
    own = {"null_space": {"text_width": config.text_width, "added": True}, "codes": as_json(config.item_codes)}
    items: dict[str, Any] = {"kind": config.adapter} | own.get(config.adapter, {"hidden": config.hidden})
    if config.adapter != "llm_esr" and config.training.cosine:
        items["unit"] = True
    return items
