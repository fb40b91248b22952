"""Artifacts of the lake, `models/KIND/ID`: a folder whose name is a digest of its bytes."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from jobs.lake.partitions import digest_folder, make_folder, sync, sync_tree
from jobs.run import InputError


def keep(lake: Path, kind: str, staged: Path) -> str:
    """Moves a finished artifact folder to `models/KIND/ID` and returns ID, a digest of its bytes; equal bytes are kept once."""
    identity = digest_folder(staged)[:16]
    target = lake / "models" / kind / identity
    if target.exists():
        shutil.rmtree(staged)
    else:
        make_folder(target.parent)
        # before the rename: after a power cut an artifact is whole or absent
        sync_tree(staged)
        staged.rename(target)
    sync(target.parent)
    return identity


def stage(lake: Path, kind: str) -> Path:
    """An empty folder beside the artifacts of `kind`, for `keep_artifact`."""
    staged = lake / "models" / kind / f".staged-{uuid.uuid4().hex[:8]}"
    staged.mkdir(parents=True)
    return staged


def find(lake: Path, kind: str, identity: str) -> Path:
    """Folder of an artifact, for example `artifact(lake, "encoder", "ab12…")`. Raises InputError where it is absent."""
    path = lake / "models" / kind / identity
    if not path.is_dir():
        raise InputError(f"{kind} {identity} is not in the lake ({path}): train it, or fetch it from the registry first")
    return path
