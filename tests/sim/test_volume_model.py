"""A whole volume without FUSE: random histories against a model of files in memory.

Several clients act at once through the namespace and the file data, over the real write-behind
(on a simulated disk), the real page store and reader, and a core filer in memory that others change
behind us.  The volume is crashed and opened again in between.

What is claimed: a client reads back exactly what it wrote, whatever is flushed, evicted or crashed
meanwhile; after a crash of the machine, at least what it synced; names are what it made of them;
a foreign change to a clean file is seen after the verify interval; at the end the core filer has
everything.
"""

from __future__ import annotations

import itertools
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing
from trio._core import _run

from filer.cache.pages import PageStore
from filer.cache.reader import Reader
from filer.core_filer.memory import MemoryCoreFiler
from filer.data import FileData
from filer.ids import Epoch, NodeId
from filer.leases.table import StandaloneLeases
from filer.namespace.inode import Inode
from filer.namespace.service import Namespace
from filer.namespace.store import NameStore
from filer.namespace.table import InodeTable
from filer.policies import Policy, WriteMode
from filer.settings import CacheSettings, ReadAheadSettings, WriteBehindSettings
from filer.vfs.kernel import RecordingKernelCaches
from filer.write_behind.service import WriteBehind
from tests.sim.disk import SimDisk

VERIFY_S = 5.0
POLICY = Policy("test", VERIFY_S, WriteMode.BEHIND, 2.0, "test")
MIB = 1 << 20


class World:
    def __init__(self, path: Path, seed: int) -> None:
        self.random = Random(seed)
        self.path = path
        ticks = itertools.count(10**18, 1000)
        self.now_ns = lambda: next(ticks)
        self.core = MemoryCoreFiler(wall_clock=self.now_ns)
        self.disk = SimDisk(seed)
        self.epochs = itertools.count(1)

    @asynccontextmanager
    async def volume(self):
        """One life of the volume; leaving the block is the death of its process."""
        async with AsyncExitStack() as stack:
            kernel = RecordingKernelCaches()
            self.store = NameStore(self.path / "names")
            stack.callback(self.store._environment.close)
            self.pages = await PageStore.open(
                self.path / "pages", CacheSettings(capacity_bytes=64 * MIB), boot_id="b")
            stack.push_async_callback(self.pages.close)
            background = await stack.enter_async_context(trio.open_nursery())
            stack.callback(background.cancel_scope.cancel)
            self.data = data = FileData(
                self.core, self.pages, POLICY, kernel, wall_clock_ns=self.now_ns)
            data.write_behind = await WriteBehind.open(
                disk=self.disk, core=self.core,
                settings=WriteBehindSettings(segment_bytes=4 * MIB), policy=POLICY,
                epoch=Epoch(next(self.epochs)), node=NodeId("n"), observer=data,
                wall_clock_ns=self.now_ns)
            table = InodeTable(
                self.store, self.core.root, await self.core.getattr(self.core.root),
                inodes_in_memory_max=1000, random=self.random, changed=data.changed,
                overlay=data.overlay, is_dirty=data.is_dirty)
            self.namespace = data.namespace = Namespace(
                self.core, self.store, table, StandaloneLeases(), verify_s=VERIFY_S,
                directory_entries_in_memory_max=10_000, wall_clock_ns=self.now_ns,
                background=background, discard=data.discard)
            data.reader = Reader(self.core, self.pages, ReadAheadSettings())
            await background.start(data.reader.run)
            await background.start(data.write_behind.run)
            await self.namespace.start(kernel_is_new=True)
            yield


