"""The one way to read clean bytes: from the page store, from memory, or from the core filer.

Owns fetches: one per page however many ask (single-flight), their order (a client's demand before
read-ahead before warming), the bytes they may have in flight, and the pages in memory that are on
their way to the page store.  Does not own what is cached (``pages.py``), how far to fetch ahead
(``read_ahead.py``), nor dirty bytes: the caller lays those over what it gets.

A fetch belongs to the reader's own tasks, not to who asked first: a cancelled client harms no
other.  Clients get their bytes as soon as they are in memory; the SSD is written afterwards.

Every reply carries the file's attributes.  If they are not those of the version the caller knows,
nothing is cached and the caller gets `Changed`.  Bytes that are about to be changed here (a flush,
a truncation, a drop) void the fetches and memory pages that hold older ones; who waits for those
fetches asks again.
"""

from __future__ import annotations

import enum
import weakref
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog
import trio

from filer import metrics
from filer.cache.layout import PAGE_BYTES, FileKey
from filer.cache.pacing import Pacing
from filer.cache.pages import Buffer, PageStore
from filer.cache.read_ahead import ReadAhead
from filer.core_filer.base import Attributes, CoreFiler, CoreVersion, Handle
from filer.errors import FilerError, TryAgain
from filer.ids import DataVersion, InodeId
from filer.settings import ReadAheadSettings

STORE_WORKERS = 4
MEMORY_BYTES_MAX = 32 << 20
"""Pages fetched and not yet on the SSD; read-ahead pauses above this, demand goes on."""
DEMAND_SHARE = 4
"""This part (a quarter) of the bytes in flight is kept free for clients' demand."""
WARM_FETCHES_MAX = 16
"""Per call of `warm`."""
UNREAD_MAX = 65_536
"""Pages fetched ahead whose use is still awaited; older ones count as unused."""
SEQUENCE_TASKS_MAX = 4
SEQUENCES_SEEN_MAX = 4096
AHEAD_QUEUE_MAX = 4096
WARM_STEP_BYTES = 256 << 20

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CleanFile:
    """A file in the core filer, as the caller last verified it."""

    inode: InodeId
    handle: Handle
    data_version: DataVersion
    """Under which its pages are cached."""
    version: CoreVersion
    """What the core filer must still say; ``version.size`` is the size there."""

    @property
    def key(self) -> FileKey:
        return FileKey(self.inode, self.data_version)


class Changed(FilerError):
    """The core filer's file is not the version the caller knows; nothing was cached."""

    def __init__(self, attributes: Attributes) -> None:
        self.attributes = attributes
        super().__init__(f"file {attributes.fileid} was changed in the core filer")


class Cause(enum.Enum):
    """Why a page is fetched; also its priority."""

    DEMAND = "demand"
    READ_AHEAD = "read_ahead"
    WARM = "warm"


@dataclass(frozen=True, slots=True)
class ReaderStatistics:
    in_flight_bytes: int
    memory_bytes: int
    queued_demand: int
    queued_ahead: int
    fetched_bytes: dict[str, int]
    """By cause."""
    read_ahead_used_bytes: int
    streams: int


class _State(enum.Enum):
    QUEUED = 1
    RUNNING = 2
    FETCHED = 3
    FAILED = 4


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Fetch:
    """One page on its way from the core filer to the SSD."""

    file: CleanFile
    page: int
    cause: Cause
    state: _State = _State.QUEUED
    data: Buffer = b""
    error: Exception | None = None
    is_void: bool = False
    """The bytes changed since it was asked for: neither keep nor hand out."""
    fetched: trio.Event = field(default_factory=trio.Event)
    """Set when it is FETCHED, FAILED or void."""
    stored: trio.Event = field(default_factory=trio.Event)
    """Set when nothing more will happen to it."""

    @property
    def start(self) -> int:
        return self.page * PAGE_BYTES

    @property
    def end(self) -> int:
        return min(self.start + PAGE_BYTES, self.file.version.size)

    @property
    def key(self) -> tuple[FileKey, int]:
        return self.file.key, self.page

    def is_queued_for(self, cause: Cause) -> bool:
        return self.state is _State.QUEUED and self.cause is cause and not self.is_void

    def result(self, file: CleanFile) -> Buffer | None:
        """What it brought, for a caller who knows *file*; ``None``: ask again.

        Bytes are good for every caller who names the same data version: they were those of the
        version that was asked for, and what changed since would have voided them.  A change that
        was noticed against another version says nothing about the caller's.
        """
        if self.is_void:
            return None
        if self.error is None:
            return self.data
        if isinstance(self.error, Changed) and not self.file.version.same_data(file.version):
            return None
        raise self.error


