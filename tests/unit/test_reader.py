"""The reader over a modelled link and a page store in memory, in virtual time."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from filer.cache.layout import FileKey
from filer.cache.pages import PageStore
from filer.cache.reader import MEMORY_BYTES_MAX, Changed, CleanFile, Reader, ResolveNext
from filer.core_filer.base import Attributes, CoreFiler, CoreVersion, Handle, ReadResult
from filer.errors import Refused, TryAgain
from filer.ids import DataVersion, InodeId
from filer.settings import ReadAheadSettings

MIB = 1 << 20
GIB = 1 << 30


class Pages:
    """A page store that needs no disk and no thread, so that virtual time can run."""

    def __init__(self) -> None:
        self.pages: dict[tuple[FileKey, int], bytes] = {}
        self.listeners: list[Callable[..., None]] = []
        self.degraded: str | None = None
        self.write_s = 0.002
        self.writing = 0

    def subscribe(self, listener: Callable[..., None]) -> None:
        self.listeners.append(listener)

    async def run(self) -> None:
        await trio.sleep_forever()

    def missing(self, key: FileKey, start: int, end: int) -> list[int]:
        return [page for page in range(start // MIB, (end - 1) // MIB + 1)
                if len(self.pages.get((key, page), b"")) < min(end - page * MIB, MIB)]

    def read_nowait(self, key: FileKey, start: int, end: int) -> bytes | None:
        return None

    async def read(self, key: FileKey, start: int, end: int) -> bytes | None:
        await trio.lowlevel.checkpoint()
        if self.missing(key, start, end):
            return None
        first = start // MIB
        data = b"".join(self.pages[key, page] for page in range(first, (end - 1) // MIB + 1))
        return data[start - first * MIB:end - first * MIB]

    async def write(self, key: FileKey, page: int, data: bytes) -> None:
        self.writing += 1
        await trio.sleep(self.write_s)
        self.writing -= 1
        if not self.degraded:
            self.pages[key, page] = bytes(data)

    def tell(self, target: FileKey | InodeId, start: int, end: int | None) -> None:
        for listener in self.listeners:
            listener(target, start, end)


@dataclass
class File:
    size: int
    fill: int = 1
    mtime_ns: int = 1

    def attributes(self, fileid: int) -> Attributes:
        return Attributes(fileid, 0o100644, 1, 0, 0, self.size, self.size, 0, 0,
                          self.mtime_ns, self.mtime_ns)

    def read(self, start: int, end: int) -> bytes:
        end = min(end, self.size)
        return bytes([self.fill]) * max(end - start, 0)


@dataclass
class Link:
    """A core filer behind a link of *rtt_s* and *bytes_per_s*, one reply after the other."""

    rtt_s: float = 0.030
    bytes_per_s: float = 125e6
    io_bytes_max: int = MIB
    files: dict[int, File] = field(default_factory=dict)
    requests: list[tuple[int, int, int]] = field(default_factory=list)
    bytes: int = 0
    in_flight_bytes: int = 0
    in_flight_bytes_max: int = 0
    free_at_s: float = 0.0
    errors: list[Exception] = field(default_factory=list)
    tells_attributes: bool = True
    reply_bytes_max: int = GIB

    async def getattr(self, handle: Handle) -> Attributes:
        await trio.sleep(self.rtt_s)
        return self.files[int(handle)].attributes(int(handle))

    async def read(self, handle: Handle, start: int, end: int) -> ReadResult:
        assert end - start <= self.io_bytes_max
        number = int(handle)
        self.requests.append((number, start, end))
        self.in_flight_bytes += end - start
        self.in_flight_bytes_max = max(self.in_flight_bytes_max, self.in_flight_bytes)
        try:
            # The reply's turn on the link is fixed here: trio shuffles what wakes together.
            reply_bytes = min(end - start, self.reply_bytes_max)
            self.free_at_s = max(self.free_at_s, trio.current_time() + self.rtt_s / 2) + (
                reply_bytes / self.bytes_per_s)
            arrives_at_s = self.free_at_s + self.rtt_s / 2
            await trio.sleep(self.rtt_s / 2)
            if self.errors:
                raise self.errors.pop()
            file = self.files[number]
            data = file.read(start, min(end, start + self.reply_bytes_max))
            attributes = file.attributes(number) if self.tells_attributes else None
            self.bytes += len(data)
            await trio.sleep_until(arrives_at_s)
        finally:
            self.in_flight_bytes -= end - start
        return ReadResult(data, start + len(data) >= file.size, attributes)

    def clean(self, number: int) -> CleanFile:
        file = self.files[number]
        version = CoreVersion(file.mtime_ns, file.mtime_ns, file.size)
        return CleanFile(InodeId(number), Handle(b"%d" % number), DataVersion(1), version)


@asynccontextmanager
async def running(
    link: Link, pages: Pages, *, resolve_next: ResolveNext | None = None, **settings: Any
) -> AsyncIterator[Reader]:
    reader = Reader(cast(CoreFiler, link), cast(PageStore, pages), ReadAheadSettings(**settings),
                    resolve_next=resolve_next)
    async with trio.open_nursery() as nursery:
        await nursery.start(reader.run)
        yield reader
        nursery.cancel_scope.cancel()


async def read_all_at_once(reader: Reader, link: Link) -> None:
    async with trio.open_nursery() as clients:
        for number in link.files:
            clients.start_soon(read_through, reader, link.clean(number))


NO_READ_AHEAD = {"window_bytes_max": 0, "small_file_bytes": 0}


async def read_through(reader: Reader, file: CleanFile, step: int = MIB) -> None:
    for start in range(0, file.version.size, step):
        await reader.read(file, start, start + step)


# -- the link is used ---------------------------------------------------------------------------

async def test_a_cold_sequential_read_fills_the_link(autojump_clock: MockClock) -> None:
    link = Link(files={1: File(256 * MIB)})
    async with running(link, Pages()) as reader:
        began_s = trio.current_time()
        await read_through(reader, link.clean(1))
        seconds = trio.current_time() - began_s

    assert 256 * MIB / seconds >= 0.95 * link.bytes_per_s
    assert link.bytes == 256 * MIB


async def test_eight_mib_are_in_flight_as_soon_as_the_second_read_arrives(
    autojump_clock: MockClock,
) -> None:
    link = Link(files={1: File(GIB)})
    async with running(link, Pages()) as reader:
        for start in (0, MIB):
            await reader.read(link.clean(1), start, start + MIB)
        assert link.in_flight_bytes + link.bytes >= 10 * MIB


async def test_twenty_clients_reading_one_file_move_each_byte_once(
    autojump_clock: MockClock,
) -> None:
    size = 128 * MIB
    link = Link(files={1: File(size)})
    async with running(link, Pages()) as reader:
        began_s = trio.current_time()
        async with trio.open_nursery() as clients:
            for client in range(20):
                step = (MIB, 128 << 10)[client % 2]
                clients.start_soon(read_through, reader, link.clean(1), step)
        seconds = trio.current_time() - began_s

    assert link.bytes <= 1.02 * size
    assert size / seconds >= 0.9 * link.bytes_per_s


async def test_many_small_files_warmed_at_once_fill_the_link(autojump_clock: MockClock) -> None:
    link = Link(files={n: File(256 << 10) for n in range(1000)})
    async with running(link, Pages()) as reader:
        began_s = trio.current_time()
        limit = trio.CapacityLimiter(32)

        async def warm(number: int) -> None:
            async with limit:
                assert await reader.warm(link.clean(number)) == 256 << 10

        async with trio.open_nursery() as nursery:
            for number in link.files:
                nursery.start_soon(warm, number)
        seconds = trio.current_time() - began_s

    assert 1000 * (256 << 10) / seconds >= 0.9 * link.bytes_per_s


async def test_bytes_in_flight_stay_within_the_limit(autojump_clock: MockClock) -> None:
    link = Link(files={n: File(16 * MIB) for n in range(8)})
    async with running(link, Pages(), in_flight_bytes_max=16 * MIB) as reader:
        await read_all_at_once(reader, link)

    assert link.in_flight_bytes_max <= 16 * MIB
    assert link.bytes == 8 * 16 * MIB


# -- single-flight and priority -----------------------------------------------------------------

async def test_readers_of_one_page_share_one_fetch(autojump_clock: MockClock) -> None:
    link = Link(files={1: File(64 * MIB)})
    async with running(link, Pages(), **NO_READ_AHEAD) as reader, trio.open_nursery() as clients:
        for start in range(0, MIB, 32 << 10):
            clients.start_soon(
                reader.read, link.clean(1), 5 * MIB + start, 5 * MIB + start + 4096)
        await trio.sleep(1)

    assert link.requests == [(1, 5 * MIB, 6 * MIB)]


async def test_a_read_of_several_pages_fetches_them_at_once(autojump_clock: MockClock) -> None:
    link = Link(files={1: File(64 * MIB)}, bytes_per_s=1e12)
    async with running(link, Pages(), **NO_READ_AHEAD) as reader:
        began_s = trio.current_time()
        data = await reader.read(link.clean(1), 3 * MIB + 5, 7 * MIB + 7)

        assert len(data) == 4 * MIB + 2
        assert trio.current_time() - began_s < 2 * link.rtt_s


async def test_demand_overtakes_read_ahead_that_has_not_started(
    autojump_clock: MockClock,
) -> None:
    link = Link(files={1: File(GIB), 2: File(GIB)}, bytes_per_s=10e6)
    async with running(link, Pages(), in_flight_bytes_max=8 * MIB) as reader:
        for start in range(0, 6 * MIB, MIB):
            await reader.read(link.clean(1), start, start + MIB)
        assert reader.statistics().queued_ahead >= 8
        await reader.read(link.clean(2), 500 * MIB, 500 * MIB + 4096)

        asked = [request[0] for request in link.requests]
        assert len(asked) - 1 - asked.index(2) < 8
        assert reader.statistics().queued_ahead >= 8


async def test_a_cold_read_beside_a_stream_does_not_wait_for_the_streams_whole_window(
    autojump_clock: MockClock,
) -> None:
    link = Link(files={1: File(GIB), 2: File(GIB)})
    async with running(link, Pages()) as reader, trio.open_nursery() as clients:
        clients.start_soon(read_through, reader, link.clean(1))
        await trio.sleep(1)
        for start in range(0, GIB, 100 * MIB):
            began_s = trio.current_time()
            await reader.read(link.clean(2), start + MIB, start + MIB + 4096)
            assert trio.current_time() - began_s < 0.25
        clients.cancel_scope.cancel()


async def test_pages_are_asked_for_in_the_order_of_reading(autojump_clock: MockClock) -> None:
    link = Link(files={1: File(64 * MIB)})
    async with running(link, Pages()) as reader:
        await read_through(reader, link.clean(1))

    starts = [start for _, start, _ in link.requests]
    assert starts == sorted(starts)


async def test_a_page_queued_by_read_ahead_is_promoted_by_demand(
    autojump_clock: MockClock,
) -> None:
    link = Link(files={1: File(GIB)}, bytes_per_s=10e6)
    async with running(link, Pages(), in_flight_bytes_max=4 * MIB) as reader:
        for start in (0, MIB):
            await reader.read(link.clean(1), start, start + MIB)
        await reader.read(link.clean(1), 12 * MIB, 13 * MIB)

        starts = [start // MIB for _, start, _ in link.requests]
        assert 12 in starts
        assert set(range(13)) - set(starts)
        assert Counter(starts).most_common(1)[0][1] == 1


# -- where bytes come from ----------------------------------------------------------------------

async def test_a_read_ends_at_the_end_of_the_file(autojump_clock: MockClock) -> None:
    link = Link(files={1: File(MIB + 10), 2: File(0)})
    async with running(link, Pages()) as reader:
        assert len(await reader.read(link.clean(1), MIB, 3 * MIB)) == 10
        assert await reader.read(link.clean(1), 5 * MIB, 6 * MIB) == b""
        assert await reader.read(link.clean(2), 0, MIB) == b""


async def test_clients_need_not_wait_for_the_ssd(autojump_clock: MockClock) -> None:
    link, pages = Link(files={1: File(64 * MIB)}), Pages()
    pages.write_s = 1000.0
    async with running(link, pages, **NO_READ_AHEAD) as reader:
        for _ in range(3):
            assert len(await reader.read(link.clean(1), 0, MIB)) == MIB
        assert trio.current_time() < 1.0
        assert pages.writing == 1
        assert len(link.requests) == 1


async def test_without_a_cache_disk_reads_pass_through_and_still_share_fetches(
    autojump_clock: MockClock,
) -> None:
    link, pages = Link(files={1: File(256 * MIB)}), Pages()
    pages.degraded = "disk full"
    async with running(link, pages) as reader:
        async with trio.open_nursery() as clients:
            for _ in range(10):
                clients.start_soon(read_through, reader, link.clean(1))
        assert link.bytes <= 1.02 * 256 * MIB
        assert reader.statistics().memory_bytes <= MEMORY_BYTES_MAX
        assert pages.pages == {}


async def test_demand_that_outruns_the_ssd_keeps_memory_bounded(
    autojump_clock: MockClock,
) -> None:
    link, pages = Link(files={n: File(32 * MIB) for n in range(20)}, bytes_per_s=1e10), Pages()
    pages.write_s, most = 10.0, 0
    async with running(link, pages, **NO_READ_AHEAD) as reader:

        async def read(number: int) -> None:
            nonlocal most
            for start in range(0, 32 * MIB, MIB):
                await reader.read(link.clean(number), start, start + MIB)
                most = max(most, reader.statistics().memory_bytes)

        async with trio.open_nursery() as clients:
            for number in link.files:
                clients.start_soon(read, number)

    assert MEMORY_BYTES_MAX < most <= 2 * MEMORY_BYTES_MAX


async def test_a_core_filer_with_small_reads_is_asked_in_pieces(
    autojump_clock: MockClock,
) -> None:
    link = Link(files={1: File(3 * MIB + 1000)}, io_bytes_max=300_000)
    async with running(link, Pages()) as reader:
        data = await reader.read(link.clean(1), 0, 4 * MIB)

    assert data == link.files[1].read(0, 4 * MIB)
    assert link.bytes == 3 * MIB + 1000


async def test_short_replies_are_continued(autojump_clock: MockClock) -> None:
    link = Link(files={1: File(MIB)}, reply_bytes_max=300_000)
    async with running(link, Pages()) as reader:
        assert len(await reader.read(link.clean(1), 0, MIB)) == MIB
    assert link.bytes == MIB


async def test_replies_without_attributes_are_verified_by_asking(
    autojump_clock: MockClock,
) -> None:
    link = Link(files={1: File(MIB)}, tells_attributes=False)
    async with running(link, Pages()) as reader:
        file = link.clean(1)
        assert len(await reader.read(file, 0, 10)) == 10
        reader.forget(file.inode)
        link.files[1].mtime_ns = 2
        with pytest.raises(Changed):
            await reader.read(replace(file, data_version=DataVersion(2)), 0, 10)


# -- what goes wrong ----------------------------------------------------------------------------

async def test_everybody_who_waits_learns_that_the_file_changed_and_nothing_is_kept(
    autojump_clock: MockClock,
) -> None:
    link, pages = Link(files={1: File(64 * MIB)}), Pages()
    told = []
    async with running(link, pages) as reader:
        stale = link.clean(1)
        link.files[1] = File(10 * MIB, fill=2, mtime_ns=2)

        async def read(start: int) -> None:
            with pytest.raises(Changed) as caught:
                await reader.read(stale, start, start + 10)
            told.append(caught.value.attributes.version)

        async with trio.open_nursery() as clients:
            for start in range(5):
                clients.start_soon(read, start)
        await wait_all_tasks_blocked()

        assert told == [CoreVersion(2, 2, 10 * MIB)] * 5
        assert pages.pages == {}
        fresh = replace(link.clean(1), data_version=DataVersion(2))
        assert await reader.read(fresh, 0, 10) == b"\2" * 10


async def test_an_error_reaches_everybody_who_waits_and_the_next_read_asks_again(
    autojump_clock: MockClock,
) -> None:
    link = Link(files={1: File(MIB)}, errors=[Refused(errno.ESTALE)])
    failures = []
    async with running(link, Pages()) as reader:

        async def read() -> None:
            with pytest.raises(Refused) as caught:
                await reader.read(link.clean(1), 0, 10)
            failures.append(caught.value.errno)

        async with trio.open_nursery() as clients:
            for _ in range(3):
                clients.start_soon(read)

        assert failures == [errno.ESTALE] * 3
        assert len(await reader.read(link.clean(1), 0, 10)) == 10
        assert len(link.requests) == 2


async def test_a_defect_in_the_core_filer_reaches_the_client_and_spares_the_reader(
    autojump_clock: MockClock,
) -> None:
    link = Link(files={1: File(MIB)}, errors=[ZeroDivisionError()])
    async with running(link, Pages()) as reader:
        with pytest.raises(ZeroDivisionError):
            await reader.read(link.clean(1), 0, 10)
        assert len(await reader.read(link.clean(1), 0, 10)) == 10


async def test_a_file_that_ends_before_its_size_is_not_waited_for_for_ever(
    autojump_clock: MockClock,
) -> None:
    link = Link(files={1: File(MIB)}, reply_bytes_max=0)
    async with running(link, Pages()) as reader:
        with pytest.raises(TryAgain):
            await reader.read(link.clean(1), 0, 10)


async def test_a_cancelled_reader_does_not_take_the_fetch_with_it(
    autojump_clock: MockClock,
) -> None:
    link = Link(files={1: File(MIB)})
    async with running(link, Pages()) as reader, trio.open_nursery() as clients:
        first = trio.CancelScope()

        async def impatient() -> None:
            with first:
                await reader.read(link.clean(1), 0, 10)

        clients.start_soon(impatient)
        await wait_all_tasks_blocked()
        got: list[bytes] = []

        async def patient() -> None:
            got.append(bytes(await reader.read(link.clean(1), 0, 10)))

        clients.start_soon(patient)
        await wait_all_tasks_blocked()
        first.cancel()
        await trio.sleep(1)

        assert got == [b"\1" * 10]
        assert len(link.requests) == 1


# -- changes of our own -------------------------------------------------------------------------

async def test_a_flush_during_a_fetch_voids_it_and_the_reader_asks_again(
    autojump_clock: MockClock,
) -> None:
    link, pages = Link(files={1: File(MIB)}), Pages()
    async with running(link, pages) as reader, trio.open_nursery() as clients:
        stale = link.clean(1)
        outcome = []

        async def read() -> None:
            try:
                outcome.append(bytes(await reader.read(stale, 0, 10)))
            except Changed as changed:
                outcome.append(changed.attributes.mtime_ns)

        clients.start_soon(read)
        await trio.sleep(0.020)  # the old bytes are on their way back
        link.files[1] = File(MIB, fill=2, mtime_ns=2)
        pages.tell(stale.key, 0, 100)
        await trio.sleep(1)

        assert outcome == [2]
        assert pages.pages == {}
        assert await reader.read(link.clean(1), 0, 10) == b"\2" * 10


async def test_a_piece_that_changes_while_another_is_awaited_is_read_again(
    autojump_clock: MockClock,
) -> None:
    link, pages = Link(files={1: File(2 * MIB)}), Pages()
    got = []
    async with running(link, pages, **NO_READ_AHEAD) as reader, trio.open_nursery() as clients:
        file = link.clean(1)
        pages.pages[file.key, 0] = bytes(MIB)

        async def read() -> None:
            got.append(bytes(await reader.read(file, MIB - 10, MIB + 10)))

        clients.start_soon(read)
        await trio.sleep(0.020)  # it has page 0 and waits for page 1
        pages.pages[file.key, 0] = b"\7" * MIB
        pages.tell(file.key, 0, MIB)
        await trio.sleep(1)

        assert got == [b"\7" * 10 + b"\1" * 10]


async def test_changes_elsewhere_in_the_file_leave_a_fetch_alone(
    autojump_clock: MockClock,
) -> None:
    link, pages = Link(files={1: File(8 * MIB)}), Pages()
    async with running(link, pages, **NO_READ_AHEAD) as reader, trio.open_nursery() as clients:
        clients.start_soon(reader.read, link.clean(1), 0, 10)
        await trio.sleep(0.020)
        pages.tell(link.clean(1).key, MIB, 2 * MIB)
        pages.tell(InodeId(2), 0, None)
        await trio.sleep(1)

        assert len(link.requests) == 1
        assert (link.clean(1).key, 0) in pages.pages


async def test_pages_in_memory_are_dropped_with_the_file(autojump_clock: MockClock) -> None:
    link, pages = Link(files={1: File(MIB)}), Pages()
    pages.degraded = "disk full"
    async with running(link, pages) as reader:
        file = link.clean(1)
        await reader.read(file, 0, 10)
        await trio.sleep(1)
        assert reader.statistics().memory_bytes == MIB
        reader.forget(file.inode)
        assert reader.statistics().memory_bytes == 0
        await reader.read(file, 0, 10)
        assert len(link.requests) == 2


async def test_readers_who_know_different_versions_of_one_state_share_its_bytes(
    autojump_clock: MockClock,
) -> None:
    """A flush of other bytes changed the mtime while a page was on its way."""
    link, pages = Link(files={1: File(MIB)}), Pages()
    got = []
    async with running(link, pages) as reader, trio.open_nursery() as clients:

        async def read(file: CleanFile) -> None:
            got.append(bytes(await reader.read(file, 0, 10)))

        clients.start_soon(read, link.clean(1))
        await trio.sleep(0.020)
        link.files[1].mtime_ns = 2
        clients.start_soon(read, link.clean(1))
        await trio.sleep(1)

        assert got == [b"\1" * 10] * 2
        assert len(link.requests) == 1


async def test_only_who_knows_an_outdated_version_is_told_that_the_file_changed(
    autojump_clock: MockClock,
) -> None:
    link, pages = Link(files={1: File(MIB)}), Pages()
    outcomes = []
    async with running(link, pages) as reader, trio.open_nursery() as clients:
        outdated = link.clean(1)
        link.files[1].mtime_ns = 2

        async def read(file: CleanFile) -> None:
            try:
                outcomes.append(len(await reader.read(file, 0, 10)))
            except Changed:
                outcomes.append("changed")

        clients.start_soon(read, outdated)
        await trio.sleep(0.020)
        clients.start_soon(read, link.clean(1))
        await trio.sleep(1)

        assert outcomes == ["changed", 10]


# -- ahead --------------------------------------------------------------------------------------

async def test_bytes_fetched_ahead_and_read_are_counted_as_used(
    autojump_clock: MockClock,
) -> None:
    link = Link(files={1: File(100 * MIB)})
    async with running(link, Pages()) as reader:
        await read_through(reader, link.clean(1), 256 << 10)
        statistics = reader.statistics()

    assert statistics.fetched_bytes["read_ahead"] >= 98 * MIB
    assert statistics.read_ahead_used_bytes == statistics.fetched_bytes["read_ahead"]


async def test_useless_read_ahead_stops(autojump_clock: MockClock) -> None:
    link = Link(files={n: File(100 * MIB) for n in range(300)})
    async with running(link, Pages()) as reader:
        for number in range(300):
            await reader.read(link.clean(number), 0, 4096)
        ahead = reader.statistics().fetched_bytes["read_ahead"]
        for number in range(300):
            await reader.read(replace(link.clean(number), data_version=DataVersion(2)), 0, 4096)
        later = reader.statistics().fetched_bytes["read_ahead"] - ahead

    assert ahead <= 150 * MIB
    assert later <= ahead / 4


async def test_the_next_files_of_a_sequence_are_fetched(autojump_clock: MockClock) -> None:
    link, pages = Link(files={n: File(3 * MIB) for n in range(10)}), Pages()
    asked = []

    async def resolve_next(inode: InodeId, count: int) -> list[CleanFile]:
        asked.append(inode)
        return [link.clean(inode + 1 + i) for i in range(count)]

    async with running(link, pages, resolve_next=resolve_next) as reader:
        await reader.read(link.clean(3), 0, 4096)
        await reader.read(link.clean(3), 0, 4096)
        await trio.sleep(2)

        assert asked == [3]
        assert {request[0] for request in link.requests} == {3, 4, 5}
        assert pages.missing(link.clean(5).key, 0, 3 * MIB) == []
        await read_through(reader, link.clean(4))
        assert link.bytes == 9 * MIB


async def test_a_sequence_that_cannot_be_resolved_harms_nobody(
    autojump_clock: MockClock,
) -> None:
    link = Link(files={1: File(MIB)})

    async def resolve_next(inode: InodeId, count: int) -> list[CleanFile]:
        raise Refused(errno.ENOENT)

    async with running(link, Pages(), resolve_next=resolve_next) as reader:
        assert len(await reader.read(link.clean(1), 0, 10)) == 10
        await wait_all_tasks_blocked()
        assert len(await reader.read(link.clean(1), 0, 10)) == 10


# -- warming ------------------------------------------------------------------------------------

async def test_warming_fetches_what_is_missing_and_says_how_much(
    autojump_clock: MockClock,
) -> None:
    link, pages = Link(files={1: File(50 * MIB + 5)}), Pages()
    async with running(link, pages, **NO_READ_AHEAD) as reader:
        file = link.clean(1)
        await reader.read(file, 7 * MIB, 8 * MIB)

        assert await reader.warm(file) == 49 * MIB + 5
        assert pages.missing(file.key, 0, file.version.size) == []
        assert await reader.warm(file) == 0
        assert link.bytes == 50 * MIB + 5


async def test_warming_a_changed_file_says_so(autojump_clock: MockClock) -> None:
    link = Link(files={1: File(50 * MIB)})
    async with running(link, Pages()) as reader:
        file = link.clean(1)
        link.files[1].mtime_ns = 2
        with pytest.raises(Changed):
            await reader.warm(file)


async def test_warming_without_a_cache_disk_is_refused(autojump_clock: MockClock) -> None:
    link, pages = Link(files={1: File(50 * MIB)}), Pages()
    pages.degraded = "disk full"
    async with running(link, pages) as reader:
        with pytest.raises(TryAgain, match="disk full"):
            await reader.warm(link.clean(1))