class Client:
    """Owns a few names in the root and a model of each file's bytes."""

    NAMES = 3

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.random = Random(f"{world.random.random()}:{number}")
        self.number = number
        self.files: dict[bytes, bytes] = {}
        self.possible: dict[bytes, list[bytes]] = {}
        """What a crash of the machine may leave: every content since the last sync."""
        self.history: list[str] = []

    def _name(self) -> bytes:
        return b"c%d-%d" % (self.number, self.random.randrange(self.NAMES))

    async def act(self) -> None:
        ns, data = self.world.namespace, self.world.data
        root = ns.table.root
        name = self._name()
        inode = await ns.lookup(root, name)
        assert (inode is not None) == (name in self.files), name
        if inode is None:
            await ns.create(root, name, 0o644, 1, 2, False)
            self._set(name, b"", is_stable=True)
            return
        action = self.random.choices(
            ["write", "read", "truncate", "sync", "flush", "evict", "unlink", "rename", "foreign",
             "chmod", "times"],
            [30, 40, 8, 6, 3, 3, 3, 5, 3, 3, 3])[0]
        self.history.append(f"{trio.current_time():.1f} {action} {name!r}")
        await getattr(self, f"_{action}")(name, inode, data, ns)

    def _set(self, name: bytes, content: bytes, *, is_stable: bool = False) -> None:
        self.files[name] = content
        self.history.append(f"{trio.current_time():.1f} {name!r} = {len(content)} {is_stable}")
        self.possible[name] = [content] if is_stable else [*self.possible.get(name, []), content]

    async def _write(self, name: bytes, inode: Inode, data: FileData, ns: Namespace) -> None:
        old = self.files[name]
        start = self.random.choice([len(old), self.random.randrange(3 * MIB)])
        new = self.random.randbytes(self.random.choice([1, 100, 70_000, MIB]))
        await data.write(inode, start, new)
        padded = old.ljust(start, b"\0")
        self._set(name, padded[:start] + new + padded[start + len(new):])

    async def _read(self, name: bytes, inode: Inode, data: FileData, ns: Namespace) -> None:
        await ns.verify(inode)
        wanted = self.files[name]
        assert inode.attributes.size == len(wanted)
        start = self.random.randrange(len(wanted) + 1)
        end = start + self.random.choice([10, 4096, MIB, 5 * MIB])
        found = bytes(await data.read(inode, start, end))
        assert found == wanted[start:end], _difference(found, wanted[start:end], start)

    async def _truncate(self, name: bytes, inode: Inode, data: FileData, ns: Namespace) -> None:
        size = self.random.choice([0, self.random.randrange(3 * MIB)])
        await data.truncate(inode, size)
        self._set(name, self.files[name][:size].ljust(size, b"\0"), is_stable=True)

    async def _sync(self, name: bytes, inode: Inode, data: FileData, ns: Namespace) -> None:
        await data.sync(inode)
        self._set(name, self.files[name], is_stable=True)

    async def _flush(self, name: bytes, inode: Inode, data: FileData, ns: Namespace) -> None:
        report = await data.flush([inode.id])
        assert not report.errors
        assert self.world.core.behind.read(name) == self.files[name]
        self._set(name, self.files[name], is_stable=True)

    async def _evict(self, name: bytes, inode: Inode, data: FileData, ns: Namespace) -> None:
        data.reader.forget(inode.id)
        self.world.pages.drop_inode(inode.id)

    async def _unlink(self, name: bytes, inode: Inode, data: FileData, ns: Namespace) -> None:
        await ns.unlink(ns.table.root, name, False)
        del self.files[name], self.possible[name]
        ns.forgotten(inode.id)

    async def _rename(self, name: bytes, inode: Inode, data: FileData, ns: Namespace) -> None:
        new_name = self._name()
        if new_name == name:
            return
        await ns.rename(ns.table.root, name, ns.table.root, new_name, 0, False)
        self.files[new_name] = self.files.pop(name)
        self.possible[new_name] = self.possible.pop(name)

    async def _foreign(self, name: bytes, inode: Inode, data: FileData, ns: Namespace) -> None:
        """Somebody else changes the file, while it is clean here."""
        await data.flush([inode.id])
        if data.is_dirty(inode.id):
            return
        content = self.random.randbytes(self.random.randrange(2 * MIB))
        self.world.core.behind.write(name, content)
        self._set(name, content, is_stable=True)
        await trio.sleep(VERIFY_S + 1)

    async def _chmod(self, name: bytes, inode: Inode, data: FileData, ns: Namespace) -> None:
        from filer.core_filer.base import SetAttributes

        mode = self.random.randrange(0o1000)
        await ns.set_attributes(inode, SetAttributes(mode=mode))
        assert inode.attributes.mode & 0o777 == mode

    async def _times(self, name: bytes, inode: Inode, data: FileData, ns: Namespace) -> None:
        stamp = self.random.randrange(10**18)
        await data.set_times(inode, None, stamp)
        assert inode.attributes.mtime_ns == stamp
        await data.sync(inode)
        self._set(name, self.files[name], is_stable=True)

    def after_machine_crash(self, read: dict[bytes, bytes]) -> None:
        for name, content in read.items():
            assert content in self.possible[name], (
                name, [_difference(content, possible) for possible in self.possible[name]],
                "\n".join(h for h in self.history if repr(name) in h or "rename" in h))
            self._set(name, content, is_stable=True)


def _difference(found: bytes, wanted: bytes, start: int = 0) -> str:
    if len(found) != len(wanted):
        return f"{len(found)} bytes, not {len(wanted)}"
    differing = [at for at in range(len(found)) if found[at] != wanted[at]]
    if not differing:
        return "equal"
    first, last = differing[0], differing[-1]
    zeros = not any(found[first:last + 1])
    return f"differs in [{start + first}, {start + last + 1}), {(zeros and 'zeros there') or ''}"


async def _history(seed: int, path: Path, lives: int, acts: int) -> None:
    world = World(path, seed)
    clients = [Client(world, number) for number in range(3)]

    async def run(client: Client) -> None:
        for _ in range(acts):
            await client.act()
            await trio.sleep(client.random.choice([0, 0, 0.1, 1]))

    for _ in range(lives):
        async with world.volume():
            for client in clients:  # after the last crash
                await _check(world, client)
            async with trio.open_nursery() as nursery:
                for client in clients:
                    nursery.start_soon(run, client)
        if world.random.random() < 0.5:
            world.disk.crash()
    async with world.volume():
        for client in clients:
            await _check(world, client)
        report = await world.data.flush(None)
        assert not report.errors
        for client in clients:
            for name, content in client.files.items():
                assert world.core.behind.read(name) == content


async def _check(world: World, client: Client) -> None:
    ns = world.namespace
    found = {}
    for name in client.files:
        inode = await ns.lookup(ns.table.root, name)
        assert inode is not None, name
        await ns.verify(inode)
        found[name] = bytes(await world.data.read(inode, 0, 10 * MIB))
        assert len(found[name]) == inode.attributes.size, (
            name, len(found[name]), inode.attributes, inode.core, inode.verified_at,
            trio.current_time(), world.data.is_dirty(inode.id), inode is ns.table.find(inode.id))
    client.after_machine_crash(found)


@pytest.mark.parametrize("seed", range(12))
def test_clients_read_what_they_wrote_through_flushes_evictions_and_crashes(seed, tmp_path):
    print(f"seed {seed}")
    _run._ALLOW_DETERMINISTIC_SCHEDULING = True
    _run._r.seed(seed)
    try:
        trio.run(
            _history, seed, tmp_path, 4, 25,
            clock=trio.testing.MockClock(autojump_threshold=0.002))
    finally:
        _run._ALLOW_DETERMINISTIC_SCHEDULING = False
