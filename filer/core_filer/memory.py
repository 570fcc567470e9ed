"""A core filer in memory: for tests and simulation, with faults on demand.

Owns the protocol's manners over a `Tree`: yield points, handles, counters, faults, gates.
Everything the contract of ``base.py`` says holds, so whatever passes over this one and fails
over a NAS is a gap in the contract suite.
"""

from __future__ import annotations

import errno
import stat
import struct
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

import trio

from filer.core_filer.base import (
    Attributes,
    CommitResult,
    CoreFilerState,
    DirectoryEntry,
    FileSystemStatistics,
    Found,
    Handle,
    ReadResult,
    SetAttributes,
    WriteResult,
)
from filer.core_filer.memory_tree import RENAME_EXCHANGE, Inode, Tree
from filer.core_filer.observed import observed, report_reachable
from filer.core_filer.repeats import Wanted
from filer.errors import Refused

_HANDLE = struct.Struct(">4sQQ")
_MAGIC = b"mem1"
_READDIR_BATCH = 128
_UNLIMITED_BYTES = 1 << 50
_FILES = 1 << 20


class Gate:
    """Operations that arrive wait here until it is opened."""

    def __init__(self) -> None:
        self.arrived = 0
        self._open = trio.Event()
        self._arrival = trio.Event()

    def open(self) -> None:
        self._open.set()

    async def wait_arrived(self, count: int = 1) -> None:
        """Until *count* operations have reached the gate."""
        while self.arrived < count:
            self._arrival = trio.Event()
            await self._arrival.wait()

    async def pass_through(self) -> None:
        self.arrived += 1
        self._arrival.set()
        await self._open.wait()


