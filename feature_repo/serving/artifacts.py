"""Where a generation's files are: fetched from a folder or an object store, verified by digest, and mapped on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from pathlib import Path

from pyarrow import fs

from feature_repo.index import Foreign, Index, digest_of
from feature_repo.reader import Pointer
from feature_repo.serving.settings import Settings


class Absent(LookupError):
    """An artifact is not where the settings say."""


def open_index(settings: Settings, pointer: Pointer) -> Index:
    """The index that a pointer names, its bytes and what it belongs to checked.

    Raises Absent where it is not there (yet), Foreign where its bytes or its space are others than the pointer says.
    """
    home = f"indexes/space={pointer.space_id}/ds={pointer.ds}"
    digest = pointer.index or named_by(settings, home)
    folder = local(settings, f"{home}/{digest[:16]}")
    if (found := digest_of(folder)) != digest:
        if settings.cache:
            shutil.rmtree(folder, ignore_errors=True)
        raise Foreign(f"the index {folder.name} has digest {found[:16]}: its bytes were changed; publish the space again")
    try:
        index = Index(folder)
        index.check(space_id=pointer.space_id, ds=pointer.ds, width=pointer.width, recommender_id=pointer.recommender_id)
    except (OSError, KeyError, RuntimeError) as error:
        raise Foreign(f"the index in {folder} can't be read ({error}): publish the space again") from error
    return index


def named_by(settings: Settings, home: str) -> str:
    """The digest of a snapshot's index, where the pointer was written by a publisher that knew of none."""
    source, root = fs.FileSystem.from_uri(uri_of(settings.artifacts))
    try:
        with source.open_input_stream(f"{root}/{home}/_index.json") as stream:
            return str(json.loads(stream.read())["digest"])
    except FileNotFoundError as error:
        raise Absent(f"{settings.artifacts} has no {home}/_index.json: publish the space") from error


def recommender_folder(settings: Settings, recommender_id: str) -> Path:
    """Folder of a recommender, its bytes checked against its id. Raises Absent, Foreign."""
    folder = local(settings, f"models/recommender/{recommender_id}")
    if not digest_of(folder).startswith(recommender_id):
        if settings.cache:
            shutil.rmtree(folder, ignore_errors=True)
        raise Foreign(f"recommender {recommender_id} has other bytes than its id says: fetch it again")
    return folder


def local(settings: Settings, name: str) -> Path:
    """A folder of the artifacts on this machine: as it lies, or copied into the cache first, whole or not at all."""
    source, root = fs.FileSystem.from_uri(uri_of(settings.artifacts))
    if not settings.cache:
        folder = Path(root) / name
        if not isinstance(source, fs.LocalFileSystem):
            raise ValueError(f"artifacts at {settings.artifacts} are not on this machine: set LLMEMB_SERVING_CACHE to a folder")
        if not folder.is_dir():
            raise Absent(f"{settings.artifacts} has no {name}: has publish run, and is it mounted?")
        return folder
    target = Path(settings.cache) / hashlib.sha256(settings.artifacts.encode()).hexdigest()[:8] / name
    if not target.is_dir():
        if source.get_file_info(f"{root}/{name}").type != fs.FileType.Directory:
            raise Absent(f"{settings.artifacts} has no {name}: has publish run?")
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        staged.mkdir()
        fs.copy_files(f"{root}/{name}", str(staged), source_filesystem=source, destination_filesystem=fs.LocalFileSystem())
        try:
            staged.rename(target)
        except OSError:  # another worker was first
            shutil.rmtree(staged, ignore_errors=True)
    return target


def forget_others(settings: Settings, kept: Path) -> None:
    """Removes other indexes from the cache; files that a generation still maps live on until it ends."""
    if settings.cache:
        for folder in (Path(settings.cache) / kept.relative_to(settings.cache).parts[0]).glob("indexes/space=*/ds=*/*"):
            if folder != kept and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)


def uri_of(place: str) -> str:
    """An address that pyarrow knows."""
    return place if "://" in place else str(Path(place).absolute())
