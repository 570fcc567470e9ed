"""A core filer that is a directory here: a NAS mounted by the kernel, or a local tree.

Inodes are named by the file system's own handles (name_to_handle_at(2), which needs root), so
they survive renames and restarts as NFS handles do.  Calls that may block run in threads, a
bounded number; a cancelled call is left to its thread.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import TypeVar, TypeVarTuple

import trio

from filer.core_filer._linux import (
    chown_descriptor,
    file_system_type,
    link_descriptor,
    name_to_handle,
    open_by_handle,
    renameat2,
    set_times,
)
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
from filer.core_filer.descriptors import Descriptors, OpenInode
from filer.core_filer.observed import observed, report_reachable
from filer.core_filer.repeats import Wanted
from filer.errors import Misconfigured, Refused

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

_IO_BYTES_MAX = 1 << 20
_THREADS_MAX = 32
_READDIR_BATCH = 256
_HUNG_S = 15.0
"""A call that takes longer means that the file system does not answer."""

_RENAME_EXCHANGE = 2
_PRIVATE, _PRIVATE_DIRECTORY = 0o600, 0o700
"""Modes of what has been made but not yet given to its owner."""

_LOCAL_FILE_SYSTEMS = frozenset({
    0xEF53,  # ext2, ext3, ext4
    0x58465342,  # xfs
    0x9123683E,  # btrfs
    0x01021994,  # tmpfs
    0x2FC12FC1,  # zfs
})
"""Where fstat(2) of an open file never waits, so that it needs no thread."""


class DirectoryCoreFiler:
    """Raises Misconfigured if *path* is no directory or its file system gives no handles."""

    def __init__(self, path: Path, *, random: Random) -> None:
        self._random = random
        self._verifier = random.randbytes(8)
        self._limiter = trio.CapacityLimiter(_THREADS_MAX)
        self._started_s: dict[int, float] = {}
        self._calls = 0
        self._scratch = bytearray(_IO_BYTES_MAX + 1)
        try:
            self._root_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Misconfigured(
                f"core filer file://{path}: {error.strerror}",
                "give the absolute path of an existing directory",
            ) from error
        self._device = os.fstat(self._root_fd).st_dev
        self._is_local = file_system_type(self._root_fd) in _LOCAL_FILE_SYSTEMS
        self._root = self._check_handles(path)
        self._descriptors = Descriptors(self._root_fd)
        report_reachable(True)

    def close(self) -> None:
        self._descriptors.close()
        os.close(self._root_fd)

    def _check_handles(self, path: Path) -> Handle:
        try:
            handle = name_to_handle(self._root_fd, b"")
            os.close(open_by_handle(self._root_fd, handle, os.O_PATH))
        except OSError as error:
            os.close(self._root_fd)
            hint = (
                "run as root (CAP_DAC_READ_SEARCH)" if error.errno == errno.EPERM else
                "its file system has no stable file handles; use ext4, xfs, btrfs or an NFS mount"
            )
            raise Misconfigured(
                f"core filer file://{path}: no file handles ({error.strerror})", hint
            ) from error
        return Handle(handle)

    # --- The interface

    @property
    def root(self) -> Handle:
        return self._root

    @property
    def io_bytes_max(self) -> int:
        return _IO_BYTES_MAX

    def state(self) -> CoreFilerState:
        oldest_s = min(self._started_s.values(), default=None)
        hung = oldest_s is not None and trio.current_time() - oldest_s > _HUNG_S
        report_reachable(not hung)
        return CoreFilerState(
            reachable=not hung, unreachable_since=oldest_s if hung else None,
            reason="a system call does not return" if hung else "",
            in_flight=len(self._started_s), reconnects=0,
        )

    @observed("getattr")
    async def getattr(self, handle: Handle) -> Attributes:
        if self._is_local and (inode := self._descriptors.acquire_nowait(handle)) is not None:
            try:
                with _translated():
                    return self._attributes(handle, inode)
            finally:
                self._descriptors.release(inode)
        return await self._in_thread(self._getattr, handle)

    @observed("setattr")
    async def setattr(self, handle: Handle, changes: SetAttributes) -> Attributes:
        return await self._in_thread(self._setattr, handle, changes)

    @observed("lookup")
    async def lookup(self, directory: Handle, name: bytes) -> Found:
        return await self._in_thread(self._lookup, directory, name)

    @observed("readlink")
    async def readlink(self, handle: Handle) -> bytes:
        return await self._in_thread(self._readlink, handle)

    @observed("read")
    async def read(self, handle: Handle, start: int, end: int) -> ReadResult:
        end = min(end, start + _IO_BYTES_MAX)
        if self._is_local and (inode := self._descriptors.acquire_nowait(handle)) is not None:
            try:
                with _translated():
                    result = self._read_cached(handle, inode, start, end)
            finally:
                self._descriptors.release(inode)
            if result is not None:
                await trio.lowlevel.checkpoint()
                return result
        return await self._in_thread(self._read, handle, start, end)

    @observed("write")
    async def write(
        self, handle: Handle, start: int, data: bytes | memoryview, *, stable: bool = False
    ) -> WriteResult:
        return await self._in_thread(self._write, handle, start, data, stable)

    @observed("commit")
    async def commit(self, handle: Handle) -> CommitResult:
        return await self._in_thread(self._commit, handle)

    @observed("create")
    async def create(
        self, directory: Handle, name: bytes, *, mode: int, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found:
        def create(directory_fd: int) -> None:
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW
            os.close(os.open(name, flags, _PRIVATE, dir_fd=directory_fd))

        wanted = Wanted(stat.S_IFREG | stat.S_IMODE(mode), uid, gid)
        return await self._in_thread(self._make, directory, name, create, wanted, repeated)

    @observed("mkdir")
    async def mkdir(
        self, directory: Handle, name: bytes, *, mode: int, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found:
        def mkdir(directory_fd: int) -> None:
            os.mkdir(name, _PRIVATE_DIRECTORY, dir_fd=directory_fd)

        wanted = Wanted(stat.S_IFDIR | stat.S_IMODE(mode), uid, gid)
        return await self._in_thread(self._make, directory, name, mkdir, wanted, repeated)

    @observed("symlink")
    async def symlink(
        self, directory: Handle, name: bytes, target: bytes, *, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found:
        def symlink(directory_fd: int) -> None:
            os.symlink(target, name, dir_fd=directory_fd)

        wanted = Wanted(stat.S_IFLNK | 0o777, uid, gid, target=target)
        return await self._in_thread(self._make, directory, name, symlink, wanted, repeated)

    @observed("mknod")
    async def mknod(
        self, directory: Handle, name: bytes, *, mode: int, rdev: int, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found:
        if stat.S_IFMT(mode) not in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
            raise Refused(errno.EINVAL)

        def mknod(directory_fd: int) -> None:
            os.mknod(name, stat.S_IFMT(mode) | _PRIVATE, rdev, dir_fd=directory_fd)

        wanted = Wanted(mode, uid, gid, rdev)
        return await self._in_thread(self._make, directory, name, mknod, wanted, repeated)

    @observed("link")
    async def link(
        self, handle: Handle, directory: Handle, name: bytes, *, repeated: bool = False
    ) -> Found:
        return await self._in_thread(self._link, handle, directory, name, repeated)

    @observed("remove")
    async def remove(
        self, directory: Handle, name: bytes, *, repeated: bool = False
    ) -> Attributes | None:
        return await self._in_thread(self._remove, directory, name, False, repeated)

    @observed("rmdir")
    async def rmdir(
        self, directory: Handle, name: bytes, *, repeated: bool = False
    ) -> Attributes | None:
        return await self._in_thread(self._remove, directory, name, True, repeated)

    @observed("rename")
    async def rename(
        self, directory: Handle, name: bytes, new_directory: Handle, new_name: bytes, *,
        flags: int = 0, repeated: bool = False,
    ) -> tuple[Attributes | None, Attributes | None]:
        return await self._in_thread(
            self._rename, directory, name, new_directory, new_name, flags, repeated
        )

    async def readdir(self, directory: Handle) -> AsyncIterator[list[DirectoryEntry]]:
        listing = _Listing(self._descriptors, directory, self._device)
        try:
            while batch := await self._readdir_batch(listing):
                yield batch
        finally:
            listing.close()

    @observed("statfs")
    async def statfs(self) -> FileSystemStatistics:
        s = await self._in_thread(os.fstatvfs, self._root_fd)
        return FileSystemStatistics(
            s.f_blocks * s.f_frsize, s.f_bfree * s.f_frsize, s.f_bavail * s.f_frsize,
            s.f_files, s.f_ffree, s.f_favail,
        )

    # --- Threads

    async def _in_thread(self, function: Callable[[*_Ts], _T], *args: *_Ts) -> _T:
        self._calls += 1
        call = self._calls
        self._started_s[call] = trio.current_time()
        try:
            with _translated():
                return await trio.to_thread.run_sync(
                    function, *args, limiter=self._limiter, abandon_on_cancel=True
                )
        finally:
            del self._started_s[call]

    # --- In a thread, except where said

    def _attributes(self, handle: Handle, inode: OpenInode) -> Attributes:
        """Also on the loop, of a local file system."""
        found = os.fstat(inode.path_fd)
        if found.st_nlink == 0:
            # Removed, and only our descriptor keeps it: to everybody else it is gone.
            self._descriptors.drop(handle)
            raise Refused(errno.ESTALE)
        return _attributes(found)

    def _read_cached(
        self, handle: Handle, inode: OpenInode, start: int, end: int
    ) -> ReadResult | None:
        """On the loop: what the kernel has in its page cache, else ``None``.

        Asks for one byte more, because RWF_NOWAIT is short both at the end of the file and at a
        page not cached: only when the extra byte came too is the answer certain.
        """
        count = end - start
        fd = inode.read_fd_if_open
        if fd < 0 or count <= 0:
            return None
        with memoryview(self._scratch)[: count + 1] as buffer:
            try:
                got = os.preadv(fd, [buffer], start, os.RWF_NOWAIT)
            except OSError:
                return None
            if got != count + 1:
                return None
            return ReadResult(bytes(buffer[:count]), False, self._attributes(handle, inode))

    def _getattr(self, handle: Handle) -> Attributes:
        with self._descriptors.use(handle) as inode:
            return self._attributes(handle, inode)

    def _setattr(self, handle: Handle, changes: SetAttributes) -> Attributes:
        with self._descriptors.use(handle) as inode:
            mode = self._attributes(handle, inode).mode
            if changes.size is not None:
                _check_data_file(mode)
                os.ftruncate(inode.write_fd(), changes.size)
            if changes.uid is not None or changes.gid is not None:
                chown_descriptor(inode.path_fd, changes.uid, changes.gid)
            if changes.mode is not None and not stat.S_ISLNK(mode):
                os.chmod(inode.proc_path, stat.S_IMODE(changes.mode))
            if changes.atime_ns is not None or changes.mtime_ns is not None:
                set_times(inode.proc_path, changes.atime_ns, changes.mtime_ns)
            return self._attributes(handle, inode)

    def _lookup(self, directory: Handle, name: bytes) -> Found:
        if name not in (b".", b".."):
            _check_name(name)
        with self._directory(directory) as parent:
            if name == b".." and directory == self._root:
                name = b"."
            handle, attributes = self._find(parent.path_fd, name)
            return Found(handle, attributes, self._attributes(directory, parent))

    def _find(self, directory_fd: int, name: bytes) -> tuple[Handle, Attributes]:
        path_fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=directory_fd)
        try:
            found = os.fstat(path_fd)
            if found.st_dev != self._device:
                raise Refused(errno.EXDEV, "another file system is mounted there")
            handle = Handle(name_to_handle(path_fd, b""))
        except BaseException:
            os.close(path_fd)
            raise
        self._descriptors.adopt(handle, path_fd)
        return handle, _attributes(found)

    def _readlink(self, handle: Handle) -> bytes:
        with self._descriptors.use(handle) as inode:
            if not stat.S_ISLNK(self._attributes(handle, inode).mode):
                raise Refused(errno.EINVAL)
            return os.readlink(b"", dir_fd=inode.path_fd)

    def _read(self, handle: Handle, start: int, end: int) -> ReadResult:
        with self._descriptors.use(handle) as inode:
            _check_data_file(self._attributes(handle, inode).mode)
            fd = inode.read_fd()
            data = os.pread(fd, end - start, start)
            while len(data) < end - start and (
                more := os.pread(fd, end - start - len(data), start + len(data))
            ):
                data += more
            attributes = self._attributes(handle, inode)
            return ReadResult(data, start + len(data) >= attributes.size, attributes)

    def _write(
        self, handle: Handle, start: int, data: bytes | memoryview, stable: bool
    ) -> WriteResult:
        with self._descriptors.use(handle) as inode:
            before = self._attributes(handle, inode)
            _check_data_file(before.mode)
            count = os.pwritev(
                inode.write_fd(), [data], start, os.RWF_SYNC if stable else 0
            )
            after = self._attributes(handle, inode)
            return WriteResult(count, self._verifier, stable, before.version, after)

    def _commit(self, handle: Handle) -> CommitResult:
        with self._descriptors.use(handle) as inode:
            _check_data_file(self._attributes(handle, inode).mode)
            try:
                os.fsync(inode.write_fd())
            except OSError:
                # The kernel forgets what it failed to write: whoever relies on unstable data
                # has to send it again.
                self._verifier = self._random.randbytes(8)
                raise
            return CommitResult(self._verifier, self._attributes(handle, inode))

    def _make(
        self, directory: Handle, name: bytes, make: Callable[[int], None], wanted: Wanted,
        repeated: bool,
    ) -> Found:
        _check_new_name(name)
        with self._directory(directory) as parent:
            is_finished = False
            try:
                make(parent.path_fd)
            except FileExistsError:
                if not repeated:
                    raise
                handle, attributes = self._find(parent.path_fd, name)
                is_finished = wanted.looks_like(attributes)
                if not (is_finished or _looks_half_made(wanted, attributes)) or (
                    wanted.target and self._readlink(handle) != wanted.target
                ):
                    raise
            else:
                handle, attributes = self._find(parent.path_fd, name)
            if not is_finished:
                with self._descriptors.use(handle) as inode:
                    # Made for root only and given away afterwards: never too open in between.
                    chown_descriptor(inode.path_fd, wanted.uid, wanted.gid)
                    if wanted.type != stat.S_IFLNK:
                        os.chmod(inode.proc_path, wanted.permissions)
                    attributes = self._attributes(handle, inode)
            return Found(handle, attributes, self._attributes(directory, parent))

    def _link(self, handle: Handle, directory: Handle, name: bytes, repeated: bool) -> Found:
        _check_new_name(name)
        with self._descriptors.use(handle) as inode, self._directory(directory) as parent:
            try:
                link_descriptor(inode.path_fd, parent.path_fd, name)
            except FileExistsError:
                if not repeated or self._find(parent.path_fd, name)[0] != handle:
                    raise
            attributes = self._attributes(handle, inode)
            return Found(handle, attributes, self._attributes(directory, parent))

    def _remove(
        self, directory: Handle, name: bytes, is_directory: bool, repeated: bool
    ) -> Attributes:
        _check_old_name(name)
        with self._directory(directory) as parent:
            try:
                handle = name_to_handle(parent.path_fd, name)
                if is_directory:
                    os.rmdir(name, dir_fd=parent.path_fd)
                else:
                    os.unlink(name, dir_fd=parent.path_fd)
                self._descriptors.drop(handle)
            except FileNotFoundError:
                if not repeated:
                    raise
            return self._attributes(directory, parent)

    def _rename(
        self, directory: Handle, name: bytes, new_directory: Handle, new_name: bytes,
        flags: int, repeated: bool,
    ) -> tuple[Attributes, Attributes]:
        _check_old_name(name)
        _check_new_name(new_name)
        with self._directory(directory) as old, self._directory(new_directory) as new:
            replaced = _handle_or_none(new.path_fd, new_name)
            try:
                renameat2(old.path_fd, name, new.path_fd, new_name, flags)
            except FileNotFoundError:
                if not repeated or flags == _RENAME_EXCHANGE or replaced is None:
                    raise
            else:
                if replaced is not None:
                    self._descriptors.drop(replaced)
            return self._attributes(directory, old), self._attributes(new_directory, new)

    @observed("readdir")
    async def _readdir_batch(self, listing: _Listing) -> list[DirectoryEntry]:
        return await self._in_thread(listing.next_batch)

    @contextmanager
    def _directory(self, handle: Handle) -> Iterator[OpenInode]:
        with self._descriptors.use(handle) as inode:
            if not self._attributes(handle, inode).is_directory:
                raise Refused(errno.ENOTDIR)
            yield inode


class _Listing:
    """One reading of a directory, in batches; used by one thread at a time.

    May be closed while an abandoned thread still reads: whoever comes last closes.
    """

    def __init__(self, descriptors: Descriptors, directory: Handle, device: int) -> None:
        self._descriptors = descriptors
        self._directory = directory
        self._device = device
        self._lock = threading.Lock()
        self._busy = self._closed = False
        self._fd = -1

    def next_batch(self) -> list[DirectoryEntry]:
        """Empty at the end."""
        with self._lock:
            if self._closed:
                return []
            self._busy = True
        try:
            if self._fd < 0:
                self._open()
            return [
                self._entry(os.fsencode(entry.name), entry.inode())
                for entry in islice(self._entries, _READDIR_BATCH)
            ]
        finally:
            with self._lock:
                self._busy = False
                close = self._closed
            if close:
                self._close()

    def _open(self) -> None:
        with self._descriptors.use(self._directory) as inode:
            self._fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=inode.path_fd)
        self._entries = os.scandir(self._fd)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            close = not self._busy
        if close:
            self._close()

    def _close(self) -> None:
        if self._fd >= 0:
            self._entries.close()
            os.close(self._fd)

    def _entry(self, name: bytes, fileid: int) -> DirectoryEntry:
        handle = _handle_or_none(self._fd, name)
        try:
            found = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except OSError:
            return DirectoryEntry(name, fileid, None, None)
        if handle is None or found.st_dev != self._device:
            return DirectoryEntry(name, fileid, None, None)
        return DirectoryEntry(name, found.st_ino, handle, _attributes(found))


def _attributes(s: os.stat_result) -> Attributes:
    return Attributes(
        fileid=s.st_ino, mode=s.st_mode, nlink=s.st_nlink, uid=s.st_uid, gid=s.st_gid,
        size=s.st_size, used_bytes=s.st_blocks * 512, rdev=s.st_rdev,
        atime_ns=s.st_atime_ns, mtime_ns=s.st_mtime_ns, ctime_ns=s.st_ctime_ns, fsid=s.st_dev,
    )


def _handle_or_none(directory_fd: int, name: bytes) -> Handle | None:
    try:
        return Handle(name_to_handle(directory_fd, name))
    except OSError:
        return None


def _looks_half_made(wanted: Wanted, found: Attributes) -> bool:
    """Whether we may have died between making *found* and giving it owner and mode."""
    mode = wanted.type | (_PRIVATE_DIRECTORY if wanted.type == stat.S_IFDIR else _PRIVATE)
    # A set-gid directory gives its own group.
    half = replace(wanted, mode=mode, gid=found.gid)
    return half.looks_like(found) or replace(half, uid=os.geteuid()).looks_like(found)


def _check_data_file(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise Refused(errno.EISDIR)
    if not stat.S_ISREG(mode):
        raise Refused(errno.EINVAL)


def _check_name(name: bytes) -> None:
    """A path instead of a name would lead out of the directory."""
    if not name or b"/" in name or b"\0" in name:
        raise Refused(errno.EINVAL)


def _check_new_name(name: bytes) -> None:
    _check_name(name)
    if name in (b".", b".."):
        raise Refused(errno.EEXIST)


def _check_old_name(name: bytes) -> None:
    _check_name(name)
    if name in (b".", b".."):
        raise Refused(errno.EINVAL)


@contextmanager
def _translated() -> Iterator[None]:
    """What the file system refuses reaches our caller as the same errno."""
    try:
        yield
    except OSError as error:
        raise Refused(error.errno or errno.EIO) from error
