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
import itertools
import os
import shutil
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import trio

from filer import metrics
from filer.cache.eviction import Eviction, bytes_to_evict
from filer.cache.files import GENERATION_SHIFT, BadBlock, Buffer, ChunkFiles, Stored
from filer.cache.index import ChunkIndex, IndexFailed
from filer.cache.layout import (
    CHUNK_BYTES,
    KEY_BYTES,
    PAGE_BYTES,
    PAGES_PER_CHUNK,
    ChunkRecord,
    FileKey,
    chunk_key,
    file_prefix,
    fingerprint,
    inode_prefix,
)
from filer.cache.opening import CHUNKS_MAX, close_cleanly, load, lock_directory, write_state
from filer.errors import Corrupt, Misconfigured
from filer.ids import InodeId
from filer.settings import CacheSettings

__all__ = ["PAGE_BYTES", "Buffer", "FileKey", "PageStore", "PageStoreStatistics"]

FORMAT = 1
READERS_MAX, WRITERS_MAX = 16, 4
"""Worker threads; apart, so that a slow write never holds up a read."""
PROBE_S_MIN, PROBE_S_MAX = 1.0, 60.0
UNRECORDED_MAX = 100_000

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


@dataclass(slots=True, eq=False)
class _Writer:
    """The right to change one chunk; shared by those who wait for it."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    users: int = 0
    is_void: bool = False
    """The chunk was dropped while its file was being written: publish nothing."""


class PageStore:
    def __init__(self, directory: Path, settings: CacheSettings, boot_id: str) -> None:
        """Use `open`."""
        self._directory = directory
        self._settings = settings
        self._boot_id = boot_id
        self._files = ChunkFiles(directory)
        self._lock_descriptor: int | None = None
        self._index: ChunkIndex | None = None
        self._policy = Eviction()
        self._slot_keys = bytearray()
        self._generation = 0
        self._serials = itertools.count()
        self._free_bytes = self._free_bytes_wanted = 0
        self._incoming_bytes = 0
        self._writers: dict[bytes, _Writer] = {}
        self._pinned: dict[int, int] = {}
        self._unrecorded: set[bytes] = set()
        """Prefixes of chunks whose invalidation did not reach the index."""
        self._garbage: deque[tuple[int, int | None]] = deque()
        self._orphans_of: array[int] | None = None
        """The serials in use at the start, until files with others have been removed."""
        self._work = trio.Event()
        self._degraded: str | None = None
        self._probe_at = 0.0
        self._probe_s = PROBE_S_MIN
        self._listeners: list[Listener] = []
        self._corrupt_pages = self._evicted_bytes = self._writes_dropped = 0
        self._readers_limiter = trio.CapacityLimiter(READERS_MAX)
        self._writers_limiter = trio.CapacityLimiter(WRITERS_MAX)

    # -- life ---------------------------------------------------------------------------------

    @classmethod
    async def open(cls, directory: Path, settings: CacheSettings, *, boot_id: str) -> PageStore:
        """Open the cache warm if its pages can be trusted, else empty.

        Pages survive the death of the process.  After a crash of the operating system (the
        *boot_id* differs and no clean shutdown was recorded) all are dropped, because neither
        they nor the index were synced.  A disk that fails leaves the store degraded.

        Raises: Misconfigured: another process uses *directory*.
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
            index, self._index = self._index, None
            if index is not None:
                boot_id = "" if self._unrecorded else self._boot_id
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
            self._policy.bytes, self._settings.capacity_bytes, self._policy.count,
            self._corrupt_pages, self._evicted_bytes, self._writes_dropped, self._degraded,
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
            data = await self._read_in_thread(parts)
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
            record = self._get(chunk_key(key, chunk))
            for page in range(low // PAGE_BYTES, (high - 1) // PAGE_BYTES + 1):
                wanted = min(high - page * PAGE_BYTES, PAGE_BYTES)
                if record is None or record.lengths[page] < wanted:
                    pages.append(chunk * PAGES_PER_CHUNK + page)
        return pages

    def cached_bytes(self, key: FileKey) -> int:
        return sum(r.valid_bytes for _, r in self._scan(file_prefix(key)) if r is not None)

    # -- writing ------------------------------------------------------------------------------

    async def write(self, key: FileKey, page: int, data: Buffer) -> None:
        """Keep a whole page, or the short one at the end of the file.

        A disk that is full or failing loses the page, not the caller.
        """
        assert 0 < len(data) <= PAGE_BYTES
        packed = chunk_key(key, page // PAGES_PER_CHUNK)
        async with self._changing(packed) as writer:
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
            if self._index is None:
                self._remember(packed)
                continue
            base = chunk * CHUNK_BYTES
            async with self._changing(packed) as writer:
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
        self._tell(key, start, start + len(data))

    def drop_from(self, key: FileKey, start: int) -> None:
        """The file was cut at *start*: that page and all after it are void."""
        self._tell(key, start, None)
        chunk, page = divmod(start // PAGE_BYTES, PAGES_PER_CHUNK)
        boundary = chunk_key(key, chunk)
        record = self._get(boundary) if page else None
        if record is None or boundary in self._writers:
            self._drop_prefix(file_prefix(key), boundary)
            return
        for later in range(page, PAGES_PER_CHUNK):
            record = record.with_page(later, 0, b"")
        self._apply([(boundary, record)], [])
        self._drop_prefix(file_prefix(key), chunk_key(key, chunk + 1))

    def drop(self, key: FileKey) -> None:
        """Forget this state of the file."""
        self._tell(key, 0, None)
        self._drop_prefix(file_prefix(key))

    def drop_inode(self, inode: InodeId) -> None:
        """Forget all states of the file."""
        self._tell(inode, 0, None)
        self._drop_prefix(inode_prefix(inode))

    async def evict(self, bytes_wanted: int, *, count_wanted: int = 0) -> int:
        """Drop clean chunks the policy can best do without.  Returns: bytes freed."""
        index = self._index
        if index is None:
            return 0
        victims = self._policy.victims(bytes_wanted, self._pinned, count_wanted=count_wanted)
        freed, doomed = 0, []
        for slot in victims:
            packed = bytes(self._slot_keys[slot * KEY_BYTES : (slot + 1) * KEY_BYTES])
            record = self._get(packed)
            if record is not None and record.slot == slot:
                freed += record.valid_bytes
                doomed.append((packed, record))
        if not self._record((), [packed for packed, _ in doomed]):
            return 0
        for _, record in doomed:
            self._discard(record.serial)
        self._evicted_bytes += freed
        self._free_bytes += freed
        metrics.CACHE_EVICTIONS.inc(freed)
        self._show_bytes()
        await self._unlink_garbage()
        return freed

    # -- reading: parts -----------------------------------------------------------------------

    def _lookup(self, key: FileKey, start: int, end: int) -> list[_Part] | None:
        """The records that cover ``[start, end)``."""
        parts = []
        for chunk, low, high in _spans(start, end):
            packed = chunk_key(key, chunk)
            record = self._get(packed)
            if record is None or not record.covers(low, high):
                return None
            parts.append((packed, record, low, high))
        return parts

    def _touch(self, parts: list[_Part]) -> None:
        for _, record, _, _ in parts:
            self._policy.touch(record.slot, trio.current_time())

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

    async def _read_in_thread(self, parts: list[_Part]) -> Buffer | None:
        """``None``: it went wrong and was dealt with; look the records up again."""
        data = []
        for packed, record, low, high in parts:
            with self._pin(record.slot):
                try:
                    piece, descriptor = await trio.to_thread.run_sync(
                        self._files.read, record, low, high, limiter=self._readers_limiter
                    )
                except BadBlock as bad:
                    self._drop_damaged(packed, record, bad)
                    return None
                except OSError as error:
                    if self._get(packed) == record:
                        self._drop_damaged(packed, record, error)
                        if not isinstance(error, FileNotFoundError):
                            self._fail(f"reading a page: {error.strerror}")
                    return None
            if self._get(packed) == record:
                self._files.keep(record.serial, descriptor)
            else:
                os.close(descriptor)
            data.append(piece)
        return data[0] if len(data) == 1 else b"".join(data)

    def _drop_damaged(self, packed: bytes, record: ChunkRecord, error: Exception) -> None:
        """Make invalid what turned out to be damaged, unless it was changed meanwhile."""
        if self._get(packed) != record:
            return
        if isinstance(error, BadBlock):
            pages = [error.offset // PAGE_BYTES]
        else:
            pages = [page for page, length in enumerate(record.lengths) if length]
        self._corrupt_pages += len(pages)
        metrics.CACHE_CORRUPT.inc(len(pages))
        log.warning("cached page damaged", chunk=packed.hex(), pages=pages, error=str(error))
        remaining = record
        for page in pages:
            remaining = remaining.with_page(page, 0, b"")
        self._apply([(packed, remaining)], [])

    # -- writing: parts -----------------------------------------------------------------------

    @asynccontextmanager
    async def _changing(self, packed: bytes) -> AsyncIterator[_Writer]:
        """Be the only one to change the chunk.

        If it is dropped while this waits, the writer comes void: its bytes are from before.
        """
        writer = self._writers.setdefault(packed, _Writer())
        writer.users += 1
        try:
            async with writer.lock:
                yield writer
        finally:
            writer.users -= 1
            if not writer.users and self._writers.get(packed) is writer:
                del self._writers[packed]

    async def _write_page(
        self, writer: _Writer, packed: bytes, page: int, data: Buffer
    ) -> None:
        """Write a page that need not be valid before."""
        if writer.is_void:
            return
        record = self._get(packed)
        if record is not None and record.lengths[page]:
            self._publish(packed, record.with_page(page, 0, b""))
        if self._degraded or not await self._make_room(len(data)):
            self._writes_dropped += 1
            return
        if writer.is_void:
            return
        # Looked up again: making room may have taken this very chunk, which is not pinned yet.
        record = self._get(packed)
        is_new = record is None
        if record is None:
            serial = self._generation << GENERATION_SHIFT | next(self._serials)
            record = ChunkRecord.empty(serial, self._add_slot(packed))
        serial, policy = record.serial, self._policy
        stored = None
        self._incoming_bytes += len(data)
        try:
            with self._pin(record.slot):
                stored = await self._in_writer_thread(
                    lambda: self._files.write(serial, page * PAGE_BYTES, data)
                )
        finally:
            self._incoming_bytes -= len(data)
            if is_new and (stored is None or writer.is_void) and policy is self._policy:
                policy.remove(record.slot)
            if writer.is_void or (is_new and stored is None):
                self._discard(serial)
        self._finish(writer, packed, record, page, stored)

    async def _change_page(
        self, writer: _Writer, packed: bytes, page: int, start: int, data: Buffer
    ) -> None:
        """Change bytes in the middle of a page; only a valid one can stay valid."""
        record = None if writer.is_void else self._get(packed)
        if record is None or not record.lengths[page] or start > record.lengths[page]:
            return
        before, invalid = record, record.with_page(page, 0, b"")
        self._publish(packed, invalid)
        if self._degraded or writer.is_void:
            self._writes_dropped += 1
            return
        try:
            with self._pin(record.slot):
                stored = await self._in_writer_thread(
                    lambda: self._files.overwrite(before, page, start, data)
                )
        except BadBlock:
            self._corrupt_pages += 1
            metrics.CACHE_CORRUPT.inc()
            return
        current = self._get(packed)
        self._finish(writer, packed, invalid if current is None else current, page, stored)

    def _finish(
        self, writer: _Writer, packed: bytes, record: ChunkRecord, page: int,
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
        # Only drops and damage can have changed the record while this writer held the chunk.
        current = self._get(packed) or record
        self._publish(packed, current.with_page(page, stored.length, stored.digests))

    async def _in_writer_thread(self, function: Callable[[], Stored]) -> Stored | None:
        """``None``: the cache disk would not take it.  Raises: BadBlock."""
        try:
            return await trio.to_thread.run_sync(function, limiter=self._writers_limiter)
        except OSError as error:
            self._writes_dropped += 1
            self._fail(f"writing a page: {error.strerror}")
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                await self.evict(max(self._policy.bytes // 50, 2 * CHUNK_BYTES))
            return None

    async def _make_room(self, incoming_bytes: int) -> bool:
        settings = self._settings
        if incoming_bytes > settings.capacity_bytes:
            return False
        wanted = bytes_to_evict(
            self._policy.bytes + self._incoming_bytes, incoming_bytes,
            capacity_bytes=settings.capacity_bytes, high_water=settings.high_water,
            low_water=settings.low_water,
        )
        shortage = self._free_bytes_wanted + incoming_bytes - self._free_bytes
        count_wanted = CHUNKS_MAX // 100 if self._policy.count >= CHUNKS_MAX else 0
        if max(wanted, shortage, count_wanted) <= 0:
            return True
        await self.evict(max(wanted, shortage), count_wanted=count_wanted)
        if self._free_bytes < self._free_bytes_wanted + incoming_bytes:
            self._fail("cache disk full: other files leave no room")
            return False
        used = self._policy.bytes + self._incoming_bytes
        return used + incoming_bytes <= settings.capacity_bytes

    def _add_slot(self, packed: bytes) -> int:
        slot = self._policy.add(fingerprint(packed), 0, trio.current_time())
        at = slot * KEY_BYTES
        if at == len(self._slot_keys):
            self._slot_keys += packed
        else:
            self._slot_keys[at : at + KEY_BYTES] = packed
        return slot

    @contextmanager
    def _pin(self, slot: int) -> Iterator[None]:
        """Keep the chunk from being evicted."""
        pinned = self._pinned
        pinned[slot] = pinned.get(slot, 0) + 1
        try:
            yield
        finally:
            pinned[slot] -= 1
            if not pinned[slot]:
                del pinned[slot]

    # -- index --------------------------------------------------------------------------------

    def _get(self, packed: bytes) -> ChunkRecord | None:
        if self._index is None:
            return None
        try:
            return self._index.get(packed)
        except Corrupt as error:
            self._corrupt_pages += 1
            metrics.CACHE_CORRUPT.inc()
            log.warning("index record damaged", chunk=packed.hex(), error=str(error))
            self._record((), [packed])
        except IndexFailed as error:
            self._go_offline(str(error))
        return None

    def _scan(
        self, prefix: bytes, start: bytes = b""
    ) -> list[tuple[bytes, ChunkRecord | None]]:
        if self._index is None:
            return []
        try:
            return list(self._index.scan(prefix, start))
        except IndexFailed as error:
            self._go_offline(str(error))
            return []

    def _record(
        self, puts: Sequence[tuple[bytes, ChunkRecord]], deletes: Sequence[bytes]
    ) -> bool:
        """Change the index; ``False``: it failed, and the store is offline until this is made
        good."""
        if self._index is not None:
            try:
                self._index.change(puts, deletes)
                return True
            except IndexFailed as error:
                self._go_offline(str(error))
        self._remember(*deletes, *(packed for packed, _ in puts))
        return False

    def _publish(self, packed: bytes, record: ChunkRecord) -> None:
        if self._record([(packed, record)], ()):
            self._policy.resize(record.slot, record.valid_bytes)
            self._show_bytes()

    def _apply(
        self, kept: list[tuple[bytes, ChunkRecord]],
        doomed: list[tuple[bytes, ChunkRecord | None]],
    ) -> None:
        """Record pages that became void; chunks of which nothing is left go."""
        doomed = doomed + [item for item in kept if not item[1].valid_bytes]
        kept = [item for item in kept if item[1].valid_bytes]
        for packed, _ in doomed:
            writer = self._writers.pop(packed, None)
            if writer is not None:
                writer.is_void = True
        if not self._record(kept, [packed for packed, _ in doomed]):
            return
        for _, record in kept:
            self._policy.resize(record.slot, record.valid_bytes)
        for _, gone in doomed:
            if gone is not None:
                self._policy.remove(gone.slot)
                self._discard(gone.serial)
        self._show_bytes()

    def _drop_prefix(self, prefix: bytes, start: bytes = b"") -> None:
        """Void every chunk under *prefix* (from *start* on), written or being written."""
        if self._index is None:
            self._remember(prefix)
        for packed in [p for p in self._writers if p.startswith(prefix) and p >= start]:
            self._writers.pop(packed).is_void = True
        self._apply([], self._scan(prefix, start))

    def _remember(self, *prefixes: bytes) -> None:
        """These must not be answered from the index when it is back."""
        self._unrecorded.update(prefixes)
        if len(self._unrecorded) > UNRECORDED_MAX:
            self._unrecorded = {b""}

    def _discard(self, serial: int) -> None:
        self._garbage.append((serial, self._files.release(serial)))
        self._work.set()

    def _show_bytes(self) -> None:
        metrics.CACHE_BYTES.set(self._policy.bytes)

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

    def _go_offline(self, reason: str) -> None:
        """The index failed: answer nothing until it was opened anew."""
        self._fail(reason)
        index, self._index = self._index, None
        if index is not None:
            index.close()
        for writer in self._writers.values():
            writer.is_void = True
        self._writers.clear()
        with contextlib.suppress(OSError):
            # A process that dies now must not leave its successor an index that lacks our
            # latest invalidations.
            write_state(self._directory, "", is_clean=False)

    async def _probe(self) -> None:
        try:
            free_bytes = await trio.to_thread.run_sync(self._files.probe)
            self._free_bytes = free_bytes
            if self._index is None:
                await self._load(is_trusted=True)
            else:
                self._index.next_generation()  # a write like any other; numbers may be skipped
            if self._free_bytes < self._free_bytes_wanted + PAGE_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except IndexFailed as error:
            self._go_offline(str(error))
        except Misconfigured as error:
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

    async def _unlink_garbage(self) -> None:
        while self._garbage:
            doomed = [self._garbage.popleft() for _ in range(min(len(self._garbage), 1000))]
            with trio.CancelScope(shield=True):  # or the batch would be lost, with descriptors
                await trio.to_thread.run_sync(self._files.unlink, doomed)

    async def _sweep(self) -> None:
        """After a start: remove files that no record names, and what was set aside."""
        known, self._orphans_of = self._orphans_of, None
        assert known is not None
        generation = self._generation

        def sweep() -> None:
            shutil.rmtree(self._directory / "discarded", ignore_errors=True)
            with contextlib.suppress(OSError):
                self._files.sweep(known, generation)

        await trio.to_thread.run_sync(sweep)

    async def _load(self, *, is_trusted: bool = False) -> None:
        """Take the lock and open the index.  *is_trusted*: whatever the state file says.

        Raises: Misconfigured, OSError, IndexFailed.
        """
        if self._lock_descriptor is None:
            self._lock_descriptor = await lock_directory(self._directory)
        loaded = await trio.to_thread.run_sync(
            lambda: load(self._directory, self._files, self._boot_id, is_trusted=is_trusted)
        )
        self._index, self._policy = loaded.index, loaded.policy
        self._slot_keys, self._generation = loaded.slot_keys, loaded.generation
        self._serials, self._pinned = itertools.count(), {}
        self._free_bytes, self._free_bytes_wanted = loaded.free_bytes, loaded.free_bytes_wanted
        self._orphans_of = loaded.serials
        self._work.set()
        unrecorded, self._unrecorded = self._unrecorded, set()
        for prefix in unrecorded:
            self._drop_prefix(prefix)
        self._show_bytes()

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
