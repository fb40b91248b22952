"""The way back from a delta, which overwrites rows of the space that serves: the snapshot before, from the lake."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from feature_repo import compatibility, spaces, strangers
from feature_repo.compatibility import Compatibility
from feature_repo.reader import Pointer, Reader, Space
from feature_repo.spaces import Unverified
from feature_repo.stores import BROKEN, NotPublished, Store
from jobs.engines import online
from jobs.lake.items import tombstones
from jobs.run import Refused, Unavailable


def allowed(lake: Path, before: Pointer | None, space: Space, most: int) -> Compatibility:
    """How what is restored differs from what serves: told, and no reason to refuse. Raises Refused where it is no way back."""
    if before is None or before.space_id != space.space_id:
        serves = before.space_id if before else "nothing"
        raise Refused(f"publish.restore: {serves} serves, not space {space.space_id}: `rollback` goes back to another space")
    if space.ds > before.ds:
        raise Refused(f"publish.restore: {space.ds} is newer than what serves ({before.ds}): publish it without restore")
    return compatibility.compare(*online.unchanged(lake, before, space, most), same=True)


@contextlib.contextmanager
def on_failure(
    lake: Path, store: Store, reader: Reader, serves: Pointer | None, chunk_rows: int, *, arriving: bool
) -> Iterator[None]:
    """Restores what serves where a delta into it (`serves` is given) does not verify, or the store fails; the refusal says so.

    Of rows that are `arriving` the lake keeps the newest alone: then they come along, and that is what is said.
    Raises Unverified; Unavailable where the store failed.
    """
    try:
        yield
    except (Unverified, *BROKEN) as error:
        refusal, why = (Unverified, f"{error}.") if isinstance(error, Unverified) else (Unavailable, online.broken(error))
        if serves is None:
            raise refusal(f"{why} What serves is untouched") from error
        done, told = restored(lake, store, reader, serves, chunk_rows)
        if done and arriving:
            told = (
                f"The snapshot of {serves.ds} serves with what arrived since, the rows of this publish among them, read back and "
                f"equal ({told}); the pointer, the index and attributes don't tell of them yet: run again"
            )
        elif done:
            told = f"The snapshot of {serves.ds} serves again as before: {told}"
        raise refusal(f"{why} {told}") from error


def restored(lake: Path, store: Store, reader: Reader, serves: Pointer, chunk_rows: int) -> tuple[bool, str]:
    """Brings the serving space back to its snapshot, with what arrived since; whether that went well, and what came of it."""
    partition = online.partition_of(serves.space_id, serves.ds)
    by_hand = "--set publish.restore=true with the date of a snapshot, or `rollback`, brings back what is whole"
    forgotten = tombstones(lake)  # of now: a `forget` that comes meanwhile waits for the lease

    def rows() -> Iterator[spaces.Chunk]:
        return online.chunks(lake, partition, chunk_rows, forgotten=forgotten)

    try:
        hash_N = spaces.inspect(rows(), serves.width, serves.codec)
        space = dataclasses.replace(serves.space, items=len(hash_N))
        written, _ = spaces.stage(store, reader, space, rows(), only_changes=True)
        removed = strangers.remove_strangers(store, space.space_id, hash_N)
        spaces.verify(store, reader, space, rows(), hash_N)
    except (NotPublished, ValueError, *BROKEN) as error:
        why = f"The snapshot of {serves.ds} could not be restored ({error}), so what serves may be mixed of two dates: {by_hand}"
        return False, why
    return True, f"{written:,} rows restored, {removed:,} removed"
