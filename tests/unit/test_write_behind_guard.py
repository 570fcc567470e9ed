"""The guard: whatever happened to the file behind us, nobody's bytes are lost."""

from __future__ import annotations

import errno

import pytest
import trio

from filer.core_filer.base import Handle, SetAttributes
from filer.errors import Refused
from tests.sim.write_behind_rig import Rig


async def foreign_write(rig: Rig, inode, data: bytes) -> None:
    await rig.core.write(rig.namespace.files[inode].handle, 0, data, stable=True)


async def test_a_copy_has_all_dirty_bytes_even_if_the_clean_ones_are_gone():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f", b"clean bytes nobody cached")
        await rig.write(inode, 6, b"DIRTY")
        await rig.write(inode, 30, b"END")
        await foreign_write(rig, inode, b"theirs")
        await service.flush()
        [(_, name, _)] = rig.namespace.conflicts
        assert await rig.named(name) == b"\0" * 6 + b"DIRTY" + b"\0" * 19 + b"END"


async def test_a_copy_does_not_show_what_was_truncated_away():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f", b"0123456789")
        rig.namespace.clean[inode] = b"0123456789"
        await rig.set_size(inode, 3)
        await rig.set_size(inode, 6)
        await foreign_write(rig, inode, b"theirs")
        await service.flush()
        [(_, name, _)] = rig.namespace.conflicts
        assert await rig.named(name) == b"012\0\0\0"


async def test_a_copy_has_our_mtime_and_the_owner_and_mode_of_the_original():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f")
        handle = rig.namespace.files[inode].handle
        await rig.core.setattr(handle, SetAttributes(mode=0o640, uid=7, gid=8))
        await service.write(rig.namespace.files[inode], 0, b"ours", 123_456_789)
        await foreign_write(rig, inode, b"theirs")
        await service.flush()
        [(_, name, _)] = rig.namespace.conflicts
        copy = (await rig.core.lookup(rig.core.root, name)).attributes
        assert (copy.mode & 0o777, copy.uid, copy.gid, copy.mtime_ns) == (0o640, 7, 8, 123_456_789)


async def test_two_conflicts_in_one_second_get_two_names():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f")
        for round_ in (b"1", b"2"):
            await rig.write(inode, 0, b"ours" + round_)
            await foreign_write(rig, inode, b"theirs" + round_)
            await service.flush()
        names = [name for _, name, _ in rig.namespace.conflicts]
        assert [(await rig.named(name))[:5] for name in names] == [b"ours1", b"ours2"]


async def test_the_name_of_a_copy_stays_within_what_a_directory_takes():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"n" * 255)
        await rig.write(inode, 0, b"ours")
        await foreign_write(rig, inode, b"theirs")
        await service.flush()
        [(_, name, _)] = rig.namespace.conflicts
        assert len(name) == 255
        assert b".conflict-n1-" in name


async def test_a_file_removed_behind_us_survives_as_a_copy():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f", b"old")
        rig.namespace.clean[inode] = b"old"
        await rig.write(inode, 3, b" and new")
        await rig.core.remove(rig.core.root, b"f")
        report = await service.flush()
        assert report.errors == {}
        [(_, name, attributes)] = rig.namespace.conflicts
        assert attributes is None
        assert await rig.named(name) == b"old and new"


async def test_a_file_removed_behind_us_while_it_is_flushed_survives_as_a_copy():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f")
        await rig.write(inode, 0, b"x" * 200_000)
        rig.core.fail_next("commit", Refused(errno.ESTALE))
        handle = rig.namespace.files[inode].handle
        real = rig.core.commit

        async def removed_meanwhile(handle_: Handle):
            if handle_ == handle:
                await rig.core.remove(rig.core.root, b"f")
            return await real(handle_)

        rig.core.commit = removed_meanwhile
        await service.flush()
        [(_, name, _)] = rig.namespace.conflicts
        assert await rig.named(name) == b"x" * 200_000


async def test_an_unlinked_file_that_is_gone_is_forgotten():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f")
        await rig.write(inode, 0, b"x")
        await rig.core.remove(rig.core.root, b"f")
        del rig.namespace.names[inode]
        report = await service.flush()
        assert report.errors == {}
        assert service.dirty_inodes() == []


async def test_a_change_of_mode_behind_us_is_no_conflict():
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f")
        await rig.write(inode, 0, b"ours")
        handle = rig.namespace.files[inode].handle
        await rig.core.setattr(handle, SetAttributes(mode=0o600))
        await service.flush()
        assert rig.namespace.conflicts == []
        assert await rig.core_content(inode) == b"ours"


async def test_a_conflict_after_a_flush_that_failed_part_way_is_still_noticed(autojump_clock):
    rig = Rig()
    async with rig.running() as service:
        inode = await rig.create(b"f")
        await rig.write(inode, 0, b"x" * 200_000)
        rig.core.fail_next("commit", Refused(errno.ENOSPC))
        assert (await service.flush()).errors == {inode: errno.ENOSPC}
        await foreign_write(rig, inode, b"theirs")
        assert (await service.flush()).errors == {}
        [(_, name, _)] = rig.namespace.conflicts
        assert await rig.named(name) == b"x" * 200_000
        assert (await rig.core_content(inode))[:6] == b"theirs"


@pytest.mark.parametrize("step", ["setattr", "write", "commit"])
async def test_a_flush_cut_off_by_a_restart_is_repeated_without_a_conflict(step):
    rig = Rig()
    data = bytes(range(256)) * 1024
    inode = await rig.create(b"f", b"old content")
    with rig.core.hold(step) as gate:
        async with rig.running() as service, trio.open_nursery() as nursery:
            await rig.set_size(inode, 4)
            await rig.write(inode, 8, data)
            nursery.start_soon(service.flush)
            await gate.wait_arrived()
            nursery.cancel_scope.cancel()
    async with rig.running() as service:
        await service.drain()
    assert rig.namespace.conflicts == []
    assert await rig.core_content(inode) == b"old \0\0\0\0" + data
