"""Which bytes of one file are dirty, and where in the log the newest copy of each is.  Pure.

Owns half-open ranges of one file, each mapped to consecutive log positions; newest wins.
Because a log position is also an age, a range needs no separate version: what was written
before position L lies below L.

Extents are kept per chunk of the file and never cross a chunk's end, so that a random write
into a file with a million extents moves a few of them, not half a million.  In a chunk they are
three parallel arrays of 64 bit integers: 24 bytes an extent instead of some 200 for objects.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

CHUNK_BYTES = 4 << 20


class Extent(NamedTuple):
    """File bytes ``[start, end)`` stand in the log from position *at* on."""

    start: int
    end: int
    at: int


class ExtentMap:
    """Disjoint extents, in order of file position."""

    __slots__ = ("_chunk_bytes", "_chunks", "byte_count", "extent_count")

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunks: dict[int, _Chunk] = {}
        self.byte_count = 0
        self.extent_count = 0

    def __iter__(self) -> Iterator[Extent]:
        for index in sorted(self._chunks):
            yield from self._chunks[index]

    @property
    def end(self) -> int:
        """Where the last dirty byte ends; 0 if none is."""
        return self._chunks[max(self._chunks)].end if self._chunks else 0

    def insert(self, start: int, end: int, at: int) -> None:
        """``[start, end)`` was written; older extents give way."""
        assert start < end
        while start < end:
            index = start // self._chunk_bytes
            cut = min(end, (index + 1) * self._chunk_bytes)
            chunk = self._chunks.get(index)
            if chunk is None:
                chunk = self._chunks[index] = _Chunk()
            byte_count, extent_count = chunk.byte_count, len(chunk)
            chunk.insert(start, cut, at)
            self.byte_count += chunk.byte_count - byte_count
            self.extent_count += len(chunk) - extent_count
            at += cut - start
            start = cut

    def truncate(self, size: int) -> None:
        """Nothing at or beyond *size* is dirty any more."""
        for index in [i for i in self._chunks if (i + 1) * self._chunk_bytes > size]:
            chunk = self._chunks[index]
            self.byte_count -= chunk.byte_count
            self.extent_count -= len(chunk)
            chunk.free(size, (index + 1) * self._chunk_bytes)
            self._keep_if_any(index, chunk)

    def drop_older(self, position: int) -> None:
        """Forget what stands in the log before *position*: it was flushed."""
        self.byte_count = self.extent_count = 0
        for index, chunk in list(self._chunks.items()):
            chunk.drop_older(position)
            self._keep_if_any(index, chunk)

    def overlapping(self, start: int, end: int) -> list[Extent]:
        """The dirty parts of ``[start, end)``, clipped to it, in order."""
        indices: list[int] | range = range(
            start // self._chunk_bytes, -(-end // self._chunk_bytes))
        if len(indices) > len(self._chunks):
            indices = sorted(i for i in self._chunks if i in indices)
        return [
            extent for index in indices if (chunk := self._chunks.get(index)) is not None
            for extent in chunk.overlapping(start, end)]

    def _keep_if_any(self, index: int, chunk: _Chunk) -> None:
        if len(chunk):
            self.byte_count += chunk.byte_count
            self.extent_count += len(chunk)
        else:
            del self._chunks[index]


class _Chunk:
    """The extents of one chunk."""

    __slots__ = ("_at", "_ends", "_starts", "byte_count")

    def __init__(self) -> None:
        self._starts = array("Q")
        self._ends = array("Q")
        self._at = array("Q")
        self.byte_count = 0

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Extent]:
        return map(Extent, self._starts, self._ends, self._at)

    @property
    def end(self) -> int:
        return self._ends[-1]

    def insert(self, start: int, end: int, at: int) -> None:
        index = self.free(start, end)
        self._starts.insert(index, start)
        self._ends.insert(index, end)
        self._at.insert(index, at)
        self.byte_count += end - start

    def drop_older(self, position: int) -> None:
        kept = [extent for extent in self if extent.at >= position]
        self._starts = array("Q", [e.start for e in kept])
        self._ends = array("Q", [e.end for e in kept])
        self._at = array("Q", [e.at for e in kept])
        self.byte_count = sum(e.end - e.start for e in kept)

    def overlapping(self, start: int, end: int) -> list[Extent]:
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        found = []
        for i in range(first, last):
            from_, to = max(self._starts[i], start), min(self._ends[i], end)
            found.append(Extent(from_, to, self._at[i] + from_ - self._starts[i]))
        return found

    def free(self, start: int, end: int) -> int:
        """Make ``[start, end)`` free; return the index where an extent for it belongs."""
        starts, ends, at = self._starts, self._ends, self._at
        first = bisect_right(ends, start)  # the first extent that ends after start
        last = bisect_left(starts, end)  # the first one that begins at or after end
        if first >= last:
            return first
        left = (starts[first], start, at[first]) if starts[first] < start else None
        right = None
        if ends[last - 1] > end:
            right = (end, ends[last - 1], at[last - 1] + end - starts[last - 1])
        self.byte_count -= sum(ends[first:last]) - sum(starts[first:last])
        kept = [part for part in (left, right) if part]
        starts[first:last] = array("Q", [part[0] for part in kept])
        ends[first:last] = array("Q", [part[1] for part in kept])
        at[first:last] = array("Q", [part[2] for part in kept])
        self.byte_count += sum(part[1] - part[0] for part in kept)
        return first + (1 if left else 0)


class Piece(NamedTuple):
    """One WRITE of a flush: the extents that fill ``[start, end)`` without a gap."""

    start: int
    end: int
    extents: tuple[Extent, ...]


def pieces(
    extents: list[Extent], piece_bytes_max: int, chunk_bytes: int = CHUNK_BYTES
) -> list[Piece]:
    """Cut dirty extents into WRITEs, never across a multiple of *piece_bytes_max*.

    Whole chunks come first: they will hardly change again, while a partial one at the end of a
    growing file may still be filled and then be coalesced.
    """
    found: list[Piece] = []
    run: list[Extent] = []

    def close() -> None:
        if run:
            found.append(Piece(run[0].start, run[-1].end, tuple(run)))
            run.clear()

    for extent in extents:
        start, end, at = extent
        while start < end:
            if run and (run[-1].end != start or start % piece_bytes_max == 0):
                close()
            cut = min(end, start - start % piece_bytes_max + piece_bytes_max)
            run.append(Extent(start, cut, at))
            at += cut - start
            start = cut
    close()

    dirty_of_chunk: dict[int, int] = {}
    for piece in found:
        chunk = piece.start // chunk_bytes
        dirty_of_chunk[chunk] = dirty_of_chunk.get(chunk, 0) + piece.end - piece.start
    return sorted(found, key=lambda piece: dirty_of_chunk[piece.start // chunk_bytes] < chunk_bytes)
