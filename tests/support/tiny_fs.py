"""A small file system in memory, to test the FUSE boundary with.

Stateless opens, as the real one.  Tests stop a handler at a *gate* (``hold``), watch what arrives
(``requests``), change state behind the kernel's back, and have the lookup counts kept as the
real handlers keep them.

As a program (``python -m tests.support.tiny_fs``) it is a volume server for the keeper; its state
is then a file of its own, so that it outlives the process as a core filer would.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections import Counter
from dataclasses import dataclass, field

import trio

from filer.vfs.dispatch import guarded
from filer.vfs.lookup_counts import LookupCounts
from filer.vfs.shim import current_unique, pyfuse3

FOREVER_S = 3600.0


@dataclass
class Node:
    id: int
    mode: int
    mtime_ns: int
    data: bytes = b""
    names: dict[bytes, int] = field(default_factory=dict)
    nlink: int = 1
    uid: int = 0
    gid: int = 0


class Gate:
    """Where a handler waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = trio.Event()
        self.opened = trio.Event()


@guarded
class TinyFs(pyfuse3.Operations):
    supports_dot_lookup = True

    def __init__(self, counts: LookupCounts | None = None) -> None:
        super().__init__()
        self.counts = counts or LookupCounts()
        self.nodes = {1: Node(1, stat.S_IFDIR | 0o777, 1)}
        self.requests: Counter[str] = Counter()
        self.uniques: dict[tuple[str, bytes], int] = {}
        self.negative_timeout_s = 0.0
        self._ids = itertools.count(2)
        self._clock_ns = itertools.count(10**18)
        self._gates: dict[tuple[str, object], Gate] = {}

    # -- for tests -------------------------------------------------------------------------------

    def hold(self, operation: str, what: object) -> Gate:
        """The next *operation* on this name or inode waits at the gate, before it looks."""
        gate = self._gates[operation, what] = Gate()
        return gate

    def find(self, path: str) -> Node:
        node = self.nodes[1]
        for name in filter(None, os.fsencode(path).split(b"/")):
            node = self.nodes[node.names[name]]
        return node

    def touch(self, node: Node) -> None:
        node.mtime_ns = next(self._clock_ns)

    def write_behind_the_kernel(self, node: Node, data: bytes) -> None:
        node.data = data
        self.touch(node)

    def make(self, parent: int, name: bytes, mode: int, data: bytes = b"") -> Node:
        directory = self._directory(parent)
        if name in directory.names:
            raise pyfuse3.FUSEError(errno.EEXIST)
        node = Node(next(self._ids), mode, next(self._clock_ns), data)
        self.nodes[node.id] = node
        directory.names[name] = node.id
        self.touch(directory)
        return node

    # -- handlers --------------------------------------------------------------------------------

    async def _arrive(self, operation: str, what: object) -> None:
        self.requests[operation] += 1
        gate = self._gates.pop((operation, what), None)
        if gate is not None:
            gate.reached.set()
            await gate.opened.wait()

    def _node(self, inode: int) -> Node:
        try:
            return self.nodes[inode]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ESTALE) from None

    def _directory(self, inode: int) -> Node:
        node = self._node(inode)
        if not stat.S_ISDIR(node.mode):
            raise pyfuse3.FUSEError(errno.ENOTDIR)
        return node

    def _attributes(self, node: Node) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(node.id)
        entry.st_mode = pyfuse3.ModeT(node.mode)
        entry.st_nlink = node.nlink
        entry.st_uid, entry.st_gid = node.uid, node.gid
        entry.st_size = len(node.data)
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = node.mtime_ns
        entry.attr_timeout = entry.entry_timeout = FOREVER_S
        return entry

    def _entry(self, node: Node) -> pyfuse3.EntryAttributes:
        self.counts.increment(node.id)
        return self._attributes(node)

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self.uniques["lookup", name] = current_unique()
        await self._arrive("lookup", name)
        if name == b".":
            return self._entry(self._node(parent_inode))
        inode = self._directory(parent_inode).names.get(name)
        if inode is not None:
            return self._entry(self._node(inode))
        if not self.negative_timeout_s:
            raise pyfuse3.FUSEError(errno.ENOENT)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(0)
        entry.entry_timeout = self.negative_timeout_s
        return entry

    async def forget(self, inode_list: list[tuple[int, int]]) -> None:
        for inode, count in inode_list:
            self.counts.decrement(inode, count)

    async def getattr(
        self, inode: int, ctx: pyfuse3.RequestContext | None
    ) -> pyfuse3.EntryAttributes:
        await self._arrive("getattr", inode)
        return self._attributes(self._node(inode))

    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields,
        fh: int | None, ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        assert fh is None or fh == inode
        await self._arrive("setattr", inode)
        node = self._node(inode)
        if fields.update_size:
            node.data = node.data[: attr.st_size].ljust(attr.st_size, b"\0")
        if fields.update_mode:
            node.mode = attr.st_mode
        self.touch(node)
        return self._attributes(node)

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        await self._arrive("readdir", fh)
        names = list(self._directory(fh).names.items())
        for position, (name, inode) in enumerate(names[start_id:], start_id + 1):
            entry = self._attributes(self._node(inode))
            if not pyfuse3.readdir_reply(token, pyfuse3.FileNameT(name), entry, position):
                return
            self.counts.increment(inode)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        await self._arrive("create", name)
        node = self.make(parent_inode, name, mode)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(node.id)), self._entry(node)

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        await self._arrive("mkdir", name)
        return self._entry(self.make(parent_inode, name, mode))

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._arrive("unlink", name)
        directory = self._directory(parent_inode)
        if directory.names.pop(name, None) is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        self.touch(directory)

    rmdir = unlink

    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes,
        flags: int, ctx: pyfuse3.RequestContext,
    ) -> None:
        await self._arrive("rename", name_old)
        old, new = self._directory(parent_inode_old), self._directory(parent_inode_new)
        if name_old not in old.names:
            raise pyfuse3.FUSEError(errno.ENOENT)
        new.names[name_new] = old.names.pop(name_old)
        self.touch(old)
        self.touch(new)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await self._arrive("read", fh)
        return self._node(fh).data[off : off + size]

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        await self._arrive("write", fh)
        node = self._node(fh)
        node.data = node.data[:off].ljust(off, b"\0") + buf + node.data[off + len(buf) :]
        self.touch(node)
        return len(buf)

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._arrive("fsync", fh)

    async def release(self, fh: int) -> None:
        await self._arrive("release", fh)
