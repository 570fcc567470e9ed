"""A core filer that is a NAS, spoken to in NFSv3 from this process.

Owns the meaning of requests: which are repeated, what a repetition's EEXIST or ENOENT says,
what to do about busy servers, moving directories and missing attributes.  Hard, as ``mount -o
hard`` is: a request is answered or waits.  The bytes on the wire are ``nfs3.py``'s, connections
``rpc_pool.py``'s.

Every operation is one round trip where the protocol allows; renames with flags are emulated
and take several, and are not atomic towards other clients of the NAS.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from random import Random
from typing import TypeVar

import trio

from filer.core_filer import nfs3
from filer.core_filer.backoff import backoff_s
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
from filer.core_filer.nfs3 import FileSystemLimits, NfsError
from filer.core_filer.observed import observed
from filer.core_filer.repeats import Wanted
from filer.core_filer.rpc_connection import Request, RpcRejected, Unencodable
from filer.core_filer.rpc_pool import Attempts, Lane, Pool
from filer.errors import Refused

_T = TypeVar("_T")

_IO_BYTES_MAX = 1 << 20
_SMALL_BYTES = 32 << 10
"""Reads and writes up to this size travel with the metadata."""

_LISTING_BYTES = 256 << 10
"""Some 1,300 entries: decoding them holds up the loop for about 10 ms."""
_LISTING_NAMES_BYTES = 64 << 10
_LISTING_TRIES = 20
"""NFS-Ganesha answers READDIRPLUS with STALE or NOENT while names are being removed."""

_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_NO_LINK = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS})


class NfsCoreFiler:
    """*pool* must be running; *root* is the directory of the URL."""

    def __init__(
        self, pool: Pool, root: Handle, limits: FileSystemLimits, *,
        random: Random, wall_clock: Callable[[], int],
    ) -> None:
        self._pool = pool
        self._root = root
        self._io_bytes_max = min(
            _IO_BYTES_MAX, limits.read_bytes_max or _IO_BYTES_MAX,
            limits.write_bytes_max or _IO_BYTES_MAX,
        )
        self._time_granularity_ns = limits.time_granularity_ns
        self._random = random
        self._wall_clock = wall_clock
        self._keeps_marks = True
        self._lists_attributes = True

    @property
    def root(self) -> Handle:
        return self._root

    @property
    def io_bytes_max(self) -> int:
        return self._io_bytes_max

    def state(self) -> CoreFilerState:
        return self._pool.state()

    # --- Attributes and data

    @observed("getattr")
    async def getattr(self, handle: Handle) -> Attributes:
        return await self._getattr(handle)

    @observed("setattr")
    async def setattr(self, handle: Handle, changes: SetAttributes) -> Attributes:
        after = await self._call(nfs3.setattr_(handle, changes))
        return after or await self._getattr(handle)

    @observed("lookup")
    async def lookup(self, directory: Handle, name: bytes) -> Found:
        if name == b".." and directory == self._root:
            # Above a subdirectory of an export there would be more of the export.
            name = b"."
        return await self._lookup(directory, name)

    @observed("readlink")
    async def readlink(self, handle: Handle) -> bytes:
        return await self._call(nfs3.readlink(handle))

    @observed("read")
    async def read(self, handle: Handle, start: int, end: int) -> ReadResult:
        end = min(end, start + self._io_bytes_max)
        lane = Lane.METADATA if end - start <= _SMALL_BYTES else Lane.BULK
        result = await self._call(nfs3.read(handle, start, end), lane)
        while not result.eof and start + len(result.data) < end:
            # Servers may answer with less than asked for.
            more = await self._call(nfs3.read(handle, start + len(result.data), end), lane)
            if not more.data and not more.eof:
                raise Refused(errno.EIO, "the NAS answers READ with nothing")
            result = ReadResult(result.data + more.data, more.eof, more.attributes)
        return result

    @observed("write")
    async def write(
        self, handle: Handle, start: int, data: bytes | memoryview, *, stable: bool = False
    ) -> WriteResult:
        data = memoryview(data)[: self._io_bytes_max]
        lane = Lane.METADATA if len(data) <= _SMALL_BYTES else Lane.BULK
        return await self._call(nfs3.write(handle, start, data, stable=stable), lane)

    @observed("commit")
    async def commit(self, handle: Handle) -> CommitResult:
        return await self._call(nfs3.commit(handle), Lane.BULK)

    # --- Names: making

    @observed("create")
    async def create(
        self, directory: Handle, name: bytes, *, mode: int, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found:
        wanted = Wanted(stat.S_IFREG | stat.S_IMODE(mode), uid, gid)
        mark_ns = self._new_mark_ns()
        request = nfs3.create(directory, _checked(name), wanted, mark_ns)
        return await self._make(request, directory, name, wanted, repeated, mark_ns)

    @observed("mkdir")
    async def mkdir(
        self, directory: Handle, name: bytes, *, mode: int, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found:
        wanted = Wanted(stat.S_IFDIR | stat.S_IMODE(mode), uid, gid)
        request = nfs3.mkdir(directory, _checked(name), wanted)
        return await self._make(request, directory, name, wanted, repeated)

    @observed("symlink")
    async def symlink(
        self, directory: Handle, name: bytes, target: bytes, *, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found:
        if not target or b"\0" in target:
            raise Refused(errno.EINVAL)
        wanted = Wanted(stat.S_IFLNK | 0o777, uid, gid, target=target)
        request = nfs3.symlink(directory, _checked(name), wanted)
        return await self._make(request, directory, name, wanted, repeated)

    @observed("mknod")
    async def mknod(
        self, directory: Handle, name: bytes, *, mode: int, rdev: int, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found:
        if stat.S_IFMT(mode) not in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
            raise Refused(errno.EINVAL)
        wanted = Wanted(mode, uid, gid, rdev)
        request = nfs3.mknod(directory, _checked(name), wanted)
        return await self._make(request, directory, name, wanted, repeated)

    @observed("link")
    async def link(
        self, handle: Handle, directory: Handle, name: bytes, *, repeated: bool = False
    ) -> Found:
        return await self._link(handle, directory, name, repeated)

    async def _make(
        self, request: Request[nfs3.Made], directory: Handle, name: bytes, wanted: Wanted,
        repeated: bool, mark_ns: int | None = None,
    ) -> Found:
        attempts = Attempts()
        try:
            made = await self._call(request, attempts=attempts)
        except Refused as error:
            if error.errno != errno.EEXIST or not (repeated or attempts.uncertain):
                raise
            if repeated or attempts.outage or not self._keeps_marks:
                # Another process's attempt had another mark, a dying NAS may have set none.
                mark_ns = None
            found = await self._lookup(directory, name)
            if not await self._is_ours(found, wanted, mark_ns):
                raise
            if not wanted.looks_like(found.attributes):
                owner = SetAttributes(uid=wanted.uid, gid=wanted.gid)
                found = await self._changed(found, owner)
        else:
            if made.handle is None:
                found = await self._lookup(directory, name)
            else:
                attributes = made.attributes or await self._getattr(made.handle)
                found = Found(made.handle, attributes, made.directory)
            if mark_ns is not None and found.attributes.atime_ns != mark_ns:
                self._keeps_marks = False
        missing = wanted.permissions & ~found.attributes.mode & (stat.S_ISUID | stat.S_ISGID)
        if missing and wanted.type != stat.S_IFLNK:
            # Servers that set the owner after the mode clear set-uid and set-gid by that.
            mode = stat.S_IMODE(found.attributes.mode) | missing
            found = await self._changed(found, SetAttributes(mode=mode))
        return found

    async def _is_ours(self, found: Found, wanted: Wanted, mark_ns: int | None) -> bool:
        """Whether a lost attempt of ours made it; without a mark, looking so must do."""
        a = found.attributes
        if mark_ns is not None and a.atime_ns != mark_ns:
            return False
        if not wanted.looks_like(a) and (mark_ns is not None or not wanted.looks_unfinished(a)):
            return False
        target = wanted.target
        return not target or await self._call(nfs3.readlink(found.handle)) == target

    async def _changed(self, found: Found, changes: SetAttributes) -> Found:
        after = await self._call(nfs3.setattr_(found.handle, changes))
        return replace(found, attributes=after or await self._getattr(found.handle))

    def _new_mark_ns(self) -> int:
        """An atime by which a file is known as the one we made, should the answer get lost.

        It does what the verifier of an exclusive CREATE does, without the second round trip
        that sets the mode then: the second is now, the fraction random.
        """
        second_ns = self._wall_clock() // 1_000_000_000 * 1_000_000_000
        mark_ns = second_ns + self._random.randrange(1_000_000_000)
        return mark_ns - mark_ns % self._time_granularity_ns

    async def _link(
        self, handle: Handle, directory: Handle, name: bytes, repeated: bool
    ) -> Found:
        attempts = Attempts()
        request = nfs3.link(handle, directory, _checked(name))
        try:
            attributes, parent = await self._call(request, attempts=attempts)
        except Refused as error:
            if error.errno != errno.EEXIST or not (repeated or attempts.uncertain):
                raise
            found = await self._lookup(directory, name)
            if not _same_inode(found.attributes, await self._getattr(handle)):
                raise
            return found
        return Found(handle, attributes or await self._getattr(handle), parent)

    # --- Names: removing and moving

    @observed("remove")
    async def remove(
        self, directory: Handle, name: bytes, *, repeated: bool = False
    ) -> Attributes | None:
        return await self._remove(nfs3.remove(directory, _checked(name)), directory, repeated)

    @observed("rmdir")
    async def rmdir(
        self, directory: Handle, name: bytes, *, repeated: bool = False
    ) -> Attributes | None:
        return await self._remove(nfs3.rmdir(directory, _checked(name)), directory, repeated)

    @observed("rename")
    async def rename(
        self, directory: Handle, name: bytes, new_directory: Handle, new_name: bytes, *,
        flags: int = 0, repeated: bool = False,
    ) -> tuple[Attributes | None, Attributes | None]:
        for each in (name, new_name):
            _checked(each)
        if flags == _RENAME_NOREPLACE:
            return await self._rename_noreplace(
                directory, name, new_directory, new_name, repeated
            )
        if flags == _RENAME_EXCHANGE:
            return await self._exchange(directory, name, new_directory, new_name)
        if flags:
            raise Refused(errno.EINVAL)
        return await self._rename(directory, name, new_directory, new_name, repeated)

    async def _remove(
        self, request: Request[Attributes | None], directory: Handle, repeated: bool
    ) -> Attributes | None:
        attempts = Attempts()
        try:
            return await self._call(request, attempts=attempts)
        except Refused as error:
            if error.errno != errno.ENOENT or not (repeated or attempts.uncertain):
                raise
        return await self._getattr(directory)

    async def _rename(
        self, directory: Handle, name: bytes, new_directory: Handle, new_name: bytes,
        repeated: bool = False,
    ) -> tuple[Attributes | None, Attributes | None]:
        attempts = Attempts()
        request = nfs3.rename(directory, name, new_directory, new_name)
        try:
            return await self._call(request, attempts=attempts)
        except Refused as error:
            if error.errno != errno.ENOENT or not (repeated or attempts.uncertain):
                raise
            if await self._lookup_or_none(new_directory, new_name) is None:
                raise
        return await self._getattr(directory), await self._getattr(new_directory)

    async def _rename_noreplace(
        self, directory: Handle, name: bytes, new_directory: Handle, new_name: bytes,
        repeated: bool,
    ) -> tuple[Attributes | None, Attributes | None]:
        """LINK refuses an existing name atomically; what cannot be linked is looked up first."""
        if (directory, name) == (new_directory, new_name):
            raise Refused(errno.EEXIST)
        source = await self._lookup_or_none(directory, name)
        if source is None:
            if not repeated or await self._lookup_or_none(new_directory, new_name) is None:
                raise Refused(errno.ENOENT)
            return await self._getattr(directory), await self._getattr(new_directory)
        if not source.attributes.is_directory:
            try:
                linked = await self._link(source.handle, new_directory, new_name, repeated)
            except Refused as error:
                if error.errno not in _NO_LINK:
                    raise
            else:
                request = nfs3.remove(directory, name)
                before = await self._remove(request, directory, repeated)
                same = directory == new_directory
                return before, before if same else linked.directory
        if await self._lookup_or_none(new_directory, new_name) is not None:
            raise Refused(errno.EEXIST)
        return await self._rename(directory, name, new_directory, new_name, repeated)

    async def _exchange(
        self, directory: Handle, name: bytes, new_directory: Handle, new_name: bytes
    ) -> tuple[Attributes | None, Attributes | None]:
        """By a third name.  A crash in between leaves one of the two under that name."""
        one = await self._lookup(directory, name)
        other = await self._lookup(new_directory, new_name)
        if _same_inode(one.attributes, other.attributes):
            return await self._getattr(directory), await self._getattr(new_directory)
        third = b".exchange-%016x" % self._random.getrandbits(64)
        moves = (
            (directory, name, directory, third),
            (new_directory, new_name, directory, name),
            (directory, third, new_directory, new_name),
        )
        for done, move in enumerate(moves):
            try:
                result = await self._rename(*move)
            except Refused:
                for from_, from_name, to, to_name in reversed(moves[:done]):
                    await self._rename(to, to_name, from_, from_name)
                raise
        return result

    # --- Listings

    async def readdir(self, directory: Handle) -> AsyncIterator[list[DirectoryEntry]]:
        cookie, verifier = 0, bytes(8)
        restarts = 0
        while True:
            try:
                batch = await self._directory_batch(directory, cookie, verifier)
            except NfsError as error:
                if error.status != nfs3.NFS3ERR_BAD_COOKIE or restarts == _LISTING_TRIES:
                    raise Refused(error.errno) from error
                restarts += 1
                cookie, verifier = 0, bytes(8)
                continue
            if batch.entries:
                yield batch.entries
            if batch.eof:
                return
            if batch.cookie == cookie:
                raise Refused(errno.EIO, "the NAS's listing does not advance")
            cookie, verifier = batch.cookie, batch.verifier

    @observed("readdir")
    async def _directory_batch(
        self, directory: Handle, cookie: int, verifier: bytes
    ) -> nfs3.DirectoryBatch:
        """Raises NfsError."""
        reply_bytes, names_bytes, tries = _LISTING_BYTES, _LISTING_NAMES_BYTES, 0
        while True:
            if self._lists_attributes:
                request = nfs3.readdirplus(
                    directory, cookie, verifier, names_bytes=names_bytes, reply_bytes=reply_bytes
                )
            else:
                request = nfs3.readdir(directory, cookie, verifier, reply_bytes=reply_bytes)
            try:
                return await self._answered(request, Lane.BULK, Attempts())
            except NfsError as error:
                tries += 1
                if error.status == nfs3.NFS3ERR_NOTSUPP and self._lists_attributes:
                    self._lists_attributes = False
                elif tries == _LISTING_TRIES or error.status not in (
                    nfs3.NFS3ERR_NOENT, nfs3.NFS3ERR_STALE
                ):
                    raise
                else:
                    # Is it the directory that is gone, or one of its names?
                    await self._getattr(directory)
                    await trio.sleep(backoff_s(1, self._random))

    @observed("statfs")
    async def statfs(self) -> FileSystemStatistics:
        return await self._call(nfs3.fsstat(self._root))

    # --- Calls

    async def _getattr(self, handle: Handle) -> Attributes:
        return await self._call(nfs3.getattr_(handle))

    async def _lookup(self, directory: Handle, name: bytes) -> Found:
        looked = await self._call(nfs3.lookup(directory, _checked(name)))
        attributes = looked.attributes or await self._getattr(looked.handle)
        return Found(looked.handle, attributes, looked.directory)

    async def _lookup_or_none(self, directory: Handle, name: bytes) -> Found | None:
        try:
            return await self._lookup(directory, name)
        except Refused as error:
            if error.errno != errno.ENOENT:
                raise
            return None

    async def _call(
        self, request: Request[_T], lane: Lane = Lane.METADATA, *,
        attempts: Attempts | None = None,
    ) -> _T:
        try:
            return await self._answered(request, lane, attempts or Attempts())
        except NfsError as error:
            raise Refused(error.errno) from error

    async def _answered(self, request: Request[_T], lane: Lane, attempts: Attempts) -> _T:
        """The server's final word; while it says that it is busy, ask again."""
        postponed = 0
        while True:
            try:
                return await self._pool.call(request, lane, attempts)
            except Unencodable as error:
                # Only names are long: of symbolic links' targets nearly 4 KiB fit.
                raise Refused(errno.ENAMETOOLONG, str(error)) from error
            except RpcRejected as error:
                raise Refused(errno.EIO, str(error)) from error
            except NfsError as error:
                if error.status != nfs3.NFS3ERR_JUKEBOX:
                    raise
            postponed += 1
            await trio.sleep(backoff_s(postponed, self._random))


def _checked(name: bytes) -> bytes:
    """The server checks names too, but libnfs would cut one at a zero byte."""
    if not name or b"/" in name or b"\0" in name:
        raise Refused(errno.EINVAL)
    return name


def _same_inode(one: Attributes, other: Attributes) -> bool:
    return (one.fsid, one.fileid) == (other.fsid, other.fileid)
