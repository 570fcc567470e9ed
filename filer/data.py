"""The bytes of files: clean pages below, dirty extents from the write-behind log on top.

Owns the order in which the two are looked at, and what clients see of a file's size and times
while it is dirty.  Does not own the log (``write_behind``), the pages (``cache``) or names.

Reading: the dirty extents of the range are copied *first*, then the clean bytes are fetched for
the gaps.  A flush that ends in between moves bytes from the log to the pages, never back, so the
copy can only be as new as or older than the clean bytes it covers, never torn against them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog
import trio

from filer.cache.layout import FileKey
from filer.cache.pages import Buffer, PageStore
from filer.cache.reader import Changed, CleanFile, Reader
from filer.core_filer.base import Attributes, CoreFiler, Handle, SetAttributes
from filer.errors import Refused
from filer.ids import InodeId
from filer.namespace.inode import NEVER, Change, Inode
from filer.policies import Policy, WriteMode
from filer.write_behind.service import FileIdentity, FlushReport, WriteBehind

if TYPE_CHECKING:
    from filer.namespace.service import Namespace
    from filer.vfs.kernel import KernelCaches

log = structlog.get_logger(__name__)

_RETRIES = 8
"""A file that changes behind us faster than we can read one page of it is given up with EAGAIN."""


class FileData:
    """Reads, writes and flushes; also the ``FlushObserver`` of the write-behind service."""

    def __init__(
        self, core: CoreFiler, pages: PageStore, policy: Policy, kernel: KernelCaches, *,
        wall_clock_ns: Callable[[], int],
    ) -> None:
        self._core = core
        self._pages = pages
        self._policy = policy
        self._kernel = kernel
        self._wall_clock_ns = wall_clock_ns
        self.write_behind: WriteBehind
        self.reader: Reader
        self.namespace: Namespace

    # -- views -------------------------------------------------------------------------------

    def clean(self, inode: Inode) -> CleanFile:
        """What the core filer has of *inode*, as far as we know."""
        return CleanFile(inode.id, inode.handle, inode.data_version, inode.core)

    def is_dirty(self, inode_id: InodeId) -> bool:
        return self.write_behind.dirty(inode_id) is not None

    def overlay(self, inode: Inode) -> None:
        """Set size and mtime of an inode that was loaded from the store.

        Those stored may be of dirty data that a crash has taken away since: only the log knows.
        """
        dirty = self.write_behind.dirty(inode.id)
        if dirty is None:
            if inode.attributes.is_regular:
                inode.attributes = replace(
                    inode.attributes, size=inode.core.size, mtime_ns=inode.core.mtime_ns)
        else:
            inode.attributes = replace(
                inode.attributes, size=dirty.size,
                mtime_ns=max(dirty.mtime_ns, inode.attributes.mtime_ns))
            inode.core = dirty.base.version
            inode.data_version = dirty.base.data_version

    # -- reads -------------------------------------------------------------------------------

    async def read(self, inode: Inode, start: int, end: int) -> Buffer:
        """Bytes ``[start, end)`` clipped at the file's size.

        Raises: Refused: what the core filer says; TryAgain: the file keeps changing behind us.
        """
        for _ in range(_RETRIES):
            end_ = min(end, inode.attributes.size)
            if start >= end_:
                return b""
            try:
                if self.write_behind.dirty(inode.id) is None:
                    return await self.reader.read(self.clean(inode), start, end_)
                return await self._read_dirty(inode, start, end_)
            except Changed as changed:
                await self._changed_behind(inode, changed)
        raise Refused(errno.EAGAIN, "the file keeps changing in the core filer")

    async def _read_dirty(self, inode: Inode, start: int, end: int) -> Buffer:
        dirty = self.write_behind.dirty(inode.id)
        assert dirty is not None
        clean = CleanFile(
            inode.id, dirty.base.handle, dirty.base.data_version, dirty.base.version)
        visible_end = min(end, clean.version.size, dirty.clean_limit)
        parts = await self.write_behind.read_dirty(inode.id, start, end)
        if len(parts) == 1 and parts[0][0] == start and len(parts[0][1]) == end - start:
            return parts[0][1]
        buffer = bytearray(end - start)
        for gap_start, gap_end in _gaps(parts, start, visible_end):
            data = await self.reader.read(clean, gap_start, gap_end)
            buffer[gap_start - start:gap_start - start + len(data)] = data
        for at, data in parts:
            buffer[at - start:at - start + len(data)] = data
        return bytes(buffer)

    async def _changed_behind(self, inode: Inode, changed: Changed) -> None:
        """The core filer's file is not the version we thought."""
        if self.is_dirty(inode.id):
            # Either our own flush is half-way, or somebody else wrote: the flush finds out.
            await self.write_behind.flush([inode.id])
            return
        if changed.attributes.version.same_data(inode.core):
            return  # a flush or another reader has brought us up to date meanwhile
        # The answer may be older than a change of our own: ask again, by the rules.
        inode.verified_at = NEVER
        await self.namespace.verify(inode)

    async def warm(self, inode: Inode) -> int:
        """Fetch what is missing of *inode*; returns the bytes fetched."""
        for _ in range(_RETRIES):
            if not inode.attributes.is_regular or self.is_dirty(inode.id):
                return 0
            try:
                return await self.reader.warm(self.clean(inode))
            except Changed as changed:
                await self._changed_behind(inode, changed)
        raise Refused(errno.EAGAIN, "the file keeps changing in the core filer")

    def why_missed(self, inode: Inode) -> str:
        """Why the next read would go to the core filer; empty if it would not."""
        if not inode.attributes.is_regular:
            return ""
        if self._pages.degraded:
            return f"the cache disk is out of use: {self._pages.degraded}"
        key = FileKey(inode.id, inode.data_version)
        missing = self._pages.missing(key, 0, inode.core.size)
        if not missing:
            return ""
        if self._pages.cached_bytes(key) == 0:
            return "never read since it last changed, or evicted"
        return f"{len(missing)} pages were never read, or evicted"

    # -- writes ------------------------------------------------------------------------------

    async def write(self, inode: Inode, start: int, data: bytes) -> None:
        """Returns when the bytes are in the write-behind log: they survive the death of this
        process.  ``sync`` makes them survive the machine's.

        Raises: Refused: EROFS, EFBIG, or what the core filer said to an earlier flush.
        """
        file = await self._writable(inode)
        mtime_ns = self._stamp(inode)
        await self.write_behind.write(file, start, data, mtime_ns)
        self._modified(
            inode, max(inode.attributes.size, start + len(data)), mtime_ns, len(data))

    async def truncate(self, inode: Inode, size: int) -> None:
        """Set the size; stable when it returns (RFC 1813 §3.3.2)."""
        file = await self._writable(inode)
        mtime_ns = self._stamp(inode)
        await self.write_behind.set_size(file, size, mtime_ns)
        self._modified(inode, size, mtime_ns)
        await self.write_behind.sync(inode.id)

    async def set_times(
        self, inode: Inode, atime_ns: int | None, mtime_ns: int | None
    ) -> None:
        """Set times; through the log while the file is dirty, else at the core filer."""
        if not self.is_dirty(inode.id):
            await self.namespace.set_attributes(
                inode, SetAttributes(atime_ns=atime_ns, mtime_ns=mtime_ns))
            if mtime_ns is not None and inode.attributes.mtime_ns != mtime_ns:
                inode.attributes = replace(inode.attributes, mtime_ns=mtime_ns)
            return
        await self.write_behind.set_times(
            self._identity(inode), atime_ns=atime_ns, mtime_ns=mtime_ns)
        told = inode.attributes
        inode.attributes = replace(
            told,
            atime_ns=told.atime_ns if atime_ns is None else atime_ns,
            mtime_ns=told.mtime_ns if mtime_ns is None else mtime_ns,
            ctime_ns=max(self._wall_clock_ns(), told.ctime_ns + 1),
        )
        await self.write_behind.sync(inode.id)

    async def sync(self, inode: Inode) -> None:
        """COMMIT, fsync(2): what was written to *inode* survives the loss of this machine's
        memory; by the policy ``through`` it is in the core filer."""
        await self.write_behind.sync(inode.id)

    async def flush(
        self, inodes: Iterable[InodeId] | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> FlushReport:
        return await self.write_behind.flush(
            None if inodes is None else list(inodes), progress)

    async def discard(self, inode: Inode) -> None:
        """The file is gone for good: its bytes need not be kept or flushed."""
        if self.is_dirty(inode.id):
            await self.write_behind.discard(inode.id)
        self.reader.forget(inode.id)
        self._pages.drop_inode(inode.id)

    async def _writable(self, inode: Inode) -> FileIdentity:
        if self._policy.write_mode is WriteMode.REFUSED:
            raise Refused(errno.EROFS, f"policy {self._policy.name} refuses writes")
        if not inode.attributes.is_regular:
            raise Refused(errno.EINVAL, "not a regular file")
        if not self.is_dirty(inode.id):
            # The state that we start from is what the flush will insist on.
            await self.namespace.verify(inode)
        return self._identity(inode)

    def _identity(self, inode: Inode) -> FileIdentity:
        return FileIdentity(inode.id, inode.handle, inode.core, inode.data_version)

    def _stamp(self, inode: Inode) -> int:
        """A new mtime; strictly later than the last, or the kernel would keep stale pages."""
        return max(self._wall_clock_ns(), inode.attributes.mtime_ns + 1)

    def _modified(
        self, inode: Inode, size: int, mtime_ns: int, written_bytes: int = 0
    ) -> None:
        told = inode.attributes
        stamp = max(mtime_ns, told.mtime_ns)
        inode.attributes = replace(
            told, size=size, mtime_ns=stamp, ctime_ns=max(stamp, told.ctime_ns),
            # A guess until the flush: bytes written again are counted twice.
            used_bytes=min(told.used_bytes + written_bytes, -(-size // 4096) * 4096))

    # -- what the core filer shows -----------------------------------------------------------

    def changed(self, inode: Inode, change: Change) -> None:
        """The core filer showed a change made behind us; *inode* still has its old version."""
        if change is Change.DATA:
            if inode.attributes.is_directory:
                # While we start, the root is looked at before there is a namespace.
                if inode.directory is not None:
                    self.namespace.names_changed(inode)
                self._kernel.listing_changed(inode.id)
            else:
                self.reader.forget(inode.id)
                self._pages.drop(FileKey(inode.id, inode.data_version))
        self._kernel.attributes_changed(inode.id)

    # -- FlushObserver -----------------------------------------------------------------------

    def location(self, inode: InodeId) -> tuple[Handle, bytes] | None:
        found = self.namespace.table.find(inode)
        if found is None or not found.name or found.is_orphan:
            return None
        parent = self.namespace.table.find(found.parent)
        return None if parent is None else (parent.handle, found.name)

    async def flushed_data(
        self, inode: InodeId, start: int, data: bytes | memoryview
    ) -> None:
        dirty = self.write_behind.dirty(inode)
        if dirty is not None:
            await self._pages.update(
                FileKey(inode, dirty.base.data_version), start, data, dirty.size)

    async def truncated(self, inode: InodeId, size: int) -> None:
        dirty = self.write_behind.dirty(inode)
        if dirty is not None:
            self.reader.forget(inode)
            self._pages.drop_from(FileKey(inode, dirty.base.data_version), size)

    def flushed(self, inode: InodeId, attributes: Attributes) -> None:
        table = self.namespace.table
        found = table.in_memory(inode)
        shown = None if found is None else found.attributes
        if found is None:
            found = table.find(inode)
            if found is None:
                return
        with table.changing(found):  # answers asked for before the flush's end are outdated
            found.core = attributes.version
            found.verified_at = trio.current_time()
            if shown is None:  # what was stored is older than what was flushed
                found.attributes = attributes
                self.overlay(found)
            else:
                found.attributes = replace(shown, used_bytes=attributes.used_bytes)
        table.save(found)

    def written_through(self, inode: InodeId, attributes: Attributes) -> None:
        """While the log was out of use, we changed the core filer's file directly."""
        found = self.namespace.table.find(inode)
        if found is not None:
            self._void(found)
            self._adopt(found, replace(
                attributes, mtime_ns=max(attributes.mtime_ns, found.attributes.mtime_ns)),
                attributes)

    def conflict(self, inode: InodeId, name: bytes, attributes: Attributes | None) -> None:
        """Our bytes went to the conflict copy *name*; the file is the foreign version now."""
        table = self.namespace.table
        found = table.find(inode)
        if found is None:
            return
        self._void(found)
        if attributes is None:
            table.gone(found)
        else:
            self._adopt(found, attributes, attributes)
        self._kernel.data_changed(found.id)
        parent = table.in_memory(found.parent)
        if parent is not None:
            parent.verified_at = NEVER
            self.namespace.names_changed(parent)
            self._kernel.name_changed(parent.id, name)

    def _void(self, found: Inode) -> None:
        """Clean bytes that are cached are not the file's any more."""
        self.reader.forget(found.id)
        self._pages.drop_inode(found.id)

    def _adopt(self, found: Inode, shown: Attributes, told: Attributes) -> None:
        table = self.namespace.table
        with table.changing(found):
            found.core = told.version
            found.data_version = table.new_data_version()
            found.attributes = shown
            found.verified_at = trio.current_time()
        table.save(found)

    async def read_clean(self, inode: InodeId, start: int, end: int) -> bytes | None:
        dirty = self.write_behind.dirty(inode)
        if dirty is None:
            return None
        cached = await self._pages.read(FileKey(inode, dirty.base.data_version), start, end)
        return None if cached is None else bytes(cached)


def _gaps(parts: list[tuple[int, bytes]], start: int, end: int) -> Iterable[tuple[int, int]]:
    """The ranges of ``[start, end)`` that the sorted *parts* leave open."""
    at = start
    for part_start, data in parts:
        if part_start > at:
            yield at, min(part_start, end)
        at = max(at, part_start + len(data))
        if at >= end:
            return
    if at < end:
        yield at, end
