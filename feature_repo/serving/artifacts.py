"""Where a generation's files are: fetched from a folder or an object store, verified by digest, and mapped on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

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
    try:
        text = read(settings.artifacts, f"{home}/_index.json")
    except FileNotFoundError as error:
        raise Absent(f"{settings.artifacts} has no {home}/_index.json: publish the space") from error
    return str(json.loads(text)["digest"])


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
    if not settings.cache:
        if bucket(settings.artifacts):
            raise ValueError(f"artifacts at {settings.artifacts} are not on this machine: set LLMEMB_SERVING_CACHE to a folder")
        folder = home_of(settings.artifacts) / name
        if not folder.is_dir():
            raise Absent(f"{settings.artifacts} has no {name}: has publish run, and is it mounted?")
        return folder
    target = Path(settings.cache) / hashlib.sha256(settings.artifacts.encode()).hexdigest()[:8] / name
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        try:
            copy(settings.artifacts, name, staged)
            with contextlib.suppress(OSError):  # another worker was first
                staged.rename(target)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return target


def forget_others(settings: Settings, kept: Path) -> None:
    """Removes other indexes from the cache; files that a generation still maps live on until it ends."""
    if settings.cache:
        for folder in (Path(settings.cache) / kept.relative_to(settings.cache).parts[0]).glob("indexes/space=*/ds=*/*"):
            if folder != kept and folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)


def copy(artifacts: str, name: str, into: Path) -> None:
    """Copies a folder of the artifacts. Raises Absent, OSError."""
    if not bucket(artifacts):
        if not (there := home_of(artifacts) / name).is_dir():
            raise Absent(f"{artifacts} has no {name}: has publish run?")
        shutil.copytree(there, into)
        return
    import obstore

    with failures(artifacts):
        keys = [one["path"] for one in obstore.list(opened(artifacts), f"{name}/").collect()]
        for key in keys:
            file = into / key.removeprefix(f"{name}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as stream:
                for part in obstore.get(opened(artifacts), key).stream():
                    stream.write(part)
    if not keys:
        raise Absent(f"{artifacts} has no {name}: has publish run?")


def read(artifacts: str, name: str) -> bytes:
    """A small file of the artifacts. Raises FileNotFoundError, OSError."""
    if not bucket(artifacts):
        return (home_of(artifacts) / name).read_bytes()
    import obstore

    with failures(artifacts):
        return bytes(obstore.get(opened(artifacts), name).bytes())


@contextlib.contextmanager
def failures(artifacts: str) -> Iterator[None]:
    """What an object store fails at, as an OSError; its own words may bear a signature."""
    from obstore.exceptions import BaseError

    try:
        yield
    except BaseError as error:
        raise OSError(f"{artifacts} can't be read ({type(error).__name__}): is it up, and may this process read it?") from None


def bucket(artifacts: str) -> bool:
    """Whether artifacts are on an object store."""
    return "://" in artifacts and not artifacts.startswith("file://")


def home_of(artifacts: str) -> Path:
    """The folder that artifacts are in."""
    return Path(artifacts.removeprefix("file://")).absolute()


@cache
def opened(address: str) -> Any:
    """The object store at an address; who may read it stands in the environment."""
    from obstore.store import from_url

    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    return from_url(address, client_options={"allow_http": True} if plain else None)