@dataclass(slots=True, eq=False)
class _Watch:
    """A read that awaits several pieces, and must not mix older with newer ones."""

    inode: InodeId
    start: int
    end: int
    is_void: bool = False


ResolveNext = Callable[[InodeId, int], Awaitable[list[CleanFile]]]
"""(inode, count) → up to *count* files that come after it in a numbered sequence."""


class Reader:
    def __init__(
        self, core: CoreFiler, pages: PageStore, settings: ReadAheadSettings, *,
        resolve_next: ResolveNext | None = None,
    ) -> None:
        self._core = core
        self._pages = pages
        self._settings = settings
        self._resolve_next = resolve_next
        self._read_ahead = ReadAhead(
            window_bytes_max=settings.window_bytes_max, small_file_bytes=settings.small_file_bytes
        )
        self._fetches: dict[InodeId, dict[tuple[DataVersion, int], _Fetch]] = {}
        """Queued, running, and fetched but not yet on the SSD, by (data version, page)."""
        self._queues: dict[Cause, deque[weakref.ref[_Fetch]]] = {
            cause: deque() for cause in Cause
        }
        """In order; an entry outlives its fetch if that was wanted more urgently elsewhere, and
        must not keep its bytes alive until it comes to the front."""
        self._dispatch_work = trio.Event()
        self._pacing = Pacing()
        self._in_flight_bytes = self._memory_bytes = 0
        self._to_store: deque[_Fetch] = deque()
        self._store_work = trio.Event()
        self._watches: set[_Watch] = set()
        self._displaceable_bytes = 0
        self._displaceable: OrderedDict[_Fetch, None] = OrderedDict()
        """Fetched pages that the SSD did not take; they stay in memory while there is room."""
        self._unread: OrderedDict[tuple[FileKey, int], int] = OrderedDict()
        """Pages fetched ahead that nobody has read yet → bytes."""
        self._sequence_seen: OrderedDict[FileKey, None] = OrderedDict()
        self._sequence_tasks = 0
        self._nursery: trio.Nursery | None = None
        self._fetched_bytes = dict.fromkeys(Cause, 0)
        self._used_bytes = 0
        self._hits = metrics.CACHE_LOOKUPS.labels("pages", "hit")
        self._misses = metrics.CACHE_LOOKUPS.labels("pages", "miss")
        self._fetched_counters = {
            cause: metrics.FETCHED_BYTES.labels(cause.value) for cause in Cause
        }
        pages.subscribe(self._on_change)

    # -- life ---------------------------------------------------------------------------------

    async def run(
        self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Fetch, store and look after the page store.  For ever, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._dispatch, nursery)
                for _ in range(STORE_WORKERS):
                    nursery.start_soon(self._store)
                nursery.start_soon(self._pages.run)
                task_status.started()
        finally:
            self._nursery = None

    def statistics(self) -> ReaderStatistics:
        return ReaderStatistics(
            self._in_flight_bytes, self._memory_bytes, len(self._queues[Cause.DEMAND]),
            len(self._queues[Cause.READ_AHEAD]) + len(self._queues[Cause.WARM]),
            {cause.value: count for cause, count in self._fetched_bytes.items()},
            self._used_bytes, self._read_ahead.stream_count,
        )

    # -- reading ------------------------------------------------------------------------------

    async def read(self, file: CleanFile, start: int, end: int) -> Buffer:
        """The clean bytes ``[start, end)``, cut at ``file.version.size``.

        What is returned is true at the moment of return; later flushes may change it.  Do not
        write into it: other readers may hold the same bytes.

        Raises: Changed; TryAgain, Refused: from the core filer.
        """
        end = min(end, file.version.size)
        if start >= end:
            return b""
        key = file.key
        pages = range(start // PAGE_BYTES, (end - 1) // PAGE_BYTES + 1)
        if not self._is_fetching(key, pages):
            data = self._pages.read_nowait(key, start, end)
            if data is not None:
                self._look_ahead(file, start, end)
                self._count_use(key, pages, was_hit=True)
                return data
        # What the client waits for is asked for first, and in the same step what lies ahead.
        was_hit = not self._demand(file, pages, start, end)
        self._look_ahead(file, start, end)
        while True:
            if not self._is_fetching(key, pages):
                data = await self._pages.read(key, start, end)
                if data is not None:
                    break
            watch = _Watch(file.inode, start, end)
            self._watches.add(watch)
            try:
                if self._demand(file, pages, start, end):
                    was_hit = False
                data = await self._gather(file, pages, start, end)
            finally:
                self._watches.discard(watch)
            if data is not None and not watch.is_void:
                break
        self._count_use(key, pages, was_hit=was_hit)
        return data

    async def warm(self, file: CleanFile) -> int:
        """Fetch every missing page of the file onto the SSD, after all other fetches.

        Returns: bytes fetched by this call; what others were fetching already does not count.
        Raises: Changed; TryAgain, Refused.
        """
        return await self._warm(file, Cause.WARM, file.version.size)

    def forget(self, inode: InodeId) -> None:
        """The file changed or is gone: fetches of it are void, its streams forgotten."""
        self._on_change(inode, 0, None)
        self._read_ahead.forget(inode)

    # -- reading: parts -----------------------------------------------------------------------

    def _is_fetching(self, key: FileKey, pages: range) -> bool:
        fetches = self._fetches.get(key.inode)
        return fetches is not None and any((key.version, page) in fetches for page in pages)

    def _find(self, key: FileKey, page: int) -> _Fetch | None:
        fetches = self._fetches.get(key.inode)
        return None if fetches is None else fetches.get((key.version, page))

    def _remove(self, fetch: _Fetch) -> None:
        inode = fetch.file.inode
        fetches = self._fetches[inode]
        del fetches[fetch.file.data_version, fetch.page]
        if not fetches:
            del self._fetches[inode]

    def _demand(self, file: CleanFile, pages: range, start: int, end: int) -> bool:
        """Have every missing page of the range fetched before all read-ahead.

        Returns: whether some bytes are neither on the SSD nor in memory.
        """
        missing = self._pages.missing(file.key, start, end)
        must_wait = False
        for page in pages:
            is_fetching = self._find(file.key, page) is not None
            if page not in missing and not is_fetching:
                continue
            if not is_fetching and self._unread.pop((file.key, page), 0):
                self._read_ahead.on_lost(file.inode)
            fetch = self._want(file, page, Cause.DEMAND)
            must_wait |= fetch.state is not _State.FETCHED
        if must_wait:
            self._dispatch_work.set()
        return must_wait

    async def _gather(
        self, file: CleanFile, pages: range, start: int, end: int
    ) -> Buffer | None:
        """The range in one piece; ``None``: something went away meanwhile, start over."""
        fetches = {page: self._find(file.key, page) for page in pages}
        parts: list[Buffer] = []
        for page, fetch in fetches.items():
            low, high = max(start, page * PAGE_BYTES), min(end, (page + 1) * PAGE_BYTES)
            if fetch is None:
                part = await self._pages.read(file.key, low, high)
                if part is None:
                    return None
            else:
                await fetch.fetched.wait()
                part = fetch.result(file)
                if part is None:
                    return None
                if high - low < len(part):
                    part = memoryview(part)[low - fetch.start : high - fetch.start]
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _count_use(self, key: FileKey, pages: range, *, was_hit: bool) -> None:
        (self._hits if was_hit else self._misses).inc()
        if self._unread:
            for page in pages:
                count = self._unread.pop((key, page), 0)
                if count:
                    self._used_bytes += count
                    metrics.FETCHED_USED_BYTES.inc(count)

    # -- ahead of the readers -----------------------------------------------------------------

    def _look_ahead(self, file: CleanFile, start: int, end: int) -> None:
        size = file.version.size
        ranges = self._read_ahead.on_read(file.inode, start, end, size, trio.current_time())
        for low, high in ranges:
            if len(self._queues[Cause.READ_AHEAD]) >= AHEAD_QUEUE_MAX:
                break
            for page in self._pages.missing(file.key, low, high):
                self._want(file, page, Cause.READ_AHEAD)
        if ranges:
            self._dispatch_work.set()
        if start == 0:
            self._follow_sequence(file)

    def _follow_sequence(self, file: CleanFile) -> None:
        """A file is read from its start: fetch the ones that follow it in its sequence."""
        if (
            self._resolve_next is None or not self._settings.sequence_files
            or self._nursery is None or file.key in self._sequence_seen
            or self._sequence_tasks >= SEQUENCE_TASKS_MAX
        ):
            return
        self._sequence_seen[file.key] = None
        if len(self._sequence_seen) > SEQUENCES_SEEN_MAX:
            self._sequence_seen.popitem(last=False)
        self._sequence_tasks += 1
        self._nursery.start_soon(self._fetch_next_files, file.inode, self._resolve_next)

    async def _fetch_next_files(self, inode: InodeId, resolve_next: ResolveNext) -> None:
        try:
            for file in await resolve_next(inode, self._settings.sequence_files):
                limit = min(file.version.size, self._settings.window_bytes_max)
                await self._warm(file, Cause.READ_AHEAD, limit)
        except FilerError as error:
            log.debug("next file of a sequence not fetched", inode=inode, error=str(error))
        finally:
            self._sequence_tasks -= 1

    async def _warm(self, file: CleanFile, cause: Cause, limit: int) -> int:
        fetched = 0
        pending: deque[tuple[_Fetch, bool]] = deque()

        async def finish_oldest() -> int:
            fetch, is_ours = pending.popleft()
            await fetch.stored.wait()
            data = fetch.result(file)
            # None: the bytes just changed; whoever reads them fetches them.
            return len(data) if data is not None and is_ours else 0

        for low in range(0, limit, WARM_STEP_BYTES):
            if self._pages.degraded:
                raise TryAgain(f"the cache disk takes no pages: {self._pages.degraded}")
            for page in self._pages.missing(file.key, low, min(low + WARM_STEP_BYTES, limit)):
                is_ours = self._find(file.key, page) is None
                pending.append((self._want(file, page, cause), is_ours))
                self._dispatch_work.set()
                if len(pending) >= WARM_FETCHES_MAX:
                    fetched += await finish_oldest()
        while pending:
            fetched += await finish_oldest()
        await trio.lowlevel.checkpoint()
        return fetched

    # -- fetches ------------------------------------------------------------------------------

    def _want(self, file: CleanFile, page: int, cause: Cause) -> _Fetch:
        """The one fetch of the page, new or already under way."""
        fetch = self._find(file.key, page)
        if fetch is not None:
            if fetch.state is _State.QUEUED:
                fetch.file = file
                if cause is Cause.DEMAND and fetch.cause is not cause:
                    fetch.cause = cause
                    self._queues[cause].append(weakref.ref(fetch))
            return fetch
        fetch = _Fetch(file, page, cause)
        self._fetches.setdefault(file.inode, {})[file.data_version, page] = fetch
        self._queues[cause].append(weakref.ref(fetch))
        return fetch

    async def _dispatch(self, nursery: trio.Nursery) -> None:
        """Start queued fetches as far as the bytes in flight allow.

        One per scheduling round: trio shuffles tasks that become runnable together, and pages
        should be asked for in the order in which they will be read.
        """
        while True:
            fetch = self._next_queued()
            if fetch is None:
                self._dispatch_work = trio.Event()
                await self._dispatch_work.wait()
            else:
                fetch.state = _State.RUNNING
                self._in_flight_bytes += fetch.end - fetch.start
                nursery.start_soon(self._fetch, fetch)
                await trio.lowlevel.checkpoint()

    def _next_queued(self) -> _Fetch | None:
        limit = self._settings.in_flight_bytes_max
        ahead_limit = min(limit - limit // DEMAND_SHARE, self._pacing.in_flight_bytes_wanted)
        if self._memory_bytes - self._displaceable_bytes >= MEMORY_BYTES_MAX:
            ahead_limit = 0  # the SSD does not keep up
        for cause, queue in self._queues.items():
            room = limit if cause is Cause.DEMAND else ahead_limit
            fetch = None
            while queue and ((fetch := queue[0]()) is None or not fetch.is_queued_for(cause)):
                queue.popleft()
            if queue and (self._in_flight_bytes + PAGE_BYTES <= room or not self._in_flight_bytes):
                queue.popleft()
                return fetch
        return None

    async def _fetch(self, fetch: _Fetch) -> None:
        count = fetch.end - fetch.start
        sent = self._pacing.on_sent(trio.current_time())
        try:
            data, attributes = await self._read_core(fetch.file, fetch.start, fetch.end)
        except trio.Cancelled:
            self._fail(fetch, TryAgain("the reader is stopping"))
            raise
        except Exception as error:
            # Whoever waits gets it; nobody may wait for read-ahead.
            if not isinstance(error, FilerError):
                log.exception("fetch failed", inode=fetch.file.inode, page=fetch.page)
            self._fail(fetch, error)
        else:
            self._pacing.on_received(sent, len(data), trio.current_time())
            self._succeed(fetch, data, attributes)
        finally:
            self._in_flight_bytes -= count
        self._dispatch_work.set()

    def _succeed(self, fetch: _Fetch, data: Buffer, attributes: Attributes) -> None:
        self._fetched_bytes[fetch.cause] += len(data)
        self._fetched_counters[fetch.cause].inc(len(data))
        if fetch.is_void:
            return
        if not attributes.version.same_data(fetch.file.version):
            self._fail(fetch, Changed(attributes))
            return
        fetch.data, fetch.state = data, _State.FETCHED
        if fetch.cause is Cause.READ_AHEAD:
            self._unread[fetch.key] = len(data)
            if len(self._unread) > UNREAD_MAX:
                self._unread.popitem(last=False)
        self._memory_bytes += len(data)
        fetch.fetched.set()
        if self._memory_bytes - self._displaceable_bytes > 2 * MEMORY_BYTES_MAX:
            # Demand outruns the SSD: pass through what does not fit.
            self._leave_memory(fetch)
            fetch.stored.set()
            return
        self._displace()
        self._to_store.append(fetch)
        self._store_work.set()

    def _fail(self, fetch: _Fetch, error: Exception) -> None:
        if fetch.is_void:
            return
        fetch.error = error
        fetch.state = _State.FAILED
        self._remove(fetch)
        fetch.fetched.set()
        fetch.stored.set()

    def _void(self, fetch: _Fetch) -> None:
        """Neither keep nor hand out what it brings; who waits for it asks again."""
        fetch.is_void = True
        self._leave_memory(fetch)
        fetch.fetched.set()
        fetch.stored.set()

    def _on_change(self, target: FileKey | InodeId, start: int, end: int | None) -> None:
        """The page store tells that bytes are about to change."""
        inode = target.inode if isinstance(target, FileKey) else target
        for fetch in list(self._fetches.get(inode, {}).values()):
            if fetch.start + PAGE_BYTES > start and (end is None or fetch.start < end):
                self._void(fetch)
        for watch in self._watches:
            if watch.inode == inode and watch.end > start and (end is None or watch.start < end):
                watch.is_void = True

    async def _read_core(
        self, file: CleanFile, start: int, end: int
    ) -> tuple[Buffer, Attributes]:
        step = self._core.io_bytes_max
        if end - start <= step:
            return await self._read_piece(file, start, end)
        pieces: dict[int, tuple[Buffer, Attributes] | Exception] = {}

        async def read_piece(low: int) -> None:
            try:
                pieces[low] = await self._read_piece(file, low, min(low + step, end))
            except Exception as error:
                pieces[low] = error

        async with trio.open_nursery() as nursery:
            for low in range(start, end, step):
                nursery.start_soon(read_piece, low)
        parts = []
        for _, piece in sorted(pieces.items()):
            if isinstance(piece, Exception):
                raise piece
            data, attributes = piece
            if not attributes.version.same_data(file.version):
                return b"", attributes
            parts.append(data)
        return b"".join(parts), attributes

    async def _read_piece(
        self, file: CleanFile, start: int, end: int
    ) -> tuple[Buffer, Attributes]:
        """At most ``io_bytes_max``; no bytes if the attributes are not those of *file*."""
        parts = []
        while True:
            result = await self._core.read(file.handle, start, end)
            attributes = result.attributes or await self._core.getattr(file.handle)
            if not attributes.version.same_data(file.version):
                return b"", attributes
            if not result.data:
                raise TryAgain(f"the core filer returned nothing at {start} of file "
                               f"{attributes.fileid}, which has {attributes.size} bytes")
            parts.append(result.data)
            start += len(result.data)
            if start >= end:
                return parts[0] if len(parts) == 1 else b"".join(parts), attributes

    # -- onto the SSD -------------------------------------------------------------------------

    async def _store(self) -> None:
        """One of the workers that write fetched pages to the page store."""
        while True:
            while not self._to_store:
                await self._store_work.wait()
            fetch = self._to_store.popleft()
            if not self._to_store:
                self._store_work = trio.Event()
            if not fetch.is_void:
                await self._pages.write(fetch.file.key, fetch.page, fetch.data)
            if not fetch.is_void:
                if self._pages.missing(fetch.file.key, fetch.start, fetch.end):
                    self._displaceable[fetch] = None
                    self._displaceable_bytes += len(fetch.data)
                else:
                    self._leave_memory(fetch)
                fetch.stored.set()
            self._displace()
            self._dispatch_work.set()

    def _displace(self) -> None:
        while self._memory_bytes > MEMORY_BYTES_MAX and self._displaceable:
            self._leave_memory(next(iter(self._displaceable)))

    def _leave_memory(self, fetch: _Fetch) -> None:
        self._remove(fetch)
        if fetch.state is _State.FETCHED:
            self._memory_bytes -= len(fetch.data)
        if fetch in self._displaceable:
            del self._displaceable[fetch]
            self._displaceable_bytes -= len(fetch.data)