class MemoryCoreFiler:
    """*wall_clock* returns nanoseconds since 1970; times never repeat even if it does.

    Operations are named for faults, gates and counters as the methods of ``CoreFiler``.
    """

    def __init__(
        self, *, wall_clock: Callable[[], int], io_bytes_max: int = 1 << 20,
        capacity_bytes: int | None = None,
    ) -> None:
        self.tree = Tree(wall_clock)
        self.tree.capacity_bytes = capacity_bytes
        self.behind = Behind(self.tree)
        self.calls: Counter[str] = Counter()
        self.latency_s = 0.0
        """How long every operation takes; spent before it is applied."""
        self._io_bytes_max = io_bytes_max
        self._faults: dict[str, deque[tuple[Exception, bool]]] = defaultdict(deque)
        self._gates: dict[str, Gate] = {}
        self._restarts = 0
        self._in_flight = 0
        self._outage: Gate | None = None
        self._outage_since_s: float | None = None
        self._outage_reason = ""
        self._reconnects = 0
        report_reachable(True)

    # --- Faults

    def fail_next(
        self, operation: str, exception: Exception, *, applied: bool = False, times: int = 1
    ) -> None:
        """The next *times* such operations raise; *applied*: after having been done."""
        self._faults[operation].extend([(exception, applied)] * times)

    @contextmanager
    def hold(self, operation: str) -> Iterator[Gate]:
        """Such operations wait, not yet applied, until the gate is opened or the block ends."""
        gate = self._gates[operation] = Gate()
        try:
            yield gate
        finally:
            gate.open()
            if self._gates.get(operation) is gate:
                del self._gates[operation]

    def disconnect(self, reason: str = "disconnected by the test") -> None:
        """All operations wait until `reconnect`, as with a NAS that went away."""
        if self._outage is None:
            self._outage = Gate()
            self._outage_since_s, self._outage_reason = trio.current_time(), reason
            report_reachable(False)

    def reconnect(self) -> None:
        if self._outage is not None:
            self._outage.open()
            self._outage, self._outage_since_s, self._outage_reason = None, None, ""
            self._reconnects += 1
            report_reachable(True)

    def lose_unstable(self) -> None:
        """As by a crash of the NAS: uncommitted writes are gone and the verifier is new."""
        self.tree.lose_unstable()
        self._restarts += 1

    # --- The interface

    @property
    def root(self) -> Handle:
        return _handle(self.tree.root)

    @property
    def io_bytes_max(self) -> int:
        return self._io_bytes_max

    def state(self) -> CoreFilerState:
        return CoreFilerState(
            reachable=self._outage is None, unreachable_since=self._outage_since_s,
            reason=self._outage_reason, in_flight=self._in_flight, reconnects=self._reconnects,
        )

    @observed("getattr")
    async def getattr(self, handle: Handle) -> Attributes:
        async with self._operation("getattr"):
            return self._inode(handle).attributes()

    @observed("setattr")
    async def setattr(self, handle: Handle, changes: SetAttributes) -> Attributes:
        async with self._operation("setattr"):
            inode = self._inode(handle)
            self.tree.set_attributes(inode, changes)
            return inode.attributes()

    @observed("lookup")
    async def lookup(self, directory: Handle, name: bytes) -> Found:
        async with self._operation("lookup"):
            parent = self._inode(directory)
            return _found(self.tree.lookup(parent, name), parent)

    @observed("readlink")
    async def readlink(self, handle: Handle) -> bytes:
        async with self._operation("readlink"):
            inode = self._inode(handle)
            if not stat.S_ISLNK(inode.mode):
                raise Refused(errno.EINVAL)
            return inode.data.read(0, inode.data.size)

    @observed("read")
    async def read(self, handle: Handle, start: int, end: int) -> ReadResult:
        async with self._operation("read"):
            inode = self._inode(handle)
            if inode.is_directory:
                raise Refused(errno.EISDIR)
            end = min(end, start + self._io_bytes_max)
            return ReadResult(
                inode.data.read(start, end), end >= inode.data.size, inode.attributes()
            )

    @observed("write")
    async def write(
        self, handle: Handle, start: int, data: bytes | memoryview, *, stable: bool = False
    ) -> WriteResult:
        async with self._operation("write"):
            inode = self._inode(handle)
            before = inode.attributes().version
            accepted = bytes(data[: self._io_bytes_max])
            self.tree.write(inode, start, accepted, stable=stable)
            return WriteResult(
                len(accepted), self._verifier, stable, before, inode.attributes()
            )

    @observed("commit")
    async def commit(self, handle: Handle) -> CommitResult:
        async with self._operation("commit"):
            inode = self._inode(handle)
            self.tree.commit(inode)
            return CommitResult(self._verifier, inode.attributes())

    @observed("create")
    async def create(
        self, directory: Handle, name: bytes, *, mode: int, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found:
        async with self._operation("create"):
            wanted = Wanted(stat.S_IFREG | stat.S_IMODE(mode), uid, gid)
            return self._make(directory, name, wanted, repeated)

    @observed("mkdir")
    async def mkdir(
        self, directory: Handle, name: bytes, *, mode: int, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found:
        async with self._operation("mkdir"):
            wanted = Wanted(stat.S_IFDIR | stat.S_IMODE(mode), uid, gid)
            return self._make(directory, name, wanted, repeated)

    @observed("symlink")
    async def symlink(
        self, directory: Handle, name: bytes, target: bytes, *, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found:
        async with self._operation("symlink"):
            wanted = Wanted(stat.S_IFLNK | 0o777, uid, gid, target=target)
            return self._make(directory, name, wanted, repeated)

    @observed("mknod")
    async def mknod(
        self, directory: Handle, name: bytes, *, mode: int, rdev: int, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found:
        async with self._operation("mknod"):
            if stat.S_IFMT(mode) not in (
                stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK
            ):
                raise Refused(errno.EINVAL)
            return self._make(directory, name, Wanted(mode, uid, gid, rdev), repeated)

    @observed("link")
    async def link(
        self, handle: Handle, directory: Handle, name: bytes, *, repeated: bool = False
    ) -> Found:
        async with self._operation("link"):
            inode, parent = self._inode(handle), self._inode(directory)
            if not (repeated and parent.entries.get(name) is inode):
                self.tree.link(inode, parent, name)
            return _found(inode, parent)

    @observed("remove")
    async def remove(
        self, directory: Handle, name: bytes, *, repeated: bool = False
    ) -> Attributes | None:
        async with self._operation("remove"):
            parent = self._inode(directory)
            if not (repeated and parent.is_directory and name not in parent.entries):
                self.tree.remove(parent, name)
            return parent.attributes()

    @observed("rmdir")
    async def rmdir(
        self, directory: Handle, name: bytes, *, repeated: bool = False
    ) -> Attributes | None:
        async with self._operation("rmdir"):
            parent = self._inode(directory)
            if not (repeated and parent.is_directory and name not in parent.entries):
                self.tree.rmdir(parent, name)
            return parent.attributes()

    @observed("rename")
    async def rename(
        self, directory: Handle, name: bytes, new_directory: Handle, new_name: bytes, *,
        flags: int = 0, repeated: bool = False,
    ) -> tuple[Attributes | None, Attributes | None]:
        async with self._operation("rename"):
            old, new = self._inode(directory), self._inode(new_directory)
            done = (
                repeated and flags != RENAME_EXCHANGE and old.is_directory
                and name not in old.entries and new_name in new.entries
            )
            if not done:
                self.tree.rename(old, name, new, new_name, flags)
            return old.attributes(), new.attributes()

    async def readdir(self, directory: Handle) -> AsyncIterator[list[DirectoryEntry]]:
        # Names are fixed by the first batch: one that stays is listed whatever else changes.
        names: list[bytes] | None = None
        while names is None or names:
            batch, names = await self._readdir_batch(directory, names)
            if batch:
                yield batch

    @observed("statfs")
    async def statfs(self) -> FileSystemStatistics:
        async with self._operation("statfs"):
            total = self.tree.capacity_bytes or _UNLIMITED_BYTES
            free = max(0, total - self.tree.used_bytes)
            files = sum(1 for _ in self.tree)
            return FileSystemStatistics(
                total, free, free, _FILES, _FILES - files, _FILES - files
            )

    # --- Inside

    @observed("readdir")
    async def _readdir_batch(
        self, directory: Handle, names: list[bytes] | None
    ) -> tuple[list[DirectoryEntry], list[bytes]]:
        async with self._operation("readdir"):
            inode = self._inode(directory)
            if not inode.is_directory:
                raise Refused(errno.ENOTDIR)
            if names is None:
                names = list(inode.entries)
            there = [
                (name, child) for name in names[:_READDIR_BATCH]
                if (child := inode.entries.get(name)) is not None
            ]
            batch = [
                DirectoryEntry(name, child.fileid, _handle(child), child.attributes())
                for name, child in there
            ]
            return batch, names[_READDIR_BATCH:]

    @property
    def _verifier(self) -> bytes:
        return struct.pack(">Q", self._restarts)

    def _operation(self, name: str) -> _Operation:
        return _Operation(self, name)

    def _inode(self, handle: Handle) -> Inode:
        if len(handle) != _HANDLE.size or not handle.startswith(_MAGIC):
            raise Refused(errno.ESTALE, "not a handle of this core filer")
        _, fileid, generation = _HANDLE.unpack(handle)
        return self.tree.by_identity(fileid, generation)

    def _make(self, directory: Handle, name: bytes, wanted: Wanted, repeated: bool) -> Found:
        parent = self._inode(directory)
        there = parent.entries.get(name)
        if (
            repeated and there is not None and wanted.looks_like(there.attributes())
            and (not wanted.target or there.data.read(0, there.data.size) == wanted.target)
        ):
            return _found(there, parent)
        return _found(self.tree.make(parent, name, wanted), parent)


class _Operation:
    """One operation: arrives (yields, counts, may wait or fail), is applied, may fail after."""

    def __init__(self, core: MemoryCoreFiler, name: str) -> None:
        self._core, self._name = core, name
        self._fault_after: Exception | None = None

    async def __aenter__(self) -> None:
        core, name = self._core, self._name
        core.calls[name] += 1
        core._in_flight += 1
        try:
            await trio.lowlevel.checkpoint()
            if core.latency_s:
                await trio.sleep(core.latency_s)
            if (gate := core._gates.get(name)) is not None:
                await gate.pass_through()
            while core._outage is not None:
                await core._outage.pass_through()
            if core._faults[name]:
                exception, applied = core._faults[name].popleft()
                if not applied:
                    raise exception
                self._fault_after = exception
        except BaseException:
            core._in_flight -= 1
            raise

    async def __aexit__(self, exc_type: object, exc: object, traceback: object) -> None:
        self._core._in_flight -= 1
        if self._fault_after is not None and exc is None:
            raise self._fault_after


class Behind:
    """Changes made on the NAS itself, behind the filer's back; by path, at once."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def write(self, path: str | bytes, data: bytes, *, start: int | None = None) -> None:
        """The whole content, or with *start* a part of it; makes the file if need be."""
        directory, name = self._split(path)
        inode = directory.entries.get(name) or self._tree.make(
            directory, name, Wanted(stat.S_IFREG | 0o644, 0, 0)
        )
        if start is None:
            self._tree.set_attributes(inode, SetAttributes(size=0))
        self._tree.write(inode, start or 0, data, stable=True)

    def read(self, path: str | bytes) -> bytes:
        data = self.inode(path).data
        return data.read(0, data.size)

    def mkdir(self, path: str | bytes, *, mode: int = 0o755) -> None:
        directory, name = self._split(path)
        self._tree.make(directory, name, Wanted(stat.S_IFDIR | mode, 0, 0))

    def symlink(self, path: str | bytes, target: bytes) -> None:
        directory, name = self._split(path)
        self._tree.make(directory, name, Wanted(stat.S_IFLNK | 0o777, 0, 0, target=target))

    def link(self, path: str | bytes, new_path: str | bytes) -> None:
        self._tree.link(self.inode(path), *self._split(new_path))

    def remove(self, path: str | bytes) -> None:
        """A file or an empty directory."""
        directory, name = self._split(path)
        if self.inode(path).is_directory:
            self._tree.rmdir(directory, name)
        else:
            self._tree.remove(directory, name)

    def rename(self, path: str | bytes, new_path: str | bytes) -> None:
        self._tree.rename(*self._split(path), *self._split(new_path), 0)

    def setattr(self, path: str | bytes, changes: SetAttributes) -> None:
        self._tree.set_attributes(self.inode(path), changes)

    def attributes(self, path: str | bytes) -> Attributes:
        return self.inode(path).attributes()

    def handle(self, path: str | bytes) -> Handle:
        return _handle(self.inode(path))

    def exists(self, path: str | bytes) -> bool:
        try:
            self.inode(path)
        except Refused:
            return False
        return True

    def names(self, path: str | bytes) -> list[bytes]:
        return list(self.inode(path).entries)

    def inode(self, path: str | bytes) -> Inode:
        return self._tree.walk(_encoded(path))

    def _split(self, path: str | bytes) -> tuple[Inode, bytes]:
        directory, _, name = _encoded(path).rpartition(b"/")
        return self._tree.walk(directory), name


def _encoded(path: str | bytes) -> bytes:
    return path.encode(errors="surrogateescape") if isinstance(path, str) else path


def _handle(inode: Inode) -> Handle:
    return Handle(_HANDLE.pack(_MAGIC, inode.fileid, inode.generation))


def _found(inode: Inode, directory: Inode) -> Found:
    return Found(_handle(inode), inode.attributes(), directory.attributes())
