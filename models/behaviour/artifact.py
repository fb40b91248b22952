"""The artifact of a recommender: three files that serving needs, and nothing else.

Shapes: V items + 1 (row 0 is padding), D width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.behaviour.fused import FusedRecommender, Part, Weights
from models.behaviour.recommender import Backbone, LoadedRecommender, Recommender
from models.behaviour.whitening import Whitening

Loaded = LoadedRecommender | FusedRecommender


def save_recommender(
    path: Path,
    recommender: Recommender,
    *,
    item_ids: Sequence[str],
    backbone: Backbone,
    items: Mapping[str, Any],
    whitening: Whitening | None = None,
    turn_DD: Tensor | None = None,
    meta: Mapping[str, Any],
) -> None:
    """Writes recommender.safetensors, recommender.json and item_ids.json into a folder: all that serving needs.

    `items` is {"kind": "id"}, {"kind": "mlp", "residual" or "llm_esr", "hidden": …} or {"kind": "null_space", "text_width": …};
    `turn_DD` is an orthogonal map that all vectors take on their way out, none leaves them as they are; `meta` is JSON.
    """
    tensors = {f"recommender.{name}": value for name, value in recommender.state_dict().items()}
    known: dict[str, Any] = {**meta, "backbone": dataclasses.asdict(backbone), "items": dict(items), "width": backbone.width}
    if whitening is not None:
        tensors |= {f"whitening.{name}": value for name, value in whitening.state_dict().items()}
        known["explained_variance"] = whitening.explained
    if turn_DD is not None:
        tensors["turn_DD"] = turn_DD
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path / "recommender.safetensors")
    (path / "recommender.json").write_text(json.dumps(known, indent=1, sort_keys=True))
    (path / "item_ids.json").write_text(json.dumps(list(item_ids)))


def save_fused(
    path: Path,
    parts: Sequence[Part],
    weights: Weights,
    *,
    item_ids: Sequence[str],
    counts_V: Tensor,
    whitening: Whitening,
    turns: Mapping[str, Tensor] | None = None,
    centres: Mapping[str, Tensor] | None = None,
    meta: Mapping[str, Any],
) -> None:
    """Writes the same three files as `recommender.save_recommender`: all that serving needs.

    counts_V are the items' train events, which gates go by; `turns` are orthogonal maps of single parts; `centres` the vectors
    that are taken from a part's users; `meta` is JSON.
    """
    tensors = {f"whitening.{name}": value for name, value in whitening.state_dict().items()} | {"count_V": counts_V.int()}
    known: list[dict[str, Any]] = []
    for part in parts:
        tensors |= {f"{part.name}.{name}": value for name, value in part.tensors().items()}
        known.append(part.meta() | {"scale": weights.scale[part.name]})
    tensors |= {f"{name}.turn_DD": turn_DD for name, turn_DD in (turns or {}).items()}
    tensors |= {f"{name}.centre_D": centre_D for name, centre_D in (centres or {}).items()}
    width = sum(part.backbone.width for part in parts)
    written = {**meta, "parts": known, "gates": list(weights.gates), "width": width, "explained_variance": whitening.explained}
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path / "recommender.safetensors")
    (path / "recommender.json").write_text(json.dumps(written, indent=1, sort_keys=True))
    (path / "item_ids.json").write_text(json.dumps(list(item_ids)))


def load_recommender(path: Path, device: torch.device | str = "cpu") -> Loaded:
    """Reads what `save_recommender` or `save_fused` wrote. Raises ValueError where a file is missing or tensors do not fit."""
    missing = [name for name in ("recommender.safetensors", "recommender.json", "item_ids.json") if not (path / name).exists()]
    if missing:
        raise ValueError(f"{path} holds no {missing[0]}: it is not a recommender's folder")
    meta = json.loads((path / "recommender.json").read_text())
    item_ids = json.loads((path / "item_ids.json").read_text())
    try:
        kind = FusedRecommender if "parts" in meta else LoadedRecommender
        return kind(meta, item_ids, load_file(path / "recommender.safetensors"), device)
    except RuntimeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
