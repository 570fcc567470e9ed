"""The store of clean pages on the local SSD.

Owns which pages of which file state are cached, their checksums, the space they take, and what
happens when the cache disk fails.  Does not own fetching (``reader.py``), dirty bytes (the
write-behind log) or the choice of victims (``eviction.py``).

Clean pages are never precious: whatever is wrong with one, the answer is "not cached", a counter
and an alarm, never an error for the reader.

Rules that keep it true (``docs/cache.md`` traces the interleavings):

- The index is read and changed only on the event loop, in transactions without an await.
- A page is invalid in the index before its bytes are touched, and valid again after they and
  their checksums are known; a crash between the two leaves it invalid.
- One writer per chunk at a time.  A reader in a worker thread holds no lock: it looks the record
  up again afterwards, and an unchanged record means unchanged bytes.
- A record that could not be made invalid (the index failed) is remembered, and the store answers
  nothing until that invalidation is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from filer import metrics
from filer.cache.catalog import Catalog, Writer
from filer.cache.eviction import bytes_to_evict
from filer.cache.files import BadBlock, Buffer, ChunkFiles, Stored
from filer.cache.index import IndexFailed
from filer.cache.layout import (
    CHUNK_BYTES,
    PAGE_BYTES,
    PAGES_PER_CHUNK,
    ChunkRecord,
    FileKey,
    chunk_key,
    file_prefix,
    inode_prefix,
)
from filer.cache.opening import CHUNKS_MAX, close_cleanly, load, lock_directory, write_state
from filer.errors import TryAgain
from filer.ids import InodeId
from filer.settings import CacheSettings

__all__ = ["PAGE_BYTES", "Buffer", "FileKey", "PageStore", "PageStoreStatistics"]

FORMAT = 1
CHUNKS_AHEAD = 3
"""12 MiB on their way from the disk keep an SSD busy while 1 MiB is verified and sent."""
STARTED_MAX = 64
READERS_MAX, WRITERS_MAX = 16, 4
"""Worker threads; apart, so that a slow write never holds up a read."""
PROBE_S_MIN, PROBE_S_MAX = 1.0, 60.0
EVICT_AT_ONCE = 512
"""Chunks per step of an eviction, each step one transaction on the event loop (5 ms)."""

Listener = Callable[[FileKey | InodeId, int, int | None], None]
"""Called as (key or inode, start, end) before those bytes change, and again afterwards if that
took an await; end ``None``: to the end."""

_Part = tuple[bytes, ChunkRecord, int, int]
"""(key, record, start, end): bytes of one chunk that a read wants."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PageStoreStatistics:
    cached_bytes: int
    capacity_bytes: int
    chunk_count: int
    corrupt_pages: int
    evicted_bytes: int
    writes_dropped: int
    """Pages not kept because the cache disk was full or failing."""
    degraded: str | None


