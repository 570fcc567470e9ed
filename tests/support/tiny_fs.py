"""A small file system in memory, to test the FUSE boundary with.

Stateless opens, as the real one.  Tests stop a handler at a *gate*, before it looks at the state
(``hold``) or with its reply made up (``hold_reply``), watch what arrives (``requests``), change
state behind the kernel's back, and have the lookup counts kept as the real handlers keep them.

With a log of changes its state outlives the process, as a core filer would: see
``tiny_server.py``.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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


def _json_bytes(value: bytes) -> dict[str, str]:
    return {"hex": value.hex()}


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
        self.counts = LookupCounts() if counts is None else counts
        self.nodes = {1: Node(1, stat.S_IFDIR | 0o777, 1)}
        self.requests: Counter[str] = Counter()
        self.uniques: dict[tuple[str, bytes], int] = {}
        self.negative_timeout_s = 0.0
        self.log_fd: int | None = None
        self._ids = itertools.count(2)
        self._clock_ns = itertools.count(10**18)
        self._gates: dict[tuple[str, object], Gate] = {}

    # -- state: changed by apply() only, so that a log of changes can be replayed ------------------

    def change(self, *change: Any) -> Any:
        """Log the change, then apply it; the log survives us."""
        if self.log_fd is not None:
            os.write(self.log_fd, json.dumps(change, default=_json_bytes).encode() + b"\n")
        return self._apply(*change)

    def replay(self, path: Path) -> None:
        """Take the state from the log at *path*, and continue it."""
        self.log_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        for line in path.read_text().splitlines():
            operation, *arguments = json.loads(line)
            self._apply(operation, *(
                bytes.fromhex(a["hex"]) if isinstance(a, dict) else a for a in arguments
            ))

    def _apply(self, operation: str, *arguments: Any) -> Any:
        return getattr(self, f"_apply_{operation}")(*arguments)

    def _apply_make(self, parent: int, name: bytes, mode: int, data: bytes) -> Node:
        node = Node(next(self._ids), mode, next(self._clock_ns), data)
        self.nodes[node.id] = node
        self.nodes[parent].names[name] = node.id
        self.touch(self.nodes[parent])
        return node

    def _apply_unlink(self, parent: int, name: bytes) -> None:
        del self.nodes[parent].names[name]
        self.touch(self.nodes[parent])

    def _apply_rename(self, old: int, name_old: bytes, new: int, name_new: bytes) -> None:
        self.nodes[new].names[name_new] = self.nodes[old].names.pop(name_old)
        self.touch(self.nodes[old])
        self.touch(self.nodes[new])

    def _apply_setattr(self, inode: int, size: int | None, mode: int | None) -> None:
        node = self.nodes[inode]
        if size is not None:
            node.data = node.data[:size].ljust(size, b"\0")
        if mode is not None:
            node.mode = mode
        self.touch(node)

    def _apply_write(self, inode: int, start: int, data: bytes) -> None:
        node = self.nodes[inode]
        node.data = node.data[:start].ljust(start, b"\0") + data + node.data[start + len(data) :]
        self.touch(node)

    # -- for tests -------------------------------------------------------------------------------

    def hold(self, operation: str, what: object) -> Gate:
        """The next *operation* on this name or inode waits at the gate, before it looks."""
        gate = self._gates[operation, what] = Gate()
        return gate

    def hold_reply(self, operation: str, what: object) -> Gate:
        """The next reply to this waits at the gate, made up from the state before.

        No handler of ours may wait there; it stands for a reply that is written but not yet
        taken in, because the process that waits for it gets no CPU.
        """
        return self.hold(f"{operation} reply", what)

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
        made: Node = self.change("make", parent, name, mode, data)
        return made

    # -- handlers --------------------------------------------------------------------------------

    async def _arrive(self, operation: str, what: object) -> None:
        self.requests[operation] += 1
        await self._pass(operation, what)

    async def _depart(self, operation: str, what: object) -> None:
        await self._pass(f"{operation} reply", what)

    async def _pass(self, operation: str, what: object) -> None:
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
            entry = self._entry(self._node(inode))
        elif self.negative_timeout_s:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = pyfuse3.InodeT(0)
            entry.entry_timeout = self.negative_timeout_s
        else:
            raise pyfuse3.FUSEError(errno.ENOENT)
        await self._depart("lookup", name)
        return entry

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
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
        self.change(
            "setattr", inode, attr.st_size if fields.update_size else None,
            attr.st_mode if fields.update_mode else None,
        )
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
        if name not in directory.names:
            raise pyfuse3.FUSEError(errno.ENOENT)
        self.change("unlink", parent_inode, name)

    rmdir = unlink

    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes,
        flags: int, ctx: pyfuse3.RequestContext,
    ) -> None:
        await self._arrive("rename", name_old)
        self._directory(parent_inode_new)
        if name_old not in self._directory(parent_inode_old).names:
            raise pyfuse3.FUSEError(errno.ENOENT)
        self.change("rename", parent_inode_old, name_old, parent_inode_new, name_new)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await self._arrive("read", fh)
        data = self._node(fh).data[off : off + size]
        await self._depart("read", fh)
        return data

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        await self._arrive("write", fh)
        self._node(fh)
        self.change("write", fh, off, buf)
        return len(buf)

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._arrive("fsync", fh)

    async def release(self, fh: int) -> None:
        await self._arrive("release", fh)
