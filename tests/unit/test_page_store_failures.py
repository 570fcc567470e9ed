"""The page store on disks that lie, fill up or fail, and under kill -9.

Whatever happens, a read gives the right bytes or nothing.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from filer import metrics
from filer.cache.layout import BLOCK_BYTES, CHUNK_BYTES, PAGE_BYTES, FileKey
from filer.cache.pages import PageStore
from filer.ids import DataVersion, InodeId
from filer.settings import CacheSettings

MIB = 1 << 20
FILE = FileKey(InodeId(5), DataVersion(9))
ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def opened(directory: Path, *, capacity_bytes: int = 1 << 30) -> AsyncIterator[PageStore]:
    store = await PageStore.open(
        directory, CacheSettings(capacity_bytes=capacity_bytes), boot_id="boot")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        try:
            yield store
        finally:
            nursery.cancel_scope.cancel()
    await store.close()


def page_bytes(page: int) -> bytes:
    return random.Random(page).randbytes(PAGE_BYTES)


def flip(path: Path, at: int, *, count: int = 1) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        old = file.read(count)
        file.seek(at)
        file.write(bytes(byte ^ 0xA5 for byte in old))


def chunk_files(directory: Path) -> list[Path]:
    return sorted(p for p in (directory / "chunks").rglob("*") if p.is_file())


# -- damaged bytes ------------------------------------------------------------------------------

@pytest.mark.parametrize("is_warm", [True, False], ids=["while open", "after a restart"])
async def test_a_flipped_byte_makes_its_page_missing_and_is_counted(
    tmp_path: Path, is_warm: bool
) -> None:
    counted = metrics.CACHE_CORRUPT._value.get()
    async with opened(tmp_path) as store:
        for page in range(4):
            await store.write(FILE, page, page_bytes(page))
        [path] = chunk_files(tmp_path)
        if is_warm:
            flip(path, 2 * MIB + 3 * BLOCK_BYTES + 17)
            await check_only_page_two_is_lost(store)
    if not is_warm:
        flip(path, 2 * MIB + 3 * BLOCK_BYTES + 17)
        async with opened(tmp_path) as store:
            await check_only_page_two_is_lost(store)
    assert metrics.CACHE_CORRUPT._value.get() == counted + 1


async def check_only_page_two_is_lost(store: PageStore) -> None:
    # Blocks that were not hit can still be read alone …
    good = await store.read(FILE, 2 * MIB, 2 * MIB + BLOCK_BYTES)
    assert good == page_bytes(2)[:BLOCK_BYTES]
    # … until the damage is seen.
    assert await store.read(FILE, 2 * MIB, 3 * MIB) is None
    assert store.missing(FILE, 0, 4 * MIB) == [2]
    assert store.statistics().corrupt_pages == 1
    for page in (0, 1, 3):
        assert await store.read(FILE, page * MIB, (page + 1) * MIB) == page_bytes(page)
    await store.write(FILE, 2, page_bytes(2))
    assert await store.read(FILE, 2 * MIB, 3 * MIB) == page_bytes(2)


async def test_damage_in_any_block_is_found(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for block in range(CHUNK_BYTES // BLOCK_BYTES):
            page, start = block * BLOCK_BYTES // PAGE_BYTES, block * BLOCK_BYTES
            await store.write(FILE, page, page_bytes(page))
            flip(chunk_files(tmp_path)[-1], start + block)
            assert await store.read(FILE, start, start + BLOCK_BYTES) is None, block


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "directory"])
async def test_a_chunk_file_that_is_cut_or_gone_is_a_miss(tmp_path: Path, damage: str) -> None:
    async with opened(tmp_path) as store:
        await store.write(FILE, 0, page_bytes(0))
        [path] = chunk_files(tmp_path)
    match damage:
        case "cut":
            os.truncate(path, 100_000)
        case "empty":
            os.truncate(path, 0)
        case "gone":
            path.unlink()
        case "directory":
            path.unlink()
            path.mkdir()
    async with opened(tmp_path) as store:
        assert await store.read(FILE, 0, MIB) is None
        assert store.missing(FILE, 0, MIB) == [0]


async def test_changing_a_damaged_page_does_not_bless_the_damage(tmp_path: Path) -> None:
    """New checksums over old damaged bytes would make them look right."""
    async with opened(tmp_path) as store:
        await store.write(FILE, 0, page_bytes(0))
        flip(chunk_files(tmp_path)[0], 100)
        await store.update(FILE, 200, b"new", PAGE_BYTES)

        assert await store.read(FILE, 0, BLOCK_BYTES) is None
        assert store.missing(FILE, 0, MIB) == [0]


# -- a damaged index ----------------------------------------------------------------------------

USE_THE_CACHE = """
import random, sys, trio
from pathlib import Path
from filer.cache.layout import FileKey
from filer.cache.pages import PageStore
from filer.settings import CacheSettings

