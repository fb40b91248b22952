"""Artifacts of the lake, `models/KIND/ID`: a folder whose name is a digest of its bytes."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.lake import remote
from jobs.lake import store as stores
from jobs.lake.partitions import digest_folder, make_folder, sync, sync_tree
from jobs.run import InputError


def keep(lake: Path, kind: str, staged: Path) -> str:
    """Moves a finished artifact folder to `models/KIND/ID` and returns ID, a digest of its bytes; equal bytes are kept once."""
    return keep_folder(lake, staged, lake / "models" / kind)[:16]


def keep_folder(lake: Path, staged: Path, home: Path) -> str:
    """Moves a finished folder below `home`, under a name made of the digest of its bytes; returns the digest."""
    digest = digest_folder(staged)
    target = home / digest[:16]
    if target.exists():
        shutil.rmtree(staged)
    else:
        make_folder(target.parent)
        # before the rename: after a power cut an artifact is whole or absent
        sync_tree(staged)
        staged.rename(target)
    sync(target.parent)
    put_folder(lake, target)  # also where it was here: who kept it may have been killed before it was put
    return digest


def put_folder(lake: Path, folder: Path) -> None:
    """Puts a folder of this machine into a lake on an object store; of another lake it is part already."""
    if store := stores.of(lake):
        remote.put_folder(store, lake, folder)


def has_folder(lake: Path, folder: Path) -> bool:
    """Whether the lake has a folder that is named after its bytes; of an object store it then is on this machine, whole."""
    if store := stores.of(lake):
        return remote.fetch_folder(store, lake, folder, lambda found: digest_folder(found)[:16] == folder.name)
    return folder.is_dir()


def stage(lake: Path, kind: str) -> Path:
    """An empty folder beside the artifacts of `kind`, for `keep_artifact`."""
    staged = lake / "models" / kind / f".staged-{uuid.uuid4().hex[:8]}"
    staged.mkdir(parents=True)
    return staged


def find(lake: Path, kind: str, identity: str) -> Path:
    """Folder of an artifact, for example `artifact(lake, "encoder", "ab12…")`. Raises InputError where it is absent."""
    path = lake / "models" / kind / identity
    if not has_artifact(lake, kind, identity):
        where = stores.called(lake)
        raise InputError(f"{kind} {identity} is not in the lake ({where}): train it, or fetch it from the registry first")
    return path


def has_artifact(lake: Path, kind: str, identity: str) -> bool:
    """Whether the lake has an artifact; of a lake on an object store it then is on this machine, whole."""
    return has_folder(lake, lake / "models" / kind / identity)


def brought(lake: Path, kind: str, identity: str) -> Path:
    """Folder of an artifact on this machine, where the lake has it; the path may be of nothing."""
    has_artifact(lake, kind, identity)
    return lake / "models" / kind / identity


def about(folder: Path) -> dict[str, Any]:
    """What an artifact's folder says of itself, in KIND.json; empty where it has no such file."""
    path = folder / f"{folder.parent.name}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return known


def description(lake: Path, kind: str, identity: str) -> dict[str, Any]:
    """What an artifact says of itself; empty where the lake lacks it, or without an id."""
    return about(brought(lake, kind, identity)) if identity else {}


def described(lake: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(id, what its file KIND.json says) of all artifacts of a kind that have one, in order."""
    home = lake / "models" / kind
    if store := stores.of(lake):
        paths = [home / identity / f"{kind}.json" for identity in store.folders(f"models/{kind}")]
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                if not path.parent.is_dir():  # a part of a folder would pass for a whole one
                    path = home / ".described" / path.parent.name / path.name
                if not path.exists():
                    store.fetch_one(f"models/{kind}/{path.parent.name}/{path.name}", path)
                yield path.parent.name, json.loads(path.read_text())
        return
    for path in sorted(home.glob(f"*/{kind}.json")):
        yield path.parent.name, json.loads(path.read_text())
