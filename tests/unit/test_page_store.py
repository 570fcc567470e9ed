"""The page store: what is written is read, what changed is not, and it survives a restart."""

from __future__ import annotations

import os
import random
import shutil
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from filer.cache.index import ChunkIndex
from filer.cache.layout import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    PAGE_BYTES,
    ChunkRecord,
    FileKey,
    block_digests,
    chunk_key,
)
from filer.cache.pages import PageStore
from filer.errors import Corrupt, TryAgain
from filer.ids import DataVersion, InodeId
from filer.settings import CacheSettings

MIB = 1 << 20
FILE = FileKey(InodeId(5), DataVersion(9))
OTHER = FileKey(InodeId(6), DataVersion(9))
NEWER = FileKey(InodeId(5), DataVersion(10))


def noise(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


@asynccontextmanager
async def opened(
    directory: Path, *, boot_id: str = "boot", capacity_bytes: int = 1 << 30
) -> AsyncIterator[PageStore]:
    store = await PageStore.open(
        directory, CacheSettings(capacity_bytes=capacity_bytes), boot_id=boot_id)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        try:
            yield store
        finally:
            nursery.cancel_scope.cancel()
    await store.close()


async def write_all(store: PageStore, key: FileKey, data: bytes) -> None:
    for page, start in enumerate(range(0, len(data), PAGE_BYTES)):
        await store.write(key, page, data[start:start + PAGE_BYTES])


# -- reading and writing ------------------------------------------------------------------------

async def test_what_was_written_is_read_at_any_offset(tmp_path: Path) -> None:
    data = noise(9 * MIB + 12345)
    async with opened(tmp_path) as store:
        await write_all(store, FILE, data)

        assert store.missing(FILE, 0, len(data)) == []
        choose = random.Random(1)
        for _ in range(60):
            start, end = sorted(choose.sample(range(len(data) + 1), 2))
            assert await store.read(FILE, start, end) == data[start:end]
        assert store.cached_bytes(FILE) == len(data)


async def test_a_page_that_was_not_written_is_missing(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.write(FILE, 5, noise(PAGE_BYTES))

        assert store.missing(FILE, 4 * MIB, 8 * MIB) == [4, 6, 7]
        assert await store.read(FILE, 5 * MIB, 6 * MIB) == noise(PAGE_BYTES)
        assert await store.read(FILE, 5 * MIB - 1, 6 * MIB) is None
        assert await store.read(FILE, 5 * MIB, 6 * MIB + 1) is None


async def test_files_and_versions_do_not_mix(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.write(FILE, 0, b"old")
        await store.write(NEWER, 0, b"new")
        await store.write(OTHER, 0, b"other")

        assert await store.read(FILE, 0, 3) == b"old"
        assert await store.read(NEWER, 0, 3) == b"new"
        store.drop(FILE)
        assert await store.read(FILE, 0, 3) is None
        assert await store.read(NEWER, 0, 3) == b"new"
        store.drop_inode(FILE.inode)
        assert await store.read(NEWER, 0, 3) is None
        assert await store.read(OTHER, 0, 5) == b"other"


async def test_a_short_page_ends_the_file_and_is_fetched_anew_when_the_file_grows(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        await store.write(FILE, 0, b"x" * 1000)

        assert await store.read(FILE, 0, 1000) == b"x" * 1000
        assert store.missing(FILE, 0, 1000) == []
        assert await store.read(FILE, 0, 1001) is None
        assert store.missing(FILE, 0, 1001) == [0]
        await store.write(FILE, 0, b"y" * 2000)
        assert await store.read(FILE, 0, 2000) == b"y" * 2000


async def test_dropped_files_leave_no_bytes_on_the_disk(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await write_all(store, FILE, noise(9 * MIB))
        store.drop_from(FILE, 5 * MIB)
        store.drop_inode(FILE.inode)
    assert [p for p in (tmp_path / "chunks").rglob("*") if p.is_file()] == []


# -- updates ------------------------------------------------------------------------------------

async def test_flushed_bytes_change_valid_pages_and_make_covered_ones_valid(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        data = bytearray(noise(6 * MIB))
        await store.write(FILE, 1, data[MIB:2 * MIB])
        start, end = MIB + 100, 4 * MIB + 300
        data[start:end] = noise(end - start, seed=2)
        await store.update(FILE, start, data[start:end], len(data))

        assert store.missing(FILE, 0, 6 * MIB) == [0, 4, 5]
        assert await store.read(FILE, MIB, 4 * MIB) == data[MIB:4 * MIB]


async def test_bytes_appended_to_a_short_page_lengthen_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        data = noise(300_000)
        await store.write(FILE, 0, data[:100_000])
        await store.update(FILE, 100_000, data[100_000:], len(data))

        assert await store.read(FILE, 0, len(data)) == data


async def test_bytes_beyond_a_hole_do_not_make_the_hole_valid(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.write(FILE, 0, b"a" * 100)
        await store.update(FILE, 5000, b"b" * 100, 5100)

        assert await store.read(FILE, 0, 100) == b"a" * 100
        assert await store.read(FILE, 0, 5100) is None


async def test_listeners_hear_of_a_change_before_and_after_it(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        heard: list[tuple[object, int, int | None, bytes | None]] = []
        await store.write(FILE, 0, b"old")
        store.subscribe(lambda target, start, end: heard.append((target, start, end, None)))
        await store.update(FILE, 1, b"e", 3)
        store.drop_from(FILE, 2)
        store.drop(FILE)
        store.drop_inode(FILE.inode)

        assert [h[:3] for h in heard] == [
            (FILE, 1, 2), (FILE, 1, 2), (FILE, 2, None), (FILE, 0, None), (FILE.inode, 0, None)]


HISTORY = st.lists(st.one_of(
    st.tuples(st.just("write"), st.integers(0, 9)),
    st.tuples(st.just("update"), st.integers(0, 10 * MIB), st.integers(1, 3 * MIB)),
    st.tuples(st.just("tiny"), st.integers(0, 10 * MIB), st.integers(1, 200)),
    st.tuples(st.just("cut"), st.integers(0, 10 * MIB)),
    st.tuples(st.just("drop")),
    st.tuples(st.just("evict"), st.integers(1, 4 * MIB)),
    st.tuples(st.just("read"), st.integers(0, 10 * MIB), st.integers(1, 3 * MIB)),
    st.tuples(st.just("restart")),
), max_size=25)


@given(HISTORY, st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_after_any_history_a_read_gives_the_current_bytes_or_nothing(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple], seed: int
) -> None:
    trio.run(follow, tmp_path_factory.mktemp("store"), history, seed)


async def follow(directory: Path, history: list[tuple], seed: int) -> None:
    choose = random.Random(seed)
    file = bytearray(choose.randbytes(7 * MIB + 321))
    store = await PageStore.open(directory, CacheSettings(), boot_id="boot")

    async def check(start: int, end: int) -> None:
        if start < end:
            data = await store.read(FILE, start, end)
            assert data is None or data == file[start:end]

    for event, *arguments in history:
        if event == "write":
            start = arguments[0] * PAGE_BYTES
            if start < len(file):
                await store.write(FILE, arguments[0], bytes(file[start:start + PAGE_BYTES]))
                end = min(start + PAGE_BYTES, len(file))
                assert await store.read(FILE, start, end) == file[start:end]
        elif event in ("update", "tiny"):
            start, length = arguments
            if start > len(file):
                file.extend(bytes(start - len(file)))
            data = choose.randbytes(length)
            file[start:start + length] = data
            await store.update(FILE, start, data, len(file))
        elif event == "cut":
            if arguments[0] < len(file):
                del file[arguments[0]:]
                store.drop_from(FILE, len(file))
        elif event == "drop":
            store.drop(FILE)
            assert store.cached_bytes(FILE) == 0
        elif event == "evict":
            await store.evict(arguments[0])
        elif event == "read":
            await check(arguments[0], min(arguments[0] + arguments[1], len(file)))
        else:
            await store.close()
            store = await PageStore.open(directory, CacheSettings(), boot_id="boot")
        assert store.statistics().cached_bytes == store.cached_bytes(FILE)
    for start in range(0, len(file), PAGE_BYTES):
        await check(start, min(start + PAGE_BYTES, len(file)))
    assert store.statistics().corrupt_pages == 0
    await store.close()
    shutil.rmtree(directory)


async def test_readers_during_updates_see_one_update_or_the_next_never_a_mixture(
    tmp_path: Path,
) -> None:
    """Every update fills the same 2 pages with its number; a torn read would show two."""
    async with opened(tmp_path) as store:
        finished = 0
        await store.update(FILE, 0, bytes(2 * MIB), 2 * MIB)

        async def update_many(cancel: trio.CancelScope) -> None:
            nonlocal finished
            for number in range(1, 25):
                await store.update(FILE, 0, bytes([number]) * (2 * MIB), 2 * MIB)
                finished = number
            cancel.cancel()

        hits = 0

        async def read_many() -> None:
            nonlocal hits
            while True:
                before = finished
                data = await store.read(FILE, 100, 200_000)
                if data is not None:
                    hits += 1
                    assert len(set(bytes(data))) == 1
                    assert data[0] >= before
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(read_many)
            await update_many(nursery.cancel_scope)
        assert hits
        assert store.statistics().corrupt_pages == 0


async def test_a_page_dropped_while_a_thread_reads_it_is_not_handed_out(
    tmp_path: Path,
) -> None:
    dropped_in_time = 0
    for number in range(12):
        key = FileKey(InodeId(number), DataVersion(1))
        async with opened(tmp_path) as store:
            await store.write(key, 0, noise(PAGE_BYTES))
        # No descriptor is open yet, so that the first read needs a thread.
        store = await PageStore.open(tmp_path, CacheSettings(), boot_id="boot")
        outcome: list[object] = []

        async def read(store: PageStore, key: FileKey, outcome: list[object]) -> None:
            outcome.append(await store.read(key, 0, PAGE_BYTES))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, store, key, outcome)
            await trio.lowlevel.checkpoint()
            was_in_time = not outcome
            store.drop(key)
        if was_in_time:
            dropped_in_time += 1
            assert outcome == [None]
        await store.close()
    assert dropped_in_time


async def test_bytes_that_were_being_written_when_the_file_was_cut_do_not_come_back(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        await store.write(FILE, 0, bytes(PAGE_BYTES))
        for cut_after_yields in range(2, 10):
            async with trio.open_nursery() as nursery:
                for page in (1, 2):
                    nursery.start_soon(store.write, FILE, page, b"x" * PAGE_BYTES)
                for _ in range(cut_after_yields):
                    await trio.lowlevel.checkpoint()
                store.drop_from(FILE, MIB)
                assert store.missing(FILE, MIB, 3 * MIB) == [1, 2]
            assert store.missing(FILE, MIB, 3 * MIB) == [1, 2]


async def test_a_cancelled_write_leaves_the_chunk_writable(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        with trio.CancelScope() as scope:
            scope.cancel()
            await store.write(FILE, 0, b"lost")
        await store.write(FILE, 0, b"kept")

        assert await store.read(FILE, 0, 4) == b"kept"
        assert store.statistics().cached_bytes == 4


# -- capacity -----------------------------------------------------------------------------------

async def test_the_cache_never_holds_more_than_its_capacity(tmp_path: Path) -> None:
    capacity = 24 * MIB
    async with opened(tmp_path, capacity_bytes=capacity) as store:
        async with trio.open_nursery() as nursery:
            for page in range(100):
                await store.write(FILE, page, bytes([page]) * PAGE_BYTES)
                assert store.statistics().cached_bytes <= capacity
                nursery.start_soon(store.read, FILE, page * MIB, (page + 1) * MIB)

        assert store.statistics().cached_bytes > capacity // 2
        assert store.statistics().evicted_bytes >= 100 * MIB - capacity
    kept = sum(p.stat().st_blocks * 512 for p in (tmp_path / "chunks").rglob("*") if p.is_file())
    assert kept <= capacity


async def test_a_cache_smaller_than_a_page_passes_through(tmp_path: Path) -> None:
    async with opened(tmp_path, capacity_bytes=1000) as store:
        await store.write(FILE, 0, bytes(PAGE_BYTES))

        assert store.missing(FILE, 0, MIB) == [0]
        assert store.statistics().writes_dropped == 1


async def memory_bytes_with_chunks(directory: Path, count: int) -> int:
    index = ChunkIndex(directory / "index")
    index.change(
        (chunk_key(FileKey(InodeId(i), DataVersion(1)), 0),
         ChunkRecord.empty(1 << 40 | i, i).with_page(0, PAGE_BYTES, bytes(8 * 16)))
        for i in range(count))
    index.close()
    (directory / "state").write_text('{"format": 1, "boot_id": "boot", "clean": false}')
    tracemalloc.start()
    try:
        async with opened(directory) as store:
            assert store.statistics().chunk_count == count
            return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


async def test_the_index_stays_on_the_disk_and_a_chunk_costs_little_memory(
    tmp_path: Path,
) -> None:
    few = await memory_bytes_with_chunks(tmp_path / "few", 1000)
    many = await memory_bytes_with_chunks(tmp_path / "many", 9_000)

    assert (many - few) / 8_000 < 80


# -- opening ------------------------------------------------------------------------------------

async def test_a_clean_restart_is_warm_even_after_a_reboot(tmp_path: Path) -> None:
    data = noise(5 * MIB)
    async with opened(tmp_path, boot_id="a") as store:
        await write_all(store, FILE, data)
    async with opened(tmp_path, boot_id="b") as store:
        assert await store.read(FILE, 0, len(data)) == data
        assert store.statistics().cached_bytes == len(data)


@pytest.mark.parametrize(("boot_id", "is_warm"), [("a", True), ("b", False)])
async def test_without_a_clean_shutdown_pages_are_believed_only_if_the_system_still_runs(
    tmp_path: Path, boot_id: str, is_warm: bool
) -> None:
    async with opened(tmp_path / "live", boot_id="a") as store:
        await store.write(FILE, 0, b"page")
        shutil.copytree(tmp_path / "live", tmp_path / "left-behind")
    async with opened(tmp_path / "left-behind", boot_id=boot_id) as store:
        assert await store.read(FILE, 0, 4) == (b"page" if is_warm else None)
        await store.write(FILE, 0, b"anew")
        assert await store.read(FILE, 0, 4) == b"anew"


async def test_chunk_files_that_no_record_names_are_removed_at_the_next_start(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as store:
        await store.write(FILE, 0, b"page")
    orphan = tmp_path / "chunks" / "07" / f"{(1 << 40) + 7:016x}"
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"orphan")
    store = await PageStore.open(tmp_path, CacheSettings(), boot_id="boot")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        while orphan.exists():
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()

    assert await store.read(FILE, 0, 4) == b"page"
    await store.close()


async def test_two_processes_cannot_share_a_cache_directory(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    async with opened(tmp_path):
        mock_clock.rate = 100
        with pytest.raises(TryAgain, match="in use"):
            await PageStore.open(tmp_path, CacheSettings(), boot_id="boot")
        mock_clock.rate = 0


async def test_closing_leaves_no_descriptor_open(tmp_path: Path) -> None:
    async with opened(tmp_path / "first"):
        pass  # whatever the process opens once
    before = len(os.listdir("/proc/self/fd"))
    async with opened(tmp_path / "second") as store:
        await write_all(store, FILE, noise(20 * MIB))
        await store.evict(4 * MIB)
        store.drop_from(FILE, 9 * MIB)
    assert len(os.listdir("/proc/self/fd")) == before


# -- records ------------------------------------------------------------------------------------

def test_a_record_with_any_byte_changed_or_cut_is_recognised() -> None:
    key = chunk_key(FILE, 3)
    record = ChunkRecord.empty(7, 8).with_page(
        1, 3 * BLOCK_BYTES + 5, block_digests(noise(3 * BLOCK_BYTES + 5)))
    packed = record.pack(key)
    assert ChunkRecord.unpack(key, packed) == record

    for at in range(len(packed)):
        for damaged in (packed[:at], packed[:at] + bytes([packed[at] ^ 64]) + packed[at + 1:]):
            with pytest.raises(Corrupt):
                ChunkRecord.unpack(key, damaged)
    with pytest.raises(Corrupt):
        ChunkRecord.unpack(chunk_key(FILE, 4), packed)


@given(st.lists(st.integers(0, PAGE_BYTES), min_size=4, max_size=4),
       st.integers(0, CHUNK_BYTES - 1), st.integers(1, CHUNK_BYTES))
def test_a_record_covers_exactly_the_bytes_of_its_pages(
    lengths: list[int], start: int, length: int
) -> None:
    end = min(start + length, CHUNK_BYTES)
    record = ChunkRecord(1, 1, tuple(lengths), b"")
    edges = {start, end - 1} | {p * PAGE_BYTES + n - 1 for p, n in enumerate(lengths)} | {
        p * PAGE_BYTES + n for p, n in enumerate(lengths)}
    expected = all(
        at % PAGE_BYTES < lengths[at // PAGE_BYTES]
        for at in edges if start <= at < end)

    assert record.covers(start, end) == expected