async def main(hits_wanted):
    store = await PageStore.open(Path(sys.argv[1]), CacheSettings(), boot_id="boot")
    hits = 0
    for inode in range(40):
        key, content = FileKey(inode, 1), random.Random(inode).randbytes(1000)
        data = await store.read(key, 0, 1000)
        assert data is None or data == content
        hits += data is not None
        await store.write(key, 0, content)
        assert store.degraded or await store.read(key, 0, 1000) == content
    await store.close()
    assert hits >= hits_wanted, hits

trio.run(main, 0)
trio.run(main, 40)
"""


async def fill(directory: Path) -> None:
    async with opened(directory) as store:
        for inode in range(40):
            await store.write(FileKey(InodeId(inode), DataVersion(1)), 0,
                              random.Random(inode).randbytes(1000))


def use_the_damaged_cache(directory: Path) -> None:
    """Twice, in a process of its own so that a crash is seen; the second time it is whole."""
    done = subprocess.run(
        [sys.executable, "-c", USE_THE_CACHE, str(directory)], cwd=ROOT, capture_output=True,
        text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)


@pytest.mark.parametrize("damage", ["byte", "page", "cut"])
@pytest.mark.parametrize("seed", range(2))
async def test_no_damage_to_the_index_crashes_the_process(
    tmp_path: Path, damage: str, seed: int
) -> None:
    await fill(tmp_path)
    database, choose = tmp_path / "index" / "data.mdb", random.Random(seed)
    size = database.stat().st_size
    match damage:
        case "byte":
            flip(database, choose.randrange(size))
        case "page":
            flip(database, choose.randrange(size // 4096) * 4096, count=4096)
        case "cut":
            os.truncate(database, choose.randrange(size))

    use_the_damaged_cache(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\0" * 65536])
async def test_an_index_that_is_none_is_rebuilt_empty(tmp_path: Path, content: bytes) -> None:
    await fill(tmp_path)
    (tmp_path / "index" / "data.mdb").write_bytes(content)
    async with opened(tmp_path) as store:
        assert store.statistics().chunk_count == 0
        await store.write(FILE, 0, b"page")
        assert await store.read(FILE, 0, 4) == b"page"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 99}', b"\xff"])
async def test_an_unreadable_state_file_means_nothing_is_believed(
    tmp_path: Path, content: bytes
) -> None:
    async with opened(tmp_path) as store:
        await store.write(FILE, 0, b"page")
    (tmp_path / "state").write_bytes(content)
    async with opened(tmp_path) as store:
        assert await store.read(FILE, 0, 4) is None


# -- kill -9 ------------------------------------------------------------------------------------

WRITE_FOR_EVER = """
import itertools, sys, trio
from pathlib import Path
from filer.cache.layout import FileKey, PAGE_BYTES
from filer.cache.pages import PageStore
from filer.settings import CacheSettings

async def main():
    store = await PageStore.open(Path(sys.argv[1]), CacheSettings(), boot_id="boot")
    updated = FileKey(1, 1)
    await store.update(updated, 0, bytes(PAGE_BYTES), PAGE_BYTES)

    async def write():
        for page in itertools.count():
            await store.write(FileKey(2, 1), page, bytes([page % 251]) * PAGE_BYTES)
            print("wrote", page, flush=True)

    async def update():
        for number in itertools.count(1):
            fill = bytes([number % 251])
            await store.update(updated, 0, fill * PAGE_BYTES, PAGE_BYTES)
            await store.update(updated, 100_000, fill * 100_000, PAGE_BYTES)
            print("updated", number, flush=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        nursery.start_soon(update)

trio.run(main)
"""


def write_until_killed(directory: Path, after: int) -> dict[str, int]:
    """Kill a writing process at its *after*-th word.  Returns: the last number of each word."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITE_FOR_EVER, str(directory)], cwd=ROOT,
        stdout=subprocess.PIPE, text=True,
    ) as process:
        assert process.stdout is not None
        acknowledged = {"wrote": -1, "updated": 0}
        for count, line in enumerate(process.stdout):
            if count == after:
                process.send_signal(signal.SIGKILL)
            if line.endswith("\n"):
                word, number = line.split()
                acknowledged[word] = int(number)
    return acknowledged