class PageStore:
    def __init__(self, directory: Path, settings: CacheSettings, boot_id: str) -> None:
        """Use `open`."""
        self._directory = directory
        self._settings = settings
        self._boot_id = boot_id
        self._files = ChunkFiles(directory)
        self._catalog = Catalog(on_failed=self._index_failed, on_discarded=self._discard)
        self._lock_descriptor: int | None = None
        self._free_bytes = self._free_bytes_wanted = 0
        self._incoming_bytes = 0
        self._room_lock = trio.Lock()
        self._garbage: deque[tuple[int, int | None]] = deque()
        """Serials and open descriptors of files to unlink."""
        self._orphans_of: array[int] | None = None
        """The serials in use at the start, until files with others have been removed."""
        self._work = trio.Event()
        self._degraded: str | None = None
        self._probe_at = 0.0
        self._probe_s = PROBE_S_MIN
        self._listeners: list[Listener] = []
        self._corrupt_pages = self._evicted_bytes = self._writes_dropped = 0
        self._started: OrderedDict[int, None] = OrderedDict()
        self._readers_limiter = trio.CapacityLimiter(READERS_MAX)
        self._writers_limiter = trio.CapacityLimiter(WRITERS_MAX)

    # -- life ---------------------------------------------------------------------------------

    @classmethod
    async def open(cls, directory: Path, settings: CacheSettings, *, boot_id: str) -> PageStore:
        """Open the cache warm if its pages can be trusted, else empty.

        Pages survive the death of the process.  After a crash of the operating system (the
        *boot_id* differs and no clean shutdown was recorded) all are dropped, because neither
        they nor the index were synced.  A disk that fails leaves the store degraded.

        Raises: TryAgain: another process uses *directory*.
        """
        store = cls(directory, settings, boot_id)
        try:
            await store._load()
        except (IndexFailed, OSError) as error:
            store._fail(f"cannot open the cache: {error}")
        return store

    async def run(self) -> None:
        """Unlink what was dropped, and probe a failing disk until it works again.  For ever."""
        while True:
            with trio.move_on_at(self._probe_at if self._degraded else float("inf")):
                await self._work.wait()
            self._work = trio.Event()
            await self._unlink_garbage()
            if self._orphans_of is not None:
                await self._sweep()
            if self._degraded and trio.current_time() >= self._probe_at:
                await self._probe()

    async def close(self) -> None:
        """Make the cache durable and record a clean shutdown."""
        with trio.CancelScope(shield=True):
            await self._unlink_garbage()
            index = self._catalog.detach()
            if index is not None:
                boot_id = self._boot_id if self._catalog.is_complete else ""
                await trio.to_thread.run_sync(close_cleanly, self._directory, index, boot_id)
            self._files.close()
            if self._lock_descriptor is not None:
                os.close(self._lock_descriptor)
                self._lock_descriptor = None

    def subscribe(self, listener: Listener) -> None:
        """Have *listener* told of bytes that are about to change or be dropped as untrue."""
        self._listeners.append(listener)

    @property
    def degraded(self) -> str | None:
        """Why the cache disk takes no pages at present."""
        return self._degraded

    def statistics(self) -> PageStoreStatistics:
        return PageStoreStatistics(
            self._catalog.cached_bytes, self._settings.capacity_bytes, self._catalog.chunk_count,
            self._corrupt_pages + self._catalog.damaged_records, self._evicted_bytes,
            self._writes_dropped, self._degraded,
        )

    # -- reading ------------------------------------------------------------------------------

    async def read(self, key: FileKey, start: int, end: int) -> Buffer | None:
        """The bytes ``[start, end)``; ``None`` unless all of them are valid and verified.

        What is returned is what the store holds at the moment of return.  Do not change it.
        """
        while True:
            data = self.read_nowait(key, start, end)
            if data is not None:
                return data
            parts = self._lookup(key, start, end)
            if parts is None:
                return None
            data = await self._read_in_thread(parts, self._ahead_of(key, end))
            if data is not None and parts == self._lookup(key, start, end):
                self._touch(parts)
                return data

    def read_nowait(self, key: FileKey, start: int, end: int) -> Buffer | None:
        """As `read`, but ``None`` also if the bytes would have to come from the disk itself."""
        assert 0 <= start < end
        parts = self._lookup(key, start, end)
        if parts is None:
            return None
        data = self._read_cached(parts)
        if data is not None:
            self._touch(parts)
        return data

    def missing(self, key: FileKey, start: int, end: int) -> list[int]:
        """Indexes of the pages that are not valid for all their bytes within ``[start, end)``."""
        pages: list[int] = []
        for chunk, low, high in _spans(start, end):
            record = self._catalog.get(chunk_key(key, chunk))
            for page in range(low // PAGE_BYTES, (high - 1) // PAGE_BYTES + 1):
                wanted = min(high - page * PAGE_BYTES, PAGE_BYTES)
                if record is None or record.lengths[page] < wanted:
                    pages.append(chunk * PAGES_PER_CHUNK + page)
        return pages

    def cached_bytes(self, key: FileKey) -> int:
        return sum(r.valid_bytes for _, r in self._catalog.scan(file_prefix(key)) if r is not None)

    # -- writing ------------------------------------------------------------------------------

    async def write(self, key: FileKey, page: int, data: Buffer) -> None:
        """Keep a whole page, or the short one at the end of the file.

        A disk that is full or failing loses the page, not the caller.
        """
        assert 0 < len(data) <= PAGE_BYTES
        packed = chunk_key(key, page // PAGES_PER_CHUNK)
        async with self._catalog.changing(packed) as writer:
            await self._write_page(writer, packed, page % PAGES_PER_CHUNK, data)

    async def update(self, key: FileKey, start: int, data: Buffer, size: int) -> None:
        """Bytes at *start* were flushed to the core filer, whose file is now *size* long.

        Pages that *data* covers (to the end of the file) become valid, valid ones are changed
        in place, others stay invalid.  When this returns no reader gets the older bytes; so
        call it before the dirty bytes are forgotten.
        """
        if not data:
            return
        self._tell(key, start, start + len(data))
        view = memoryview(data)
        for chunk, low, high in _spans(start, start + len(data)):
            packed = chunk_key(key, chunk)
            base = chunk * CHUNK_BYTES
            async with self._catalog.changing(packed) as writer:
                for page in range(low // PAGE_BYTES, (high - 1) // PAGE_BYTES + 1):
                    page_start = page * PAGE_BYTES
                    first, last = max(low, page_start), min(high, page_start + PAGE_BYTES)
                    piece = view[base + first - start : base + last - start]
                    is_covered = first == page_start and (
                        last == page_start + PAGE_BYTES or base + last >= size
                    )
                    if is_covered:
                        await self._write_page(writer, packed, page, piece)
                    else:
                        await self._change_page(writer, packed, page, first - page_start, piece)
            if writer.is_void or not self._catalog.is_online:
                self._catalog.drop(packed)  # what this chunk holds now may lack our bytes
        self._tell(key, start, start + len(data))

    def drop_from(self, key: FileKey, start: int) -> None:
        """The file was cut at *start*: that page and all after it are void."""
        self._tell(key, start, None)
        chunk, page = divmod(start // PAGE_BYTES, PAGES_PER_CHUNK)
        boundary = chunk_key(key, chunk)
        record = self._catalog.get(boundary) if page else None
        if record is None or self._catalog.is_changing(boundary):
            self._catalog.drop(file_prefix(key), boundary)
            return
        self._catalog.void_pages(boundary, record, range(page, PAGES_PER_CHUNK))
        self._catalog.drop(file_prefix(key), chunk_key(key, chunk + 1))

    def drop(self, key: FileKey) -> None:
        """Forget this state of the file."""
        self._tell(key, 0, None)
        self._catalog.drop(file_prefix(key))

    def drop_inode(self, inode: InodeId) -> None:
        """Forget all states of the file."""
        self._tell(inode, 0, None)
        self._catalog.drop(inode_prefix(inode))

    async def evict(self, bytes_wanted: int, *, count_wanted: int = 0) -> int:
        """Drop clean chunks the policy can best do without.  Returns: bytes freed."""
        freed, count = 0, self._catalog.chunk_count
        while True:
            before = self._catalog.chunk_count
            freed += self._catalog.evict(
                bytes_wanted - freed, count_wanted - (count - before), EVICT_AT_ONCE)
            await self._unlink_garbage()
            done = count - self._catalog.chunk_count
            if (freed >= bytes_wanted and done >= count_wanted) or (
                before == self._catalog.chunk_count
            ):
                break
        self._evicted_bytes += freed
        self._free_bytes += freed
        metrics.CACHE_EVICTIONS.inc(freed)
        return freed

    # -- reading: parts -----------------------------------------------------------------------

    def _lookup(self, key: FileKey, start: int, end: int) -> list[_Part] | None:
        """The records that cover ``[start, end)``."""
        parts = []
        for chunk, low, high in _spans(start, end):
            packed = chunk_key(key, chunk)
            record = self._catalog.get(packed)
            if record is None or not record.covers(low, high):
                return None
            parts.append((packed, record, low, high))
        return parts

    def _touch(self, parts: list[_Part]) -> None:
        for _, record, _, _ in parts:
            self._catalog.touch(record, trio.current_time())

    def _read_cached(self, parts: list[_Part]) -> Buffer | None:
        data = []
        for packed, record, low, high in parts:
            try:
                piece = self._files.read_nowait(record, low, high)
            except BadBlock as bad:
                self._drop_damaged(packed, record, bad)
                return None
            if piece is None:
                return None
            data.append(piece)
        return data[0] if len(data) == 1 else b"".join(data)

    def _ahead_of(self, key: FileKey, end: int) -> list[int]:
        """Serials of the chunks after *end* that nobody has started to read from the disk."""
        chunk = (end - 1) // CHUNK_BYTES
        ahead = []
        for following in range(chunk + 1, chunk + 1 + CHUNKS_AHEAD):
            record = self._catalog.get(chunk_key(key, following))
            if record is not None and record.serial not in self._started:
                ahead.append(record.serial)
                self._started[record.serial] = None
        while len(self._started) > STARTED_MAX:
            self._started.popitem(last=False)
        return ahead

    async def _read_in_thread(self, parts: list[_Part], ahead: list[int]) -> Buffer | None:
        """``None``: it went wrong and was dealt with; look the records up again."""
        data = []
        for packed, record, low, high in parts:
            with self._catalog.pinned(record):
                try:
                    piece, descriptor = await trio.to_thread.run_sync(
                        self._files.read, record, low, high, ahead,
                        limiter=self._readers_limiter
                    )
                except BadBlock as bad:
                    self._drop_damaged(packed, record, bad)
                    return None
                except OSError as error:
                    if self._catalog.get(packed) == record:
                        self._drop_damaged(packed, record, error)
                        if not isinstance(error, FileNotFoundError):
                            self._fail(f"reading a page: {error.strerror}")
                    return None
            if self._catalog.get(packed) == record:
                self._files.keep(record.serial, descriptor)
            else:
                os.close(descriptor)
            data.append(piece)
        return data[0] if len(data) == 1 else b"".join(data)

    def _drop_damaged(self, packed: bytes, record: ChunkRecord, error: Exception) -> None:
        """Make invalid what turned out to be damaged, unless it was changed meanwhile."""
        if self._catalog.get(packed) != record:
            return
        if isinstance(error, BadBlock):
            pages = [error.offset // PAGE_BYTES]
        else:
            pages = [page for page, length in enumerate(record.lengths) if length]
        self._count_corrupt(len(pages))
        log.warning("cached page damaged", chunk=packed.hex(), pages=pages, error=str(error))
        self._catalog.void_pages(packed, record, pages)

    # -- writing: parts -----------------------------------------------------------------------

    async def _write_page(
        self, writer: Writer, packed: bytes, page: int, data: Buffer
    ) -> None:
        """Write a page that need not be valid before."""
        if writer.is_void:
            return
        record = self._catalog.get(packed)
        if record is not None and record.lengths[page]:
            self._catalog.publish(packed, record.with_page(page, 0, b""))
        if self._degraded or not await self._make_room(len(data)):
            self._writes_dropped += 1
            return
        if writer.is_void:
            return
        # Looked up again: making room may have taken this very chunk, which is not pinned yet.
        record = self._catalog.get(packed)
        is_new = record is None
        if record is None:
            record = self._catalog.create(packed, trio.current_time())
        serial, stored = record.serial, None
        self._incoming_bytes += len(data)
        try:
            with self._catalog.pinned(record):
                stored = await self._in_writer_thread(
                    lambda: self._files.write(serial, page * PAGE_BYTES, data)
                )
        finally:
            self._incoming_bytes -= len(data)
            if is_new and (stored is None or writer.is_void):
                self._catalog.abandon(record)
            elif writer.is_void:
                self._discard(serial)  # again: the thread may have made the file anew
        self._finish(writer, packed, record, page, stored)

    async def _change_page(
        self, writer: Writer, packed: bytes, page: int, start: int, data: Buffer
    ) -> None:
        """Change bytes in the middle of a page; only a valid one can stay valid."""
        record = None if writer.is_void else self._catalog.get(packed)
        if record is None or not record.lengths[page] or start > record.lengths[page]:
            return
        before = record
        self._catalog.publish(packed, record.with_page(page, 0, b""))
        if self._degraded:
            self._writes_dropped += 1
            return
        try:
            with self._catalog.pinned(before):
                stored = await self._in_writer_thread(
                    lambda: self._files.overwrite(before, page, start, data)
                )
        except BadBlock:
            self._count_corrupt(1)
            return
        self._finish(writer, packed, before, page, stored)

    def _finish(
        self, writer: Writer, packed: bytes, record: ChunkRecord, page: int,
        stored: Stored | None,
    ) -> None:
        """The bytes are on the disk: say so in the index."""
        if stored is None:
            return
        self._free_bytes = stored.free_bytes
        if writer.is_void:
            os.close(stored.descriptor)
            return
        self._files.keep(record.serial, stored.descriptor)
        # While this writer held the chunk, only damage can have changed other pages' validity.
        current = self._catalog.get(packed) or record
        self._catalog.publish(packed, current.with_page(page, stored.length, stored.digests))

    async def _in_writer_thread(self, function: Callable[[], Stored]) -> Stored | None:
        """``None``: the cache disk would not take it.  Raises: BadBlock."""
        try:
            return await trio.to_thread.run_sync(function, limiter=self._writers_limiter)
        except OSError as error:
            self._writes_dropped += 1
            self._fail(f"writing a page: {error.strerror}")
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                await self.evict(max(self._catalog.cached_bytes // 50, 2 * CHUNK_BYTES))
            return None

    async def _make_room(self, incoming_bytes: int) -> bool:
        if incoming_bytes > self._settings.capacity_bytes:
            return False
        if self._room_wanted(incoming_bytes) == (0, 0):
            return True
        async with self._room_lock:  # one eviction makes room for all who wait
            wanted, count_wanted = self._room_wanted(incoming_bytes)
            if wanted or count_wanted:
                await self.evict(wanted, count_wanted=count_wanted)
        if self._free_bytes < self._free_bytes_wanted + incoming_bytes:
            self._fail("cache disk full: other files leave no room")
            return False
        used = self._catalog.cached_bytes + self._incoming_bytes
        return used + incoming_bytes <= self._settings.capacity_bytes

    def _room_wanted(self, incoming_bytes: int) -> tuple[int, int]:
        """Bytes and chunks to evict before *incoming_bytes* may come."""
        settings = self._settings
        wanted = bytes_to_evict(
            self._catalog.cached_bytes + self._incoming_bytes, incoming_bytes,
            capacity_bytes=settings.capacity_bytes, high_water=settings.high_water,
            low_water=settings.low_water,
        )
        shortage = self._free_bytes_wanted + incoming_bytes - self._free_bytes
        too_many = self._catalog.chunk_count >= CHUNKS_MAX
        return max(wanted, shortage, 0), CHUNKS_MAX // 100 if too_many else 0

    def _count_corrupt(self, pages: int) -> None:
        self._corrupt_pages += pages
        metrics.CACHE_CORRUPT.inc(pages)

    def _tell(self, target: FileKey | InodeId, start: int, end: int | None) -> None:
        for listener in self._listeners:
            listener(target, start, end)

    # -- failure and recovery -----------------------------------------------------------------

    def _fail(self, reason: str) -> None:
        """Take no pages until a probe succeeds; what is cached is still read."""
        if self._degraded is None:
            log.warning("cache degraded: reads pass through", reason=reason)
            self._probe_s = PROBE_S_MIN
            metrics.CACHE_DEGRADED.set(1)
        self._degraded = reason
        self._probe_at = trio.current_time() + self._probe_s
        self._work.set()

    def _index_failed(self, reason: str) -> None:
        """The catalog is offline: nothing is answered until the index was opened anew."""
        self._fail(reason)
        with contextlib.suppress(OSError):
            # A process that dies now must not leave its successor an index that lacks our
            # latest invalidations.
            write_state(self._directory, "", is_clean=False)

    async def _probe(self) -> None:
        try:
            self._free_bytes = await trio.to_thread.run_sync(self._files.probe)
            if not self._catalog.is_online:
                await self._load(is_trusted=True)
            self._catalog.check_writable()
            if self._free_bytes < self._free_bytes_wanted + PAGE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except (IndexFailed, TryAgain) as error:
            self._degraded = str(error)
        except OSError as error:
            self._degraded = f"cache disk: {error.strerror}"
        else:
            self._degraded = None
            metrics.CACHE_DEGRADED.set(0)
            log.info("cache works again")
            return
        self._probe_s = min(2 * self._probe_s, PROBE_S_MAX)
        self._probe_at = trio.current_time() + self._probe_s

    def _discard(self, serial: int) -> None:
        self._garbage.append((serial, self._files.release(serial)))
        self._work.set()

    async def _unlink_garbage(self) -> None:
        while self._garbage:
            doomed = [self._garbage.popleft() for _ in range(min(len(self._garbage), 1000))]
            with trio.CancelScope(shield=True):  # or the batch would be lost, with descriptors
                await trio.to_thread.run_sync(self._files.unlink, doomed)

    async def _sweep(self) -> None:
        """After a start: remove files that no record names, and what was set aside."""
        known, self._orphans_of = self._orphans_of, None
        assert known is not None
        generation = self._catalog.generation

        def sweep() -> None:
            shutil.rmtree(self._directory / "discarded", ignore_errors=True)
            with contextlib.suppress(OSError):
                self._files.sweep(known, generation)

        await trio.to_thread.run_sync(sweep)

    async def _load(self, *, is_trusted: bool = False) -> None:
        """Take the lock and open the index.  *is_trusted*: whatever the state file says.

        Raises: TryAgain, OSError, IndexFailed.
        """
        if self._lock_descriptor is None:
            self._lock_descriptor = await lock_directory(self._directory)
        loaded = await trio.to_thread.run_sync(
            lambda: load(self._directory, self._files, self._boot_id, is_trusted=is_trusted)
        )
        self._free_bytes, self._free_bytes_wanted = loaded.free_bytes, loaded.free_bytes_wanted
        self._orphans_of = loaded.serials
        self._catalog.attach(loaded)
        self._work.set()


def _spans(start: int, end: int) -> Sequence[tuple[int, int, int]]:
    """``[start, end)`` as (chunk, start within it, end within it)."""
    first = start // CHUNK_BYTES
    base = first * CHUNK_BYTES
    if end <= base + CHUNK_BYTES:
        return ((first, start - base, end - base),) if start < end else ()
    return [
        (chunk, max(start - chunk * CHUNK_BYTES, 0), min(end - chunk * CHUNK_BYTES, CHUNK_BYTES))
        for chunk in range(first, (end - 1) // CHUNK_BYTES + 1)
    ]
