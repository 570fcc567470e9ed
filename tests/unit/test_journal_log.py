"""The log's mechanism: order, batching, group fsync, trimming, and a disk that refuses."""

from __future__ import annotations

import errno

import pytest
import trio

from filer.disk import LocalDisk
from filer.errors import Corrupt
from filer.ids import Epoch, InodeId
from filer.journal.log import JournalUnavailable, Log
from filer.journal.record import Logged, Probe, SegmentStart, Write
from tests.sim.disk import SimDisk


async def opened(disk, *, segment_bytes: int = 1 << 20) -> tuple[Log, list[Logged]]:
    replayed: list[Logged] = []
    log = await Log.open(
        disk, node="n1", epoch=Epoch(1), segment_bytes=segment_bytes,
        wall_clock_ns=lambda: 0, replay=replayed.append)
    return log, [x for x in replayed if not isinstance(x.record, SegmentStart)]


def write(number: int, data: bytes = b"data") -> Write:
    return Write(InodeId(number), 0, 0, data)


def numbers(logged: list[Logged]) -> list[int]:
    return [x.record.inode for x in logged]


async def test_concurrent_appends_are_written_in_order_and_all_at_once():
    disk = SimDisk()
    log, _ = await opened(disk)
    await log.append([Probe()])
    found: dict[int, Logged] = {}

    async def append(number: int) -> None:
        [found[number]] = await log.append([write(number)])

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(append, number)
    disk.kill()
    _, replayed = await opened(disk)
    writes = [x for x in replayed if isinstance(x.record, Write)]
    assert sorted(numbers(writes)) == list(range(20))
    assert [x.lsn for x in writes] == sorted(x.lsn for x in found.values())
    # One by one the first, then all that had gathered behind it.
    [content] = disk._names.values()
    assert len(content.unsynced) <= 4


async def test_an_append_is_not_undone_by_a_cancellation():
    disk = SimDisk()
    log, _ = await opened(disk)
    with trio.CancelScope() as scope:
        scope.cancel()
        await log.append([write(1)])
    await log.append([write(2)])
    disk.kill()
    _, replayed = await opened(disk)
    assert numbers(replayed) == [1, 2]


async def test_many_who_sync_share_one_fsync():
    disk = SimDisk()
    log, _ = await opened(disk)
    await log.append([write(1)])
    before = disk.sync_count
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(log.sync)
    assert disk.sync_count == before + 1
    assert log.stable_end == log.end


async def test_a_sync_with_nothing_new_touches_no_disk():
    disk = SimDisk()
    log, _ = await opened(disk)
    await log.append([write(1)])
    await log.sync()
    before = disk.sync_count
    await log.sync()
    assert disk.sync_count == before


async def test_segments_below_what_is_needed_are_removed_and_the_rest_is_replayed():
    disk = SimDisk()
    log, _ = await opened(disk, segment_bytes=200)
    appended = [(await log.append([write(number)]))[0] for number in range(10)]
    assert len(disk.contents()) > 3

    await log.trim(appended[7].lsn)

    assert log.byte_count < 600
    disk.crash()
    _, replayed = await opened(disk)
    assert numbers(replayed)[-3:] == [7, 8, 9]


async def test_a_pin_keeps_what_is_being_read():
    disk = SimDisk()
    log, _ = await opened(disk, segment_bytes=100)
    [first] = await log.append([write(1, b"to be read")])
    await log.append([write(2)])
    with log.pinned():
        await log.trim(log.end)
        assert await log.read(first.data_at, 10) == b"to be read"
    await log.trim(log.end)
    assert len(disk.contents()) == 1


