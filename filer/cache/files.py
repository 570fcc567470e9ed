"""The chunk files of the page cache: blocking file I/O, and descriptors kept open.

Owns ``<directory>/chunks/ab/<serial>``; does not own what in them is valid (the index does).
The methods under "in a worker thread" may block on the disk and touch no shared state; the others
belong to the event loop and never block.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filer.cache.layout import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    PAGE_BYTES,
    ChunkRecord,
    block_digests,
    first_bad_block,
)

Buffer = bytes | bytearray | memoryview

DESCRIPTORS_MAX = 512
GENERATION_SHIFT = 40
"""A serial is the generation of the index's opening, then a counter."""


class BadBlock(Exception):
    """Bytes on the disk are not what was written there; *offset* is within the chunk."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        super().__init__(f"checksum mismatch at {offset}")


@dataclass(frozen=True, slots=True)
class Stored:
    """What a worker thread hands back."""

    length: int
    digests: bytes
    descriptor: int
    free_bytes: int


def _aligned(record: ChunkRecord, start: int, end: int) -> tuple[int, int]:
    """``[start, end)`` widened to whole blocks, as far as the last page is valid."""
    last_page = (end - 1) // PAGE_BYTES
    stop = last_page * PAGE_BYTES + record.lengths[last_page]
    return start - start % BLOCK_BYTES, min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, stop)


def _verified(record: ChunkRecord, start: int, end: int, at: int, data: bytearray) -> Buffer:
    """*data*, read from *at*, cut to ``[start, end)``.  Raises: BadBlock."""
    view = memoryview(data)
    bad = first_bad_block(record, at, view)
    if bad is not None:
        raise BadBlock(bad)
    if len(data) == end - start:
        return data
    return view[start - at : end - at]


class ChunkFiles:
    def __init__(self, directory: Path) -> None:
        self._chunks = str(directory / "chunks")
        self._open: OrderedDict[int, int] = OrderedDict()
        """Serial → descriptor, least recently used first."""

    def path(self, serial: int) -> str:
        return f"{self._chunks}/{serial & 0xFF:02x}/{serial:016x}"

    # -- on the event loop --------------------------------------------------------------------

    def read_nowait(self, record: ChunkRecord, start: int, end: int) -> Buffer | None:
        """Read and verify bytes of one chunk, if that needs no disk I/O; else ``None``.

        Raises: BadBlock.
        """
        descriptor = self._open.get(record.serial)
        if descriptor is None:
            return None  # open(2) may read directories and inodes from the disk
        self._open.move_to_end(record.serial)
        at, stop = _aligned(record, start, end)
        data = bytearray(stop - at)
        try:
            if os.preadv(descriptor, [data], at, os.RWF_NOWAIT) < len(data):
                return None
        except OSError:
            return None  # EAGAIN: not in the page cache.  A real error shows in the thread.
        return _verified(record, start, end, at, data)

    def keep(self, serial: int, descriptor: int) -> None:
        """Take over a descriptor that a worker thread opened."""
        if serial in self._open:
            os.close(descriptor)
            return
        self._open[serial] = descriptor
        while len(self._open) > DESCRIPTORS_MAX:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest)

    def release(self, serial: int) -> int | None:
        """Hand out the descriptor of a file that will be unlinked; the unlinker closes it."""
        return self._open.pop(serial, None)

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    # -- in a worker thread -------------------------------------------------------------------

    def read(
        self, record: ChunkRecord, start: int, end: int, ahead: Sequence[int] = ()
    ) -> tuple[Buffer, int]:
        """Read and verify; also starts to read from the disk what is likely to come next.

        That is the rest of the chunk, and the chunks with the serials *ahead*: a sequential
        reader finds them in the page cache, and the disk is busy while bytes are verified.

        Returns: the bytes, and an open descriptor for `keep`.
        Raises: BadBlock; OSError.
        """
        descriptor = os.open(self.path(record.serial), os.O_RDWR | os.O_CLOEXEC)
        try:
            at, stop = _aligned(record, start, end)
            data = bytearray(stop - at)
            os.posix_fadvise(descriptor, at, CHUNK_BYTES - at, os.POSIX_FADV_WILLNEED)
            for serial in ahead:
                self._start_to_read(serial)
            got = os.preadv(descriptor, [data], at)
            if got < len(data):
                raise BadBlock(at + got - got % BLOCK_BYTES)
            return _verified(record, start, end, at, data), descriptor
        except BaseException:
            os.close(descriptor)
            raise

    def _start_to_read(self, serial: int) -> None:
        try:
            descriptor = os.open(self.path(serial), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return  # whoever reads it will be told
        try:
            os.posix_fadvise(descriptor, 0, CHUNK_BYTES, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)

    def write(self, serial: int, start: int, data: Buffer) -> Stored:
        """Write a whole page (or the short last one) at *start* within the chunk."""
        descriptor = self._create(serial)
        try:
            digests = block_digests(data)
            _pwrite_all(descriptor, data, start)
            return Stored(len(data), digests, descriptor, self.free_bytes())
        except BaseException:
            os.close(descriptor)
            raise

    def overwrite(
        self, record: ChunkRecord, page: int, start: int, data: Buffer
    ) -> Stored:
        """Change bytes of a valid page in place, possibly making it longer.

        *start*, within the page, is at most the page's length.  The index must already say that
        the page is invalid: until the caller publishes the new checksums, nothing may read it.

        Raises: BadBlock: the bytes that were there were damaged; OSError.
        """
        length, digests = record.lengths[page], record.digests(page)
        assert start <= length
        end = start + len(data)
        low = start - start % BLOCK_BYTES
        high = min(-(-end // BLOCK_BYTES) * BLOCK_BYTES, max(length, end))
        page_start = page * PAGE_BYTES
        descriptor = os.open(self.path(record.serial), os.O_RDWR | os.O_CLOEXEC)
        try:
            blocks = bytearray(high - low)
            old = min(high, length) - low
            if old > 0:
                view = memoryview(blocks)[:old]
                if os.preadv(descriptor, [view], page_start + low) < old:
                    raise BadBlock(page_start + low)
                bad = first_bad_block(record, page_start + low, view)
                view.release()
                if bad is not None:
                    raise BadBlock(bad)
            blocks[start - low : end - low] = data
            _pwrite_all(descriptor, data, page_start + start)
            fresh = block_digests(blocks)
            first = low // BLOCK_BYTES * 8
            merged = digests[:first] + fresh + digests[first + len(fresh) :]
            return Stored(max(length, end), merged, descriptor, self.free_bytes())
        except BaseException:
            os.close(descriptor)
            raise

    def unlink(self, doomed: Iterable[tuple[int, int | None]]) -> None:
        """Remove files given as (serial, descriptor to close); one that is gone is fine."""
        for serial, descriptor in doomed:
            with contextlib.suppress(OSError):
                os.unlink(self.path(serial))
            if descriptor is not None:
                os.close(descriptor)

    def sweep(self, known: array[int], generation: int) -> int:
        """Remove files of earlier generations that no record names; *known* is sorted.

        Returns: how many.
        """
        removed = 0
        for folder in range(256):
            try:
                names = os.listdir(f"{self._chunks}/{folder:02x}")
            except FileNotFoundError:
                continue
            for name in names:
                try:
                    serial = int(name, 16)
                except ValueError:
                    serial = 0
                if serial >> GENERATION_SHIFT >= generation:
                    continue
                at = bisect_left(known, serial)
                if at == len(known) or known[at] != serial:
                    os.unlink(f"{self._chunks}/{folder:02x}/{name}")
                    removed += 1
        return removed

    def probe(self) -> int:
        """Write, sync and remove a page.  Returns: free bytes.  Raises: OSError."""
        path = f"{self._chunks}/probe"
        os.makedirs(self._chunks, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _pwrite_all(descriptor, bytes(PAGE_BYTES), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
            os.unlink(path)
        return self.free_bytes()

    def free_bytes(self) -> int:
        status = os.statvfs(self._chunks)
        return status.f_bavail * status.f_frsize

    def free_bytes_wanted(self) -> int:
        """What we leave to others on this file system, and to its own well-being."""
        status = os.statvfs(self._chunks)
        return min(1 << 30, status.f_blocks * status.f_frsize // 20)

    def _create(self, serial: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        path = self.path(serial)
        try:
            return os.open(path, flags, 0o600)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            return os.open(path, flags, 0o600)


def _pwrite_all(descriptor: int, data: Buffer, start: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, start)
        view, start = view[written:], start + written
