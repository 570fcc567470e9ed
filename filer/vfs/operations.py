"""The FUSE handlers: decode, call the namespace or the file data, encode.

Stateless: OPEN and OPENDIR answer ENOSYS once and the kernel never asks again, so that a hot
LOOKUP, GETATTR, ACCESS or READ stays in the kernel; ``fh`` is the inode (``vfs/shim.py``).

Two rules hold for every handler (ARCHITECTURE.md, "The FUSE boundary"):

- a reply is built from state with no ``await`` between the last look at it and the return;
- an operation that must not be done twice asks the operation records first, because the kernel
  sends again what a killed predecessor of this process had not answered.

Modes are checked by the kernel (``default_permissions``); ids are those of the caller.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import trio

from filer.cache.pages import Buffer
from filer.core_filer.base import CoreFiler, FileSystemStatistics, SetAttributes
from filer.data import FileData
from filer.errors import Refused, TryAgain
from filer.ids import InodeId
from filer.metrics import CLIENT_BYTES
from filer.namespace.inode import Inode
from filer.namespace.service import FOREVER_S, NAME_BYTES_MAX, Namespace
from filer.policies import Policy, WriteMode
from filer.vfs.dispatch import guarded
from filer.vfs.errnos import errno_of
from filer.vfs.kernel import KernelCaches
from filer.vfs.lookup_counts import LookupCounts
from filer.vfs.operation_records import OperationRecords
from filer.vfs.shim import current_unique, pyfuse3

_READ_BYTES = CLIENT_BYTES.labels("read")
_WRITTEN_BYTES = CLIENT_BYTES.labels("write")

_O_EXCL = os.O_EXCL
_T = TypeVar("_T", bound=Inode | None)

_STATFS_FRESH_S = 2.0
_BLOCK_BYTES = 1 << 20
"""Preferred I/O size (``st_blksize``): one page."""


@guarded
class Operations(pyfuse3.Operations):
    """See the module's docstring."""

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self, namespace: Namespace, data: FileData, core: CoreFiler, policy: Policy,
        counts: LookupCounts, records: OperationRecords, kernel: KernelCaches,
    ) -> None:
        super().__init__()
        self._namespace = namespace
        self._data = data
        self._core = core
        self._policy = policy
        self._counts = counts
        self._records = records
        self._kernel = kernel
        self._statfs: tuple[float, FileSystemStatistics] | None = None

    # -- lookups -----------------------------------------------------------------------------

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = self._inode(parent_inode)
        inode = await self._namespace.lookup(parent, name)
        if inode is None:
            return self._negative(parent)
        return self._entry(inode, parent)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, count in inode_list:
            if self._counts.decrement(inode, count) <= 0:
                self._namespace.forgotten(InodeId(inode))

    async def getattr(
        self, inode: int, ctx: pyfuse3.RequestContext | None
    ) -> pyfuse3.EntryAttributes:
        found = self._inode(inode)
        await self._namespace.verify(found)
        return self._attributes(found)

    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return await self._core.readlink(self._inode(inode).handle)

    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields,
        fh: int | None, ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        self._refuse_if_read_only()
        found = self._inode(inode)
        if fields.update_mode or fields.update_uid or fields.update_gid:
            await self._namespace.set_attributes(found, SetAttributes(
                mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
                uid=attr.st_uid if fields.update_uid else None,
                gid=attr.st_gid if fields.update_gid else None,
            ))
        if fields.update_size:
            await self._data.truncate(found, attr.st_size)
        if fields.update_atime or fields.update_mtime:
            await self._data.set_times(
                found,
                attr.st_atime_ns if fields.update_atime else None,
                attr.st_mtime_ns if fields.update_mtime else None,
            )
        return self._attributes(found)

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        told = await self._file_system_statistics()
        reply = pyfuse3.StatvfsData()
        unit = 4096
        reply.f_bsize = _BLOCK_BYTES
        reply.f_frsize = unit
        reply.f_blocks = told.total_bytes // unit
        reply.f_bfree = told.free_bytes // unit
        reply.f_bavail = told.available_bytes // unit
        reply.f_files = told.total_files
        reply.f_ffree = told.free_files
        reply.f_favail = told.available_files
        reply.f_namemax = NAME_BYTES_MAX
        return reply

    async def _file_system_statistics(self) -> FileSystemStatistics:
        now = trio.current_time()
        known = self._statfs
        if known is not None and (
            now - known[0] < _STATFS_FRESH_S or not self._core.state().reachable
        ):
            return known[1]
        told = await self._core.statfs()
        self._statfs = now, told
        return told

    # -- directories -------------------------------------------------------------------------

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileHandleT:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        directory = self._inode(fh)
        names = directory.directory
        if start_id == 0 or names is None or not names.entries:
            names = await self._namespace.listed(directory)
        table = self._namespace.table
        for cookie, name in enumerate((b".", b".."), start=1):
            # The kernel takes no reference for these two.
            if start_id < cookie and not pyfuse3.readdir_reply(
                token, name, self._encode(directory, 0.0), cookie
            ):
                return
        for cookie, name, inode_id in names.since(start_id):
            inode = table.find(inode_id)
            if inode is None:  # replaced behind us since it was listed, perhaps
                inode = await self._namespace.lookup_again(directory, name)
                if inode is None:
                    continue
            inode.name = name
            entry = self._encode(inode, self._namespace.valid_for_s(directory))
            if not pyfuse3.readdir_reply(token, name, entry, cookie):
                return
            self._counts.increment(inode.id)

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return await self._make(current_unique(), parent_inode, name, lambda parent, again: (
            self._namespace.mkdir(parent, name, mode, ctx.uid, ctx.gid, again)))

    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        unique = current_unique()
        self._refuse_if_read_only()
        parent = self._inode(parent_inode)
        await self._once(unique, lambda again: self._namespace.rmdir(parent, name, again))
        self._kernel.listing_changed(parent.id)

    # -- making and removing names -----------------------------------------------------------

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        unique = current_unique()

        async def create(parent: Inode, again: bool) -> Inode:
            try:
                return await self._namespace.create(parent, name, mode, ctx.uid, ctx.gid, again)
            except Refused as exc:
                if exc.errno != errno.EEXIST or flags & _O_EXCL:
                    raise
                # Made behind us since the kernel looked: open(2) without O_EXCL takes it.
                existing = await self._namespace.lookup_again(parent, name)
                if existing is None:
                    raise TryAgain("a name appeared and vanished again") from exc
                return existing

        entry = await self._make(unique, parent_inode, name, create)
        return pyfuse3.FileInfo(fh=entry.st_ino), entry

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return await self._make(current_unique(), parent_inode, name, lambda parent, again: (
            self._namespace.mknod(parent, name, mode, rdev, ctx.uid, ctx.gid, again)))

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return await self._make(current_unique(), parent_inode, name, lambda parent, again: (
            self._namespace.symlink(parent, name, target, ctx.uid, ctx.gid, again)))

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        unique = current_unique()
        found = self._inode(inode)
        return await self._make(unique, new_parent_inode, new_name, lambda parent, again: (
            self._namespace.link(found, parent, new_name, again)))

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        unique = current_unique()
        self._refuse_if_read_only()
        parent = self._inode(parent_inode)
        await self._once(unique, lambda again: self._namespace.unlink(parent, name, again))
        self._kernel.listing_changed(parent.id)

    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes,
        flags: int, ctx: pyfuse3.RequestContext,
    ) -> None:
        unique = current_unique()
        self._refuse_if_read_only()
        old, new = self._inode(parent_inode_old), self._inode(parent_inode_new)
        await self._once(unique, lambda again: self._namespace.rename(
            old, name_old, new, name_new, flags, again))
        self._kernel.listing_changed(old.id)
        self._kernel.listing_changed(new.id)

    # -- bytes -------------------------------------------------------------------------------

    async def open(
        self, inode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def read(  # type: ignore[override]  # pyfuse3 takes any buffer
        self, fh: int, off: int, size: int
    ) -> Buffer:
        data = await self._data.read(self._inode(fh), off, off + size)
        _READ_BYTES.inc(len(data))
        return data

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        await self._data.write(self._inode(fh), off, buf)
        _WRITTEN_BYTES.inc(len(buf))
        return len(buf)

    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._data.sync(self._inode(fh))

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Names are changed in the core filer before the reply: nothing is left to do."""

    async def flush(self, fh: int) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def release(self, fh: int) -> None:
        """Only comes for files opened by CREATE on kernels that keep that handle."""

    async def releasedir(self, fh: int) -> None:
        """Never comes: OPENDIR is not implemented."""

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        # Once ENOSYS, never asked again; else the kernel asks before every write.
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    # -- mechanism ---------------------------------------------------------------------------

    def _inode(self, inode: int) -> Inode:
        return self._namespace.table.get(InodeId(inode))

    def _refuse_if_read_only(self) -> None:
        if self._policy.write_mode is WriteMode.REFUSED:
            raise Refused(errno.EROFS, f"policy {self._policy.name} refuses changes")

    async def _make(
        self, unique: int, parent_inode: int, name: bytes,
        perform: Callable[[Inode, bool], Awaitable[Inode]],
    ) -> pyfuse3.EntryAttributes:
        self._refuse_if_read_only()
        self._namespace.check_name(name)
        parent = self._inode(parent_inode)
        inode = await self._once(unique, lambda again: perform(parent, again))
        assert inode is not None
        self._kernel.listing_changed(parent.id)
        return self._entry(inode, parent)

    async def _once(
        self, unique: int, perform: Callable[[bool], Awaitable[_T]]
    ) -> _T | Inode | None:
        """Do *perform* unless a predecessor of this process has; then answer as it would have.

        *perform* is told whether it may have been done already (the predecessor died inside it).
        """
        repeat = self._records.begin(unique)
        if repeat is not None and repeat.is_done:
            if repeat.errno:
                raise Refused(repeat.errno, "answered before")
            if not repeat.payload:
                return None
            return self._inode(int.from_bytes(repeat.payload, "big"))
        try:
            result = await perform(repeat is not None)
        except Exception as exc:
            self._records.done(unique, errno_of(exc))
            raise
        payload = result.id.to_bytes(8, "big") if isinstance(result, Inode) else b""
        self._records.done(unique, 0, payload)
        return result

    def _entry(self, inode: Inode, parent: Inode) -> pyfuse3.EntryAttributes:
        """The reply that hands *inode* to the kernel under a name in *parent*."""
        self._counts.increment(inode.id)
        return self._encode(inode, self._namespace.valid_for_s(parent))

    def _attributes(self, inode: Inode) -> pyfuse3.EntryAttributes:
        return self._encode(inode, 0.0)

    def _encode(self, inode: Inode, name_valid_s: float) -> pyfuse3.EntryAttributes:
        told = inode.attributes
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode.id
        entry.generation = inode.generation
        entry.entry_timeout = max(name_valid_s, 0.0)
        entry.attr_timeout = max(self._namespace.valid_for_s(inode), 0.0)
        entry.st_mode = told.mode
        entry.st_nlink = told.nlink
        entry.st_uid = told.uid
        entry.st_gid = told.gid
        entry.st_rdev = told.rdev
        entry.st_size = told.size
        entry.st_blksize = _BLOCK_BYTES
        entry.st_blocks = (told.used_bytes + 511) // 512
        entry.st_atime_ns = told.atime_ns
        entry.st_mtime_ns = told.mtime_ns
        entry.st_ctime_ns = told.ctime_ns
        return entry

    def _negative(self, parent: Inode) -> pyfuse3.EntryAttributes:
        """A name that is known not to exist, for as long as the directory is believed."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = 0
        entry.entry_timeout = min(max(self._namespace.valid_for_s(parent), 0.0), FOREVER_S)
        entry.attr_timeout = 0.0
        return entry