async def test_a_full_disk_refuses_and_later_appends_follow_without_a_gap():
    for seed in (0, 1):  # with and without the short way
        disk = SimDisk(seed)
        log, _ = await opened(disk)
        await log.append([write(1)])
        disk.capacity_bytes = disk.used_bytes + 60
        with pytest.raises(JournalUnavailable) as refused:
            await log.append([write(2, bytes(100))])
        assert refused.value.errno == errno.ENOSPC
        disk.capacity_bytes = None
        await log.append([write(3)])
        await log.sync()
        disk.crash()
        _, replayed = await opened(disk)
        assert numbers(replayed) == [1, 3]


async def test_a_failed_append_that_cannot_be_cut_off_is_superseded():
    disk = SimDisk()
    log, _ = await opened(disk)
    await log.append([write(1)])
    for _ in range(5):
        disk.fail_writes = errno.EIO
        with pytest.raises(JournalUnavailable):
            await log.append([write(2)])
        disk.fail_writes = 0
        await log.append([write(3)])
    disk.kill()
    _, replayed = await opened(disk)
    assert numbers(replayed) == [1, 3, 3, 3, 3, 3]


async def test_nothing_of_a_failed_append_comes_back_behind_its_repetition():
    for seed in range(20):
        disk = SimDisk(seed)
        log, _ = await opened(disk)
        await log.append([write(1)])
        disk.fail_writes = errno.EIO  # any part is written, maybe all
        with pytest.raises(JournalUnavailable):
            await log.append([write(2), write(3)])
        disk.fail_writes = 0
        await log.append([write(2)])  # as long as the first one before
        disk.kill()
        _, replayed = await opened(disk)
        assert numbers(replayed) == [1, 2]


async def test_after_a_failed_fsync_nothing_before_it_is_ever_called_stable():
    disk = SimDisk()
    log, _ = await opened(disk)
    [lost] = await log.append([write(1)])
    disk.fail_syncs = errno.EIO
    with pytest.raises(JournalUnavailable):
        await log.sync()
    disk.fail_syncs = 0
    await log.append([write(2)])
    with pytest.raises(JournalUnavailable):
        await log.sync()
    assert log.stable_end <= lost.lsn

    await log.trim(log.end)
    await log.sync()
    assert log.stable_end == log.end


async def test_damage_of_what_was_written_is_found_when_it_is_read_for_a_flush():
    disk = SimDisk()
    log, _ = await opened(disk)
    [logged] = await log.append([write(1, b"precious bytes")])
    assert await log.read_verified(logged.data_at + 2, 5) == b"eciou"
    [content] = disk._names.values()
    content.now[-1] ^= 1
    with pytest.raises(Corrupt, match="offset"):
        await log.read_verified(logged.data_at + 2, 5)


async def test_damage_of_what_was_stable_stops_the_opening_and_keeps_every_byte():
    disk = SimDisk()
    log, _ = await opened(disk)
    [logged] = await log.append([write(1)])
    await log.sync()
    await log.append([write(2)])
    await log.sync()
    contents = disk.contents()
    [name] = contents
    damaged = bytearray(contents[name])
    damaged[logged.data_at - 1] ^= 1
    disk = SimDisk.holding({name: bytes(damaged)})
    with pytest.raises(Corrupt, match=f"{name} at offset"):
        await opened(disk)
    assert disk.contents() == {name: bytes(damaged)}


async def test_it_works_on_a_local_directory(tmp_path):
    disk = LocalDisk(tmp_path / "log")
    log, _ = await opened(disk, segment_bytes=1 << 20)
    big = bytes(range(256)) * 4096
    logged = [(await log.append([write(number, big)]))[0] for number in range(20)]
    small = (await log.append([write(99, b"small")]))[0]
    await log.sync()
    assert await log.read(logged[3].data_at + 100, 1000) == big[100:1100]
    assert await log.read_verified(small.data_at, 5) == b"small"
    await log.trim(logged[15].lsn)
    log.close()
    log, replayed = await opened(disk)
    assert numbers(replayed)[-6:] == [15, 16, 17, 18, 19, 99]
    assert await disk.free_bytes() > 0
    log.close()
