"""Which vectors a night's report is about: the space that the night wrote or took over, its encoder, and the space before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.lake import partitions
from jobs.lake.nights import Night
from jobs.lake.tables import ITEMS


@dataclass(frozen=True, kw_only=True)
class Spaces:
    """What is looked at: the space of the night, its encoder, and the space before."""

    items: str
    """Partition of `items`."""
    encoder_id: str
    served: str
    """Partition of `item_embeddings`; empty where there is none yet."""
    before: str
    """Partition of another space that served before; empty where there is none."""


def spaces_of(lake: Path, night: Night, before: Sequence[Night]) -> Spaces:
    """What the night's vectors are: of its `project`, else of the last one before. Texts are empty where there is none."""
    made = [(one.ds, one.result("project")) for one in [*before, night] if one.result("project")]
    made = [(ds, result) for ds, result in made if partitions.is_committed(lake, "item_embeddings", partition_of(result, ds))]
    ds, project = made[-1] if made else ("", {})
    trained = night.result("embed") or night.result("scft")
    return Spaces(
        items=partitions.newest(lake, ITEMS.name, night.ds) or "",
        encoder_id=str(project.get("encoder_id") or trained.get("encoder_id", "")),
        served=partition_of(project, ds) if project else "",
        before=space_before(lake, night, made),
    )


def space_before(lake: Path, night: Night, made: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Partition of the space that another one of the night took over from; empty where none did, or it is gone."""
    if not made:
        return ""
    own = made[-1][1].get("space_id")
    older = [partition_of(result, ds) for ds, result in made if result.get("space_id") != own]
    replaced = str(night.result("publish").get("previous_space_id") or "")
    if replaced and replaced != own:
        older = partitions.committed(lake, "item_embeddings", f"space={replaced}") or older
    return older[-1] if older else ""


def partition_of(project: Mapping[str, Any], ds: str) -> str:
    """Partition of `item_embeddings` that a `project` wrote."""
    return f"space={project.get('space_id')}/ds={ds}"


def serving(nights: Sequence[Night]) -> tuple[str, str]:
    """(date of the snapshot, space) that serve after these nights, as their manifests tell; empty where nothing was published."""
    ds, space_id = "", ""
    for night in nights:
        if night.done("publish"):
            ds, space_id = night.ds, str(night.result("publish").get("space_id") or "")
        if back := night.result("rollback"):
            ds, space_id = str(back.get("serves_ds") or ds), str(back.get("space_id") or space_id)
    return ds, space_id


def first_filled(lake: Path, space_id: str) -> str:
    """Date of the first snapshot that a space was filled with; empty where the lake no longer tells."""
    dates = partitions.committed(lake, "item_embeddings", f"space={space_id}") if space_id else []
    return dates[0].partition("/ds=")[2] if dates else ""
