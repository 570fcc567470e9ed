"""Write-behind from a client's point of view: acknowledged, visible, durable, flushed."""

from __future__ import annotations

import errno

import pytest
import trio

from filer.errors import Refused
from tests.sim.write_behind_rig import AT_ONCE, LATER, SCRATCH, THROUGH, Rig


async def test_a_write_is_visible_at_once_and_reaches_the_core_filer_with_a_flush():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"shot.exr", b"old bytes")
        await rig.write(inode, 4, b"BYTES and more")

        assert await rig.view(inode) == b"old BYTES and more"
        assert await rig.core_content(inode) == b"old bytes"

        report = await service.flush()
        assert (report.files, report.bytes, report.errors) == (1, 14, {})
        assert await rig.core_content(inode) == b"old BYTES and more"
        assert service.dirty(inode) is None


async def test_the_core_filer_gets_the_mtime_that_clients_were_told():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f")
        await service.write(rig.namespace.files[inode], 0, b"x", 1_111_000_000_000_000_001)
        await service.flush([inode])
        attributes = await rig.core.getattr(rig.namespace.files[inode].handle)
        assert attributes.mtime_ns == 1_111_000_000_000_000_001


async def test_kill_loses_nothing_that_was_written():
    rig = Rig()
    async with rig.running():
        inode = await rig.create(b"f", b"0123456789")
        await rig.write(inode, 2, b"ab")
        await rig.set_size(inode, 3)
        await rig.set_size(inode, 6)
    async with rig.running() as service:
        assert await rig.view(inode) == b"01a\0\0\0"
        await service.flush()
        assert await rig.core_content(inode) == b"01a\0\0\0"


async def test_a_crash_of_the_machine_loses_nothing_that_was_synced():
    for seed in range(20):
        rig = Rig(seed=seed)
        async with rig.running() as service:
            inode = await rig.create(b"f")
            await rig.write(inode, 0, b"stable")
            await service.sync(inode)
            await rig.write(inode, 6, b"?")
        rig.disk.crash()
        async with rig.running():
            assert await rig.view(inode) in (b"stable", b"stable?")


async def test_dirty_files_are_flushed_after_the_delay_of_the_policy(autojump_clock):
    rig = Rig(policy=AT_ONCE)
    async with rig.running() as service:
        inode = await rig.create(b"f")
        await rig.write(inode, 0, b"x")
        await trio.sleep(AT_ONCE.write_back_s / 2)
        assert service.dirty(inode) is not None
        await trio.sleep(AT_ONCE.write_back_s)
        assert service.dirty(inode) is None
        assert await rig.core_content(inode) == b"x"


async def test_with_write_through_a_sync_returns_when_the_core_filer_has_it():
    rig = Rig(policy=THROUGH)
    async with rig.running() as service:
        inode = await rig.create(b"f")
        await rig.write(inode, 0, b"x" * 100_000)
        await service.sync(inode)
        rig.core.lose_unstable()
        assert await rig.core_content(inode) == b"x" * 100_000


async def test_scratch_files_are_never_flushed(autojump_clock):
    rig = Rig(policy=SCRATCH)
    async with rig.running() as service:
        inode = await rig.create(b"f")
        await rig.write(inode, 0, b"x")
        await trio.sleep(80_000)
        report = await service.flush()
        assert report.errors == {inode: errno.EOPNOTSUPP}
        assert await rig.view(inode) == b"x"
        assert await rig.core_content(inode) == b""


async def test_a_write_during_a_flush_stays_dirty_and_is_flushed_next():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f")
        await rig.write(inode, 0, b"first")
        with rig.core.hold("write") as gate:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.flush)
                await gate.wait_arrived()
                await rig.write(inode, 3, b"second")
                gate.open()
        assert await rig.view(inode) == b"firsecond"
        assert service.dirty(inode) is not None
        assert await rig.core_content(inode) == b"first"
        await service.flush()
        assert await rig.core_content(inode) == b"firsecond"
        assert rig.namespace.conflicts == []


async def test_a_truncation_during_a_flush_hides_what_the_flush_writes():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f", b"0123456789")
        await rig.write(inode, 8, b"abcd")
        with rig.core.hold("write") as gate:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.flush)
                await gate.wait_arrived()
                await rig.set_size(inode, 4)
                await rig.set_size(inode, 9)
                gate.open()
        assert await rig.view(inode) == b"0123\0\0\0\0\0"
        await service.flush()
        assert await rig.core_content(inode) == b"0123\0\0\0\0\0"


async def test_a_discarded_file_is_not_flushed_even_after_a_restart():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f", b"old")
        await rig.write(inode, 0, b"new")
        await service.discard(inode)
        assert service.dirty(inode) is None
    async with rig.running() as service:
        assert service.dirty_inodes() == []
        await service.drain()
        assert await rig.core_content(inode) == b"old"


async def test_no_space_in_the_core_filer_reaches_the_writer_and_heals(autojump_clock):
    rig = Rig(policy=AT_ONCE)
    async with rig.running() as service:
        inode = await rig.create(b"f")
        rig.core.fail_next("write", Refused(errno.ENOSPC), times=1)
        await rig.write(inode, 0, b"x")
        report = await service.flush()
        assert report.errors == {inode: errno.ENOSPC}
        assert service.statistics().errors == {"ENOSPC": 1}
        for attempt in (rig.write(inode, 1, b"y"), service.sync(inode)):
            with pytest.raises(Refused) as refused:
                await attempt
            assert refused.value.errno == errno.ENOSPC
        assert await rig.view(inode) == b"x"
        await trio.sleep(60)
        assert service.flush_errors() == []
        await rig.write(inode, 1, b"y")
        await service.flush()
        assert await rig.core_content(inode) == b"xy"
        assert rig.namespace.conflicts == []


async def test_a_restart_of_the_core_filer_that_loses_unstable_data_is_made_good():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f")
        data = bytes(range(256)) * 1024
        await rig.write(inode, 0, data)
        with rig.core.hold("commit") as gate:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(service.flush)
                await gate.wait_arrived()
                rig.core.lose_unstable()
                gate.open()
        rig.core.lose_unstable()
        assert await rig.core_content(inode) == data


async def test_writers_wait_while_too_much_is_dirty_and_go_on_after_an_outage(autojump_clock):
    rig = Rig(policy=LATER, dirty_bytes_max=100_000)
    async with rig.running() as service:
        inode = await rig.create(b"f")
        other = await rig.create(b"g")
        rig.core.disconnect()
        await rig.write(inode, 0, b"a" * 90_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.write, other, 0, b"b" * 50_000)
            await trio.sleep(1000)
            assert service.dirty(other) is None
            assert await rig.service.read_dirty(inode, 0, 1) == [(0, b"a")]
            rig.core.reconnect()
        await service.drain()
        assert await rig.core_content(other) == b"b" * 50_000


async def test_a_change_behind_us_keeps_both():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"scene.ma", b"common start, old end")
        rig.namespace.clean[inode] = b"common start, old end"
        await rig.write(inode, 14, b"OUR")
        handle = rig.namespace.files[inode].handle
        await rig.core.write(handle, 0, b"theirs", stable=True)

        report = await service.flush()

        assert report.errors == {}
        [(_, name, attributes)] = rig.namespace.conflicts
        assert name.startswith(b"scene.ma.conflict-n1-20")
        assert await rig.named(name) == b"common start, OUR end"
        assert (await rig.core_content(inode)).startswith(b"theirs")
        assert attributes.version == (await rig.core.getattr(handle)).version
        assert service.dirty(inode) is None
        assert service.statistics().conflicts == 1
