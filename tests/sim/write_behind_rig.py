"""A write-behind service on a simulated disk, over a core filer in memory, with a small cache."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from filer.core_filer.base import Attributes, Handle
from filer.core_filer.memory import MemoryCoreFiler
from filer.disk import Disk
from filer.ids import DataVersion, Epoch, InodeId, NodeId
from filer.policies import POLICIES, Policy
from filer.settings import WriteBehindSettings
from filer.write_behind.service import FileIdentity, WriteBehind
from tests.sim.disk import SimDisk

AT_ONCE = POLICIES["clients-bypass"]
LATER = POLICIES["read-write"]
THROUGH = POLICIES["read"]
SCRATCH = POLICIES["scratch"]


class Clock:
    """A wall clock that moves with every look at it."""

    def __init__(self) -> None:
        self.now_ns = 1_700_000_000_000_000_000

    def __call__(self) -> int:
        self.now_ns += 1000
        return self.now_ns


class Namespace:
    """The observer: keeps each file's clean version, as the namespace of a volume does."""

    def __init__(self, core: MemoryCoreFiler) -> None:
        self.core = core
        self.files: dict[InodeId, FileIdentity] = {}
        self.names: dict[InodeId, bytes] = {}
        self.conflicts: list[tuple[InodeId, bytes, Attributes | None]] = []
        self.clean: dict[InodeId, bytes] = {}
        """What a page cache would have of the clean version, whole."""
        self.events: list[str] = []

    def location(self, inode: InodeId) -> tuple[Handle, bytes] | None:
        name = self.names.get(inode)
        return None if name is None else (self.core.root, name)

    async def read_clean(self, inode: InodeId, start: int, end: int) -> bytes | None:
        await trio.lowlevel.checkpoint()
        data = self.clean.get(inode)
        return None if data is None else data[start:end]

    async def truncated(self, inode: InodeId, size: int) -> None:
        await trio.lowlevel.checkpoint()
        self.events.append(f"truncated {size}")

    async def flushed_data(self, inode: InodeId, start: int, data: bytes | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.events.append(f"data {start} {len(data)}")

    def flushed(self, inode: InodeId, attributes: Attributes) -> None:
        self.events.append("flushed")
        self._adopt(inode, attributes)

    def written_through(self, inode: InodeId, attributes: Attributes) -> None:
        self.events.append("through")
        self._adopt(inode, attributes)

    def conflict(self, inode: InodeId, name: bytes, attributes: Attributes | None) -> None:
        self.conflicts.append((inode, name, attributes))
        if attributes is not None:
            self._adopt(inode, attributes)

    def _adopt(self, inode: InodeId, attributes: Attributes) -> None:
        old = self.files[inode]
        self.files[inode] = FileIdentity(
            inode, old.handle, attributes.version, DataVersion(old.data_version + 1))


class Rig:
    """One node's write-behind over its crashes and restarts."""

    def __init__(
        self, *, disk: Disk | None = None, seed: int = 0, policy: Policy = LATER, **settings: object
    ) -> None:
        self.clock = Clock()
        self.core = MemoryCoreFiler(wall_clock=self.clock, io_bytes_max=64 << 10)
        self.disk = SimDisk(seed) if disk is None else disk
        self.namespace = Namespace(self.core)
        self.policy = policy
        self.settings = WriteBehindSettings(**settings)
        self.epoch = 0
        self.service: WriteBehind

    @asynccontextmanager
    async def running(self, *, flushing: bool = True) -> AsyncIterator[WriteBehind]:
        """From start to sudden death; ``disk.crash()`` afterwards makes it the machine's."""
        service = await self.open()
        async with trio.open_nursery() as nursery:
            if flushing:
                await nursery.start(service.run)
            yield service
            nursery.cancel_scope.cancel()
        if isinstance(self.disk, SimDisk):
            self.disk.kill()

    async def open(self) -> WriteBehind:
        self.epoch += 1
        self.service = await WriteBehind.open(
            disk=self.disk, core=self.core, settings=self.settings, policy=self.policy,
            epoch=Epoch(self.epoch), node=NodeId("n1"), observer=self.namespace,
            wall_clock_ns=self.clock)
        return self.service

    async def create(self, name: bytes, data: bytes = b"") -> InodeId:
        found = await self.core.create(self.core.root, name, mode=0o644, uid=1, gid=2)
        inode = InodeId(found.attributes.fileid)
        if data:
            await self.core.write(found.handle, 0, data, stable=True)
        attributes = await self.core.getattr(found.handle)
        self.namespace.files[inode] = FileIdentity(
            inode, found.handle, attributes.version, DataVersion(1))
        self.namespace.names[inode] = name
        return inode

    async def write(self, inode: InodeId, start: int, data: bytes) -> None:
        await self.service.write(self.namespace.files[inode], start, data, self.clock())

    async def set_size(self, inode: InodeId, size: int) -> None:
        await self.service.set_size(self.namespace.files[inode], size, self.clock())

    async def set_times(self, inode: InodeId, **times: int) -> None:
        await self.service.set_times(self.namespace.files[inode], **times)

    async def view(self, inode: InodeId) -> bytes:
        """The whole file as a client sees it."""
        dirty = self.service.dirty(inode)
        if dirty is None:
            return await self.core_content(inode)
        size, clean_limit = dirty.size, dirty.clean_limit
        parts = await self.service.read_dirty(inode, 0, size)
        clean = (await self.core_content(inode))[:clean_limit]
        result = bytearray(size)
        result[: min(size, len(clean))] = clean[:size]
        for at, data in parts:
            result[at : at + len(data)] = data
        return bytes(result)

    async def core_content(self, inode: InodeId) -> bytes:
        return await self.content_of(self.namespace.files[inode].handle)

    async def content_of(self, handle: Handle) -> bytes:
        data = b""
        while True:
            result = await self.core.read(handle, len(data), len(data) + (64 << 10))
            data += result.data
            if result.eof:
                return data

    async def named(self, name: bytes) -> bytes:
        return await self.content_of((await self.core.lookup(self.core.root, name)).handle)
