"""A Parquet file of an object store, read by ranges: of each row group the columns that are wanted, several at once."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence

import pyarrow.parquet as pq

from jobs.lake.store import Store

TAIL = 65_536
"""Bytes that hold the footer of most files."""
PIECE = 8 << 20
"""Bytes of one request at most."""


class Ranged(io.RawIOBase):
    """A file whose bytes come as they are asked for; memory holds its footer and the wanted columns of one row group."""

    def __init__(self, store: Store, key: str) -> None:
        self.store, self.key, self.at = store, key, 0
        tail, self.length = store.tail(key, TAIL)
        self.held: list[tuple[int, bytes]] = []
        self.footer = (self.length - len(tail), tail)
        self.groups: list[list[tuple[int, int]]] = []

    def want(self, file: pq.ParquetFile, columns: Sequence[str] | None) -> None:
        """Names the columns that will be read: their bytes of a row group then come together."""
        for number in range(file.metadata.num_row_groups):
            group, chunks = file.metadata.row_group(number), list[tuple[int, int]]()
            for place in range(group.num_columns):
                column = group.column(place)
                if columns is None or column.path_in_schema.split(".")[0] in columns:
                    start = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
                    chunks.append((start, start + column.total_compressed_size))
            self.groups.append(chunks)

    def read(self, size: int = -1) -> bytes:
        """The next bytes, as many as asked for where the file has them."""
        end = self.length if size is None or size < 0 else min(self.at + size, self.length)
        start, self.at = self.at, end
        return self.bytes_of(start, end) if end > start else b""

    def bytes_of(self, start: int, end: int) -> bytes:
        """Bytes [start, end): of what is here, or of the row group that they lie in, or else fetched alone."""
        if (found := within([self.footer, *self.held], start, end)) is not None:
            return found
        group = next((chunks for chunks in self.groups if any(low <= start and end <= high for low, high in chunks)), None)
        if group is None:
            return self.store.ranges(self.key, [(start, end)])[0]
        pieces = [(low, min(low + PIECE, high)) for begin, high in group for low in range(begin, high, PIECE)]
        self.held = []
        parts = iter(self.store.ranges(self.key, pieces))
        self.held = [(low, b"".join(next(parts) for _ in range(low, high, PIECE))) for low, high in group]
        found = within(self.held, start, end)
        assert found is not None
        return found

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next bytes are read."""
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves there."""
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.length}[whence]
        return self.at


def within(held: Sequence[tuple[int, bytes]], start: int, end: int) -> bytes | None:
    """Bytes [start, end) of what is held; None where they are not."""
    for low, data in held:
        if low <= start and end <= low + len(data):
            return data[start - low : end - low]
    return None


@contextlib.contextmanager
def opened(store: Store, key: str, columns: Sequence[str] | None = None) -> Iterator[pq.ParquetFile]:
    """A Parquet file of a store, of which `columns` will be read. Raises FileNotFoundError."""
    ranged = Ranged(store, key)
    with pq.ParquetFile(ranged) as file:
        ranged.want(file, columns)
        yield file
