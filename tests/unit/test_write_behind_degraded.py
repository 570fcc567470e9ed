"""The local disk is full or fails: clients go on, at the speed of the core filer."""

from __future__ import annotations

import errno

import pytest
import trio

from filer.errors import Refused
from tests.sim.write_behind_rig import SCRATCH, Rig


async def test_a_full_disk_turns_writes_into_stable_writes_of_the_core_filer():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f")
        rig.disk.capacity_bytes = 0
        await rig.write(inode, 0, b"bytes")
        await rig.set_size(inode, 8)
        rig.core.lose_unstable()
        assert await rig.core_content(inode) == b"bytes\0\0\0"
        assert service.dirty(inode) is None
        assert "No space left" in service.statistics().degraded
        assert rig.namespace.events == ["through", "through"]


async def test_what_was_dirty_is_flushed_before_anything_is_written_past_it(autojump_clock):
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f")
        await rig.write(inode, 0, b"first, in the log")
        rig.disk.capacity_bytes = rig.disk.used_bytes + 500
        await rig.write(inode, 0, b"FIRST" + bytes(1000))
        assert service.dirty(inode) is None
        assert await rig.core_content(inode) == b"FIRST" + bytes(1000)
    rig.disk.crash()
    async with rig.running() as service:
        await service.drain()
        assert await rig.core_content(inode) == b"FIRST" + bytes(1000)
        assert rig.namespace.conflicts == []


async def test_the_log_is_used_again_when_there_is_room(autojump_clock):
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f")
        rig.disk.capacity_bytes = 0
        await rig.write(inode, 0, b"through")
        rig.disk.capacity_bytes = None
        await trio.sleep(60)
        assert service.statistics().degraded == ""
        await rig.write(inode, 0, b"behind!")
        assert service.dirty(inode) is not None
        await service.drain()
        assert await rig.core_content(inode) == b"behind!"
        assert rig.namespace.conflicts == []


async def test_a_sync_whose_fsync_fails_returns_when_the_core_filer_has_it():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f")
        await rig.write(inode, 0, b"bytes")
        rig.disk.fail_syncs = errno.EIO
        await service.sync(inode)
        rig.core.lose_unstable()
        assert await rig.core_content(inode) == b"bytes"
        assert "Input/output error" in service.statistics().degraded
        assert rig.disk.contents() == {}


async def test_scratch_files_are_refused_when_the_log_is_out_of_use():
    rig = Rig(policy=SCRATCH)
    async with rig.running():
        inode = await rig.create(b"f")
        rig.disk.capacity_bytes = 0
        with pytest.raises(Refused) as refused:
            await rig.write(inode, 0, b"x")
        assert refused.value.errno == errno.ENOSPC
        assert await rig.core_content(inode) == b""


async def test_a_scratch_volume_that_is_full_says_so():
    rig = Rig(policy=SCRATCH, dirty_bytes_max=1000)
    async with rig.running():
        inode = await rig.create(b"f")
        await rig.write(inode, 0, bytes(900))
        with pytest.raises(Refused) as refused:
            await rig.write(inode, 900, bytes(200))
        assert refused.value.errno == errno.ENOSPC


async def test_damaged_dirty_bytes_are_never_flushed():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f", b"what the core filer has")
        await rig.write(inode, 0, b"precious")
        for content in rig.disk._names.values():
            content.now[-1] ^= 1
        report = await service.flush()
        assert report.errors == {inode: errno.EIO}
        assert await rig.core_content(inode) == b"what the core filer has"
        assert service.dirty(inode) is not None