@pytest.mark.parametrize("seed", range(3))
async def test_kill_dash_nine_loses_nothing_acknowledged_and_leaves_nothing_torn(
    tmp_path: Path, seed: int
) -> None:
    acknowledged = write_until_killed(tmp_path, random.Random(seed).randrange(5, 60))

    async with opened(tmp_path) as store:
        for page in range(acknowledged["wrote"] + 1):
            data = await store.read(FileKey(InodeId(2), DataVersion(1)), page * MIB,
                                    (page + 1) * MIB)
            assert data == bytes([page % 251]) * PAGE_BYTES
        updated = await store.read(FileKey(InodeId(1), DataVersion(1)), 0, PAGE_BYTES)
        if updated is not None:
            last = acknowledged["updated"]
            fills = {updated[0], updated[150_000]}
            assert fills <= {last % 251, (last + 1) % 251}
            assert updated == (
                bytes([updated[0]]) * 100_000 + bytes([updated[150_000]]) * 100_000
                + bytes([updated[0]]) * (PAGE_BYTES - 200_000))
        assert store.statistics().corrupt_pages == 0


# -- disks that are full or fail ----------------------------------------------------------------

@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 that `fail` turns read-only under its users, as it does itself on an error."""
    image, mount = tmp_path / "image", tmp_path / "disk"
    mount.mkdir()
    with open(image, "wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def fail(mount: Path) -> None:
    subprocess.run(["mount", "-o", "remount,abort", str(mount)], check=False,
                   capture_output=True)


def fill_up(mount: Path) -> Path:
    """Take all free space with one file."""
    hog = mount / "hog"
    with open(hog, "wb") as file:
        status = os.statvfs(mount)
        os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_frsize)
    return hog


async def recovered(store: PageStore, clock: MockClock) -> None:
    clock.rate = 200
    while True:
        if not store.degraded:
            break
        await trio.sleep(1)
    clock.rate = 0


async def test_a_cache_larger_than_its_disk_keeps_to_what_fits(tiny_disk: Path) -> None:
    async with opened(tiny_disk / "cache") as store:
        for page in range(80):
            await store.write(FILE, page, page_bytes(page))
            status = os.statvfs(tiny_disk)
            assert status.f_bavail > 0
        kept = [page for page in range(80) if page not in store.missing(FILE, 0, 80 * MIB)]

        assert len(kept) > 8
        for page in kept:
            assert await store.read(FILE, page * MIB, (page + 1) * MIB) == page_bytes(page)
        assert store.degraded is None


async def test_a_disk_filled_by_others_is_an_alarm_and_heals_by_itself(
    tiny_disk: Path, mock_clock: MockClock
) -> None:
    async with opened(tiny_disk / "cache") as store:
        await store.write(FILE, 0, page_bytes(0))
        hog = fill_up(tiny_disk)
        for page in range(1, 5):
            await store.write(FILE, page, page_bytes(page))

        assert store.degraded is not None
        assert metrics.CACHE_DEGRADED._value.get() == 1
        assert store.statistics().writes_dropped > 0
        for page in range(5):
            data = await store.read(FILE, page * MIB, (page + 1) * MIB)
            assert data is None or data == page_bytes(page)

        hog.unlink()
        await recovered(store, mock_clock)
        assert metrics.CACHE_DEGRADED._value.get() == 0
        await store.write(FILE, 7, page_bytes(7))
        assert await store.read(FILE, 7 * MIB, 8 * MIB) == page_bytes(7)


async def test_a_disk_that_turned_read_only_still_serves_what_it_has(
    failing_disk: Path,
) -> None:
    async with opened(failing_disk / "cache") as store:
        await store.write(FILE, 0, page_bytes(0))
        fail(failing_disk)
        await store.write(FILE, 1, page_bytes(1))

        assert "Read-only" in (store.degraded or "")
        assert await store.read(FILE, 0, MIB) == page_bytes(0)
        assert await store.read(FILE, MIB, 2 * MIB) is None


async def test_what_cannot_be_made_invalid_on_a_failed_disk_is_not_read_again(
    failing_disk: Path,
) -> None:
    async with opened(failing_disk / "cache") as store:
        other = FileKey(InodeId(6), DataVersion(1))
        for key in (FILE, other):
            await store.write(key, 0, page_bytes(0))
        fail(failing_disk)
        await store.update(FILE, 10, b"flushed", PAGE_BYTES)
        store.drop(other)

        assert await store.read(FILE, 0, MIB) is None
        assert await store.read(other, 0, MIB) is None
        assert store.degraded is not None


async def lose_the_index(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write small files until the index, which had been given little room, is full."""
    for inode in range(1000, 5000):
        await store.write(FileKey(InodeId(inode), DataVersion(1)), 0, b"x")
        if store.degraded:
            break
    assert "MDB_MAP_FULL" in (store.degraded or "")
    monkeypatch.undo()


