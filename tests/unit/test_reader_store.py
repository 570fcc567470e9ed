"""The reader over the real page store and a core filer in memory."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from filer.cache.pages import PageStore
from filer.cache.reader import Changed, CleanFile, Reader
from filer.core_filer.base import Handle
from filer.core_filer.memory import MemoryCoreFiler
from filer.ids import DataVersion, InodeId
from filer.settings import CacheSettings, ReadAheadSettings

MIB = 1 << 20


@asynccontextmanager
async def running(core: MemoryCoreFiler, directory: Path) -> AsyncIterator[Reader]:
    pages = await PageStore.open(directory, CacheSettings(), boot_id="boot")
    reader = Reader(core, pages, ReadAheadSettings())
    async with trio.open_nursery() as nursery:
        await nursery.start(reader.run)
        yield reader
        nursery.cancel_scope.cancel()
    await pages.close()


@pytest.fixture
def core() -> MemoryCoreFiler:
    return MemoryCoreFiler(wall_clock=itertools.count(1, 1000).__next__)


async def make(core: MemoryCoreFiler, data: bytes) -> Handle:
    found = await core.create(core.root, b"file", mode=0o644, uid=0, gid=0)
    for start in range(0, len(data), MIB):
        await core.write(found.handle, start, data[start:start + MIB])
    return found.handle


async def clean(core: MemoryCoreFiler, handle: Handle) -> CleanFile:
    attributes = await core.getattr(handle)
    return CleanFile(InodeId(attributes.fileid), handle, DataVersion(1), attributes.version)


async def read_all(reader: Reader, file: CleanFile, step: int = 300_000) -> bytes:
    parts = []
    for start in range(0, file.version.size, step):
        parts.append(bytes(await reader.read(file, start, start + step)))
    return b"".join(parts)


async def test_what_was_read_once_is_read_without_the_core_filer_even_after_a_restart(
    core: MemoryCoreFiler, tmp_path: Path
) -> None:
    data = random.Random(0).randbytes(21 * MIB + 77)
    file = await clean(core, await make(core, data))
    async with running(core, tmp_path) as reader:
        assert await read_all(reader, file) == data
        await reader.warm(file)  # until the SSD has all of it
        core.disconnect()
        assert await read_all(reader, file, step=MIB) == data
    async with running(core, tmp_path) as reader:
        assert await read_all(reader, file, step=1_500_000) == data
    assert core.calls["read"] == 22


def damage(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        old = file.read(1)
        file.seek(at)
        file.write(bytes([old[0] ^ 1]))


async def test_a_page_damaged_on_the_ssd_is_fetched_again(
    core: MemoryCoreFiler, tmp_path: Path
) -> None:
    data = random.Random(0).randbytes(4 * MIB)
    file = await clean(core, await make(core, data))
    async with running(core, tmp_path) as reader:
        await reader.warm(file)
        [chunk] = [p for p in (tmp_path / "chunks").rglob("*") if p.is_file()]
        damage(chunk, 2 * MIB + 5)
        before = core.calls["read"]

        assert await read_all(reader, file) == data
        assert core.calls["read"] == before + 1
        await reader.warm(file)
        assert await read_all(reader, file) == data
        assert core.calls["read"] == before + 1


REGION = 100_000
REGIONS = 45


@pytest.mark.parametrize("seed", range(4))
async def test_readers_during_flushes_see_no_byte_older_than_the_last_flush_that_ended(
    core: MemoryCoreFiler, tmp_path: Path, seed: int
) -> None:
    """Each region is filled with the number of its last flush.  What a read returns must not be
    older than what was finished when it began, nor newer than what was begun when it ended."""
    choose = random.Random(seed)
    handle = await make(core, bytes(REGION * REGIONS))
    file = await clean(core, handle)
    begun, finished = [0] * REGIONS, [0] * REGIONS
    reads = 0

    async def flush_often(pages: PageStore, cancel: trio.CancelScope) -> None:
        nonlocal file
        for _ in range(60):
            first = choose.randrange(REGIONS)
            last = min(first + choose.choice([1, 1, 3, 20]), REGIONS)
            number = begun[first] + 1
            for region in range(first, last):
                number = max(number, begun[region] + 1)
            data = bytes([number]) * (REGION * (last - first))
            for region in range(first, last):
                begun[region] = number
            for at in range(0, len(data), MIB):
                await core.write(handle, first * REGION + at, data[at:at + MIB])
            await pages.update(file.key, first * REGION, data, REGION * REGIONS)
            file = await clean(core, handle)
            for region in range(first, last):
                finished[region] = number
            if choose.random() < 0.2:
                await pages.evict(MIB)
        cancel.cancel()

    async def read_often(reader: Reader, numbers: random.Random) -> None:
        nonlocal reads
        while True:
            region = numbers.randrange(REGIONS)
            count = numbers.choice([1, 1, 5, 15])
            start = region * REGION + numbers.randrange(REGION)
            end = min(start + count * REGION, REGION * REGIONS)
            oldest = list(finished)
            try:
                data = await reader.read(file, start, end)
            except Changed:
                await trio.lowlevel.checkpoint()
                continue
            reads += 1
            for at in range(start, end, REGION // 4):
                region = at // REGION
                assert oldest[region] <= data[at - start] <= begun[region]
            await trio.lowlevel.checkpoint()

    pages = await PageStore.open(tmp_path, CacheSettings(), boot_id="boot")
    reader = Reader(core, pages, ReadAheadSettings())
    async with trio.open_nursery() as nursery:
        await nursery.start(reader.run)
        for number in range(4):
            nursery.start_soon(read_often, reader, random.Random(100 * seed + number))
        await flush_often(pages, nursery.cancel_scope)
    assert reads > 20
    assert pages.statistics().corrupt_pages == 0
    await pages.close()
