"""Scratch files end with their time to live, and their bytes leave the log."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from filer.core_filer.memory import MemoryCoreFiler
from filer.disk import LocalDisk
from filer.expiry import ScratchExpiry
from filer.ids import Epoch, NodeId
from filer.leases.table import StandaloneLeases
from filer.namespace.service import Namespace
from filer.namespace.store import NameStore
from filer.namespace.table import InodeTable
from filer.policies import POLICIES
from filer.settings import WriteBehindSettings
from filer.vfs.kernel import RecordingKernelCaches
from filer.write_behind.service import FileIdentity, WriteBehind

TTL_S = 100.0


class Scratch:
    """A scratch volume without file data: names, log, and a clock that the test sets."""

    def __init__(self, path: Path, nursery: trio.Nursery) -> None:
        self.path, self.nursery = path, nursery
        self.now_ns = 10**18
        self.core = MemoryCoreFiler(wall_clock=lambda: self.now_ns)
        self.kernel = RecordingKernelCaches()

    async def open(self) -> Scratch:
        policy = POLICIES["scratch"]
        store = NameStore(self.path / "names")
        self.log = await WriteBehind.open(
            disk=LocalDisk(self.path / "log"), core=self.core, settings=WriteBehindSettings(),
            policy=policy, epoch=Epoch(1), node=NodeId("n"), observer=None,  # type: ignore
            wall_clock_ns=lambda: self.now_ns)
        table = InodeTable(
            store, self.core.root, await self.core.getattr(self.core.root),
            inodes_in_memory_max=1000, random=Random(1), changed=lambda inode, change: None,
            overlay=lambda inode: None, is_dirty=lambda i: self.log.dirty(i) is not None)
        self.names = Namespace(
            self.core, store, table, StandaloneLeases(), verify_s=None,
            directory_entries_in_memory_max=10_000, wall_clock_ns=lambda: self.now_ns,
            background=self.nursery, discard=lambda inode: self.log.discard(inode.id))
        self.expiry = ScratchExpiry(
            self.names, self.log, self.kernel, time_to_live_s=TTL_S,
            wall_clock_ns=lambda: self.now_ns)
        return self

    async def write(self, name: bytes) -> None:
        root = self.names.table.root
        inode = await self.names.lookup(root, name)
        if inode is None:
            inode = await self.names.create(root, name, 0o644, 0, 0, False)
        file = FileIdentity(inode.id, inode.handle, inode.core, inode.data_version)
        await self.log.write(file, 0, b"scratch", self.now_ns)

    async def names_left(self) -> set[bytes]:
        names = await self.names.listed(self.names.table.root)
        return {name for _, name, _ in names.since(0)}


@pytest.fixture
async def scratch(tmp_path, nursery):
    return await Scratch(tmp_path, nursery).open()


async def test_a_file_lives_for_its_time_since_the_last_write(scratch):
    await scratch.write(b"old")
    await scratch.write(b"kept")
    scratch.now_ns += int(60e9)
    await scratch.write(b"kept")
    scratch.now_ns += int(60e9)

    assert await scratch.expiry.remove_expired() == 1

    assert await scratch.names_left() == {b"kept"}
    assert ("name", 1, b"old") in scratch.kernel.calls


async def test_the_bytes_of_an_expired_file_leave_the_log_when_nobody_has_it_open(scratch):
    await scratch.write(b"old")
    [inode] = scratch.log.dirty_inodes()
    scratch.now_ns += int(200e9)
    await scratch.expiry.remove_expired()
    assert scratch.log.dirty_inodes() == [inode], "it may be open"

    scratch.names.forgotten(inode)
    await trio.testing.wait_all_tasks_blocked()

    assert scratch.log.dirty_inodes() == []


async def test_the_core_filer_never_sees_scratch_bytes(scratch):
    await scratch.write(b"a")
    scratch.now_ns += int(10e9)

    assert await scratch.expiry.remove_expired() == 0

    assert scratch.core.behind.read("a") == b""