async def test_invalidations_missed_while_the_index_was_away_are_made_good(
    tmp_path: Path, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("filer.cache.index.MAP_BYTES", 256 << 10)
    keys = [FileKey(InodeId(inode), DataVersion(1)) for inode in range(4)]
    async with opened(tmp_path) as store:
        for key in keys:
            await store.write(key, 0, page_bytes(0))
        await lose_the_index(store, monkeypatch)
        await store.update(keys[0], 10, b"flushed", PAGE_BYTES)
        store.drop(keys[1])
        store.drop_from(keys[2], 100)
        assert await store.read(keys[3], 0, MIB) is None
        await recovered(store, mock_clock)

        for key in keys[:3]:
            assert await store.read(key, 0, MIB) is None
        assert await store.read(keys[3], 0, MIB) == page_bytes(0)


async def test_updates_caught_by_the_loss_of_the_index_are_not_forgotten(
    tmp_path: Path, mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("filer.cache.index.MAP_BYTES", 256 << 10)
    last = 0
    async with opened(tmp_path) as store:
        await store.write(FILE, 0, bytes(PAGE_BYTES))
        await store.write(FILE, 1, bytes(PAGE_BYTES))

        async def update_often(start: int) -> None:
            nonlocal last
            while not store.degraded:
                last += 1
                await store.update(FILE, start, bytes([last % 251]) * 100, 2 * PAGE_BYTES)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(update_often, 1000)
            nursery.start_soon(update_often, 1000)
            await lose_the_index(store, monkeypatch)
        await store.update(FILE, 1000, b"\xff" * 100, 2 * PAGE_BYTES)
        await recovered(store, mock_clock)

        assert await store.read(FILE, 1000, 1100) in (None, b"\xff" * 100)


async def test_a_process_killed_while_its_index_was_away_starts_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last invalidations are lost, so nothing of the index can be believed."""
    monkeypatch.setattr("filer.cache.index.MAP_BYTES", 256 << 10)
    async with opened(tmp_path / "live") as store:
        await store.write(FILE, 0, page_bytes(0))
        await lose_the_index(store, monkeypatch)
        await store.update(FILE, 10, b"flushed", PAGE_BYTES)
        shutil.copytree(tmp_path / "live", tmp_path / "left-behind")
    async with opened(tmp_path / "left-behind") as successor:
        assert await successor.read(FILE, 0, MIB) is None


async def test_a_cache_directory_that_cannot_be_made_degrades_and_heals(
    tmp_path: Path, mock_clock: MockClock
) -> None:
    (tmp_path / "cache").write_bytes(b"a file where the directory should be")
    async with opened(tmp_path / "cache") as store:
        assert store.degraded is not None
        await store.write(FILE, 0, b"page")
        store.drop_inode(FILE.inode)
        assert await store.read(FILE, 0, 4) is None
        assert store.missing(FILE, 0, 4) == [0]

        (tmp_path / "cache").unlink()
        await recovered(store, mock_clock)
        await store.write(FILE, 0, b"page")
        assert await store.read(FILE, 0, 4) == b"page"
