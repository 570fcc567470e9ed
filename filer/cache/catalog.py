"""What is cached: the index, the eviction queues over it, and who may change which chunk.

Owns the one view of the index that the event loop has, including its absence: when the index
fails, the catalog is *offline*, answers "not cached" to everything and remembers what must not be
believed when the index is back.  Does not own chunk files (``files.py``), nor when to evict, when
to probe and what to tell anybody (``pages.py``).

Nothing here awaits: every method leaves catalog, queues and index agreeing with each other.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import structlog
import trio

from filer import metrics
from filer.cache.eviction import Eviction
from filer.cache.files import GENERATION_SHIFT
from filer.cache.index import ChunkIndex, IndexFailed
from filer.cache.layout import KEY_BYTES, ChunkRecord, fingerprint
from filer.cache.opening import Loaded
from filer.errors import Corrupt

UNRECORDED_MAX = 100_000

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Writer:
    """The right to change one chunk; shared by those who wait for it."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    users: int = 0
    is_void: bool = False
    """The chunk was dropped since: the writer's bytes are from before, publish nothing."""


class Catalog:
    """Keys are packed as ``layout.chunk_key`` does; a prefix of one names a file or an inode."""

    def __init__(
        self, *, on_failed: Callable[[str], None], on_discarded: Callable[[int], None]
    ) -> None:
        """*on_failed* is called with the reason when the catalog goes offline by itself,
        *on_discarded* with the serial of each chunk file that nothing names any more."""
        self._on_failed = on_failed
        self._on_discarded = on_discarded
        self._index: ChunkIndex | None = None
        self._policy = Eviction()
        self._slot_keys = bytearray()
        self._generation = 0
        self._serials = itertools.count()
        self._pinned: dict[int, int] = {}
        self._writers: dict[bytes, Writer] = {}
        self._unrecorded: set[bytes] = set()
        """Prefixes of chunks whose invalidation did not reach the index."""
        self.damaged_records = 0

    # -- being there --------------------------------------------------------------------------

    @property
    def is_online(self) -> bool:
        return self._index is not None

    @property
    def is_complete(self) -> bool:
        """Whether the index lacks no invalidation."""
        return not self._unrecorded

    @property
    def generation(self) -> int:
        return self._generation

    def attach(self, loaded: Loaded) -> None:
        """Go online with an index that was just opened, and make good what was missed."""
        assert self._index is None
        self._index, self._policy = loaded.index, loaded.policy
        self._slot_keys, self._generation = loaded.slot_keys, loaded.generation
        self._serials, self._pinned = itertools.count(), {}
        unrecorded, self._unrecorded = self._unrecorded, set()
        for prefix in unrecorded:
            self.drop(prefix)
        self._show_bytes()

    def detach(self) -> ChunkIndex | None:
        """Go offline; the caller closes the index."""
        index, self._index = self._index, None
        for writer in self._writers.values():
            writer.is_void = True
        self._writers.clear()
        return index

    def check_writable(self) -> None:
        """Raises: IndexFailed."""
        if self._index is not None:
            try:
                self._index.next_generation()  # a write like any other; numbers may be skipped
            except IndexFailed as error:
                self._failed(error)
                raise

    # -- looking up ---------------------------------------------------------------------------

    @property
    def cached_bytes(self) -> int:
        return self._policy.bytes

    @property
    def chunk_count(self) -> int:
        return self._policy.count

    def get(self, key: bytes) -> ChunkRecord | None:
        if self._index is None:
            return None
        try:
            return self._index.get(key)
        except Corrupt as error:
            self.damaged_records += 1
            metrics.CACHE_CORRUPT.inc()
            log.warning("index record damaged", chunk=key.hex(), error=str(error))
            self._record((), [key])
        except IndexFailed as error:
            self._failed(error)
        return None

    def scan(self, prefix: bytes, start: bytes = b"") -> list[tuple[bytes, ChunkRecord | None]]:
        """The records under *prefix* from *start* on; ``None``: a damaged one."""
        if self._index is None:
            return []
        try:
            return list(self._index.scan(prefix, start))
        except IndexFailed as error:
            self._failed(error)
            return []

    def touch(self, record: ChunkRecord, now_s: float) -> None:
        """The chunk was used."""
        self._policy.touch(record.slot, now_s)

    # -- changing -----------------------------------------------------------------------------

    @asynccontextmanager
    async def changing(self, key: bytes) -> AsyncIterator[Writer]:
        """Be the only one to change the chunk; the writer may come void from the wait."""
        writer = self._writers.setdefault(key, Writer())
        writer.users += 1
        try:
            async with writer.lock:
                yield writer
        finally:
            writer.users -= 1
            if not writer.users and self._writers.get(key) is writer:
                del self._writers[key]

    def is_changing(self, key: bytes) -> bool:
        return key in self._writers

    @contextmanager
    def pinned(self, record: ChunkRecord) -> Iterator[None]:
        """Keep the chunk from being evicted."""
        pinned, slot = self._pinned, record.slot
        pinned[slot] = pinned.get(slot, 0) + 1
        try:
            yield
        finally:
            pinned[slot] -= 1
            if not pinned[slot]:
                del pinned[slot]

    def create(self, key: bytes, now_s: float) -> ChunkRecord:
        """A record for a chunk that has none; the caller publishes or abandons it."""
        slot = self._policy.add(fingerprint(key), 0, now_s)
        at = slot * KEY_BYTES
        if at == len(self._slot_keys):
            self._slot_keys += key
        else:
            self._slot_keys[at : at + KEY_BYTES] = key
        return ChunkRecord.empty(self._generation << GENERATION_SHIFT | next(self._serials), slot)

    def abandon(self, record: ChunkRecord) -> None:
        if record.serial >> GENERATION_SHIFT == self._generation:  # else its slot is gone, too
            self._policy.remove(record.slot)
        self._on_discarded(record.serial)

    def publish(self, key: bytes, record: ChunkRecord) -> None:
        """The one record of the chunk from now on."""
        if self._record([(key, record)], ()):
            self._policy.resize(record.slot, record.valid_bytes)
            self._show_bytes()

    def void_pages(self, key: bytes, record: ChunkRecord, pages: Sequence[int]) -> None:
        """*pages* of the chunk are not valid any more; a chunk without any is dropped."""
        for page in pages:
            record = record.with_page(page, 0, b"")
        if record.valid_bytes:
            self.publish(key, record)
        else:
            self._remove([(key, record)])

    def drop(self, prefix: bytes, start: bytes = b"") -> None:
        """Void every chunk under *prefix* (from *start* on), cached or being written."""
        if self._index is None:
            self._remember(prefix)
        for key in [k for k in self._writers if k.startswith(prefix) and k >= start]:
            self._writers.pop(key).is_void = True
        self._remove(self.scan(prefix, start))

    def evict(self, bytes_wanted: int, count_wanted: int, count_max: int) -> int:
        """Drop what the policy can best do without.  Returns: bytes freed."""
        victims = self._policy.victims(
            bytes_wanted, self._pinned, count_wanted=count_wanted, count_max=count_max)
        freed, doomed = 0, []
        for slot in victims:
            key = bytes(self._slot_keys[slot * KEY_BYTES : (slot + 1) * KEY_BYTES])
            record = self.get(key)
            if record is not None and record.slot == slot:
                freed += record.valid_bytes
                doomed.append((key, record.serial))
        if not self._record((), [key for key, _ in doomed]):
            return 0
        for _, serial in doomed:
            self._on_discarded(serial)
        self._show_bytes()
        return freed

    # -- inside -------------------------------------------------------------------------------

    def _record(
        self, puts: Sequence[tuple[bytes, ChunkRecord]], deletes: Sequence[bytes]
    ) -> bool:
        """Change the index; ``False``: it failed, and what it lacks is remembered."""
        if self._index is not None:
            try:
                self._index.change(puts, deletes)
                return True
            except IndexFailed as error:
                self._failed(error)
        self._remember(*deletes, *(key for key, _ in puts))
        return False

    def _remove(self, doomed: Sequence[tuple[bytes, ChunkRecord | None]]) -> None:
        if not doomed:
            return
        for key, _ in doomed:
            writer = self._writers.pop(key, None)
            if writer is not None:
                writer.is_void = True
        if self._record((), [key for key, _ in doomed]):
            for _, record in doomed:
                if record is not None:
                    self._policy.remove(record.slot)
                    self._on_discarded(record.serial)
            self._show_bytes()

    def _remember(self, *prefixes: bytes) -> None:
        """These must not be believed when the index is back."""
        self._unrecorded.update(prefixes)
        if len(self._unrecorded) > UNRECORDED_MAX:
            self._unrecorded = {b""}

    def _show_bytes(self) -> None:
        metrics.CACHE_BYTES.set(self._policy.bytes)

    def _failed(self, error: IndexFailed) -> None:
        index = self.detach()
        if index is not None:
            index.close()
        self._on_failed(str(error))
