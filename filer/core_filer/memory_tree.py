"""A POSIX file system as a value in memory: inodes, names, sparse bytes, unstable writes.

Pure: no I/O, no trio; the clock is a function passed in.  Owns what a NAS would have on its
disk, including what it would lose by a crash.  Does not own the protocol's manners (yield
points, faults, counters): those are in ``memory.py``.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from filer.core_filer.base import Attributes, SetAttributes
from filer.core_filer.repeats import Wanted
from filer.errors import Refused

ROOT_FILEID = 2
"""As on ext4; deliberately not 1, which is our own root's number."""

_BLOCK_BYTES = 4096
_NAME_BYTES_MAX = 255
_SIZE_MAX = (1 << 63) - 1

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


class SparseBytes:
    """File data; blocks never written take no space and read as zeros."""

    def __init__(self) -> None:
        self.size = 0
        self._blocks: dict[int, bytes] = {}

    def copy(self) -> SparseBytes:
        """Cheap: blocks are immutable and shared."""
        other = SparseBytes()
        other.size, other._blocks = self.size, self._blocks.copy()
        return other

    @property
    def used_bytes(self) -> int:
        return len(self._blocks) * _BLOCK_BYTES

    def read(self, start: int, end: int) -> bytes:
        end = min(end, self.size)
        if start >= end:
            return b""
        first, last = start // _BLOCK_BYTES, (end - 1) // _BLOCK_BYTES
        zeros = bytes(_BLOCK_BYTES)
        joined = b"".join(self._blocks.get(i, zeros) for i in range(first, last + 1))
        return joined[start - first * _BLOCK_BYTES : end - first * _BLOCK_BYTES]

    def blocks_needed(self, start: int, end: int) -> int:
        """How many blocks a write of ``[start, end)`` would add."""
        if start >= end:
            return 0
        touched = range(start // _BLOCK_BYTES, (end - 1) // _BLOCK_BYTES + 1)
        return sum(1 for i in touched if i not in self._blocks)

    def write(self, start: int, data: bytes) -> None:
        position, end = start, start + len(data)
        while position < end:
            index, offset = divmod(position, _BLOCK_BYTES)
            count = min(_BLOCK_BYTES - offset, end - position)
            piece = data[position - start : position - start + count]
            if count < _BLOCK_BYTES:
                old = self._blocks.get(index, bytes(_BLOCK_BYTES))
                piece = old[:offset] + piece + old[offset + count :]
            self._blocks[index] = piece
            position += count
        self.size = max(self.size, end)

    def truncate(self, size: int) -> None:
        if size < self.size:
            keep, partial = divmod(size, _BLOCK_BYTES)
            for index in [i for i in self._blocks if i >= keep + bool(partial)]:
                del self._blocks[index]
            if partial and keep in self._blocks:
                self._blocks[keep] = self._blocks[keep][:partial].ljust(_BLOCK_BYTES, b"\0")
        self.size = size


@dataclass(eq=False, slots=True)
class Inode:
    fileid: int
    generation: int
    mode: int
    uid: int
    gid: int
    rdev: int = 0
    nlink: int = 1
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    data: SparseBytes = field(default_factory=SparseBytes)
    """Regular files; a symbolic link's target."""
    entries: dict[bytes, Inode] = field(default_factory=dict)
    """Directories, in order of creation."""
    parent: Inode | None = None
    """Directories."""
    stable: tuple[SparseBytes, int, int] | None = None
    """Data, mtime and ctime a crash would bring back, while there are unstable writes."""

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def attributes(self) -> Attributes:
        size = _BLOCK_BYTES if self.is_directory else self.data.size
        return Attributes(
            fileid=self.fileid, mode=self.mode, nlink=self.nlink, uid=self.uid, gid=self.gid,
            size=size, used_bytes=self.data.used_bytes, rdev=self.rdev,
            atime_ns=self.atime_ns, mtime_ns=self.mtime_ns, ctime_ns=self.ctime_ns, fsid=1,
        )


class Tree:
    """The file system.  Every method that fails raises ``Refused`` and has changed nothing."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self.capacity_bytes: int | None = None
        """Data beyond it is ENOSPC; ``None`` is no limit."""
        self.time_granularity_ns = 1
        """1: every change has its own time.  Coarser: changes may share one, as on old NAS."""
        self.reuse_fileids = False
        self.files_made = 0
        self._now_ns = now_ns
        self._last_ns = 0
        self._free_fileids: list[int] = []
        self._next_fileid = ROOT_FILEID
        self._used_blocks = 0
        self._inodes: dict[tuple[int, int], Inode] = {}
        self.root = self._new_inode(stat.S_IFDIR | 0o755, 0, 0)
        self.root.nlink = 2
        self.root.parent = self.root

    # --- Finding

    def by_identity(self, fileid: int, generation: int) -> Inode:
        inode = self._inodes.get((fileid, generation))
        if inode is None:
            raise Refused(errno.ESTALE)
        return inode

    def lookup(self, directory: Inode, name: bytes) -> Inode:
        self._check_directory(directory)
        if name == b".":
            return directory
        if name == b"..":
            assert directory.parent is not None
            return directory.parent
        self._check_length(name)
        inode = directory.entries.get(name)
        if inode is None:
            raise Refused(errno.ENOENT)
        return inode

    def walk(self, path: bytes) -> Inode:
        inode = self.root
        for name in path.split(b"/"):
            if name:
                inode = self.lookup(inode, name)
        return inode

    def __iter__(self) -> Iterator[Inode]:
        return iter(list(self._inodes.values()))

    @property
    def used_bytes(self) -> int:
        return self._used_blocks * _BLOCK_BYTES

    # --- Contents

    def write(self, inode: Inode, start: int, data: bytes, *, stable: bool) -> None:
        if inode.is_directory:
            raise Refused(errno.EISDIR)
        if not stat.S_ISREG(inode.mode):
            raise Refused(errno.EINVAL)
        if start + len(data) > _SIZE_MAX:
            raise Refused(errno.EFBIG)
        needed = inode.data.blocks_needed(start, start + len(data))
        if self.capacity_bytes is not None:
            free = self.capacity_bytes // _BLOCK_BYTES - self._used_blocks
            if needed > max(free, 0):
                raise Refused(errno.ENOSPC)
        if stable:
            # A server syncs the whole file: what was unstable before is stable too.
            inode.stable = None
        elif inode.stable is None:
            inode.stable = (inode.data.copy(), inode.mtime_ns, inode.ctime_ns)
        inode.data.write(start, data)
        self._used_blocks += needed
        self._changed(inode)

    def commit(self, inode: Inode) -> None:
        inode.stable = None

    def lose_unstable(self) -> None:
        for inode in self._inodes.values():
            if inode.stable is not None:
                self._count_blocks(inode, -1)
                inode.data, inode.mtime_ns, inode.ctime_ns = inode.stable
                self._count_blocks(inode, 1)
                inode.stable = None

    def set_attributes(self, inode: Inode, changes: SetAttributes) -> None:
        if changes.size is not None:
            if inode.is_directory:
                raise Refused(errno.EISDIR)
            if not stat.S_ISREG(inode.mode):
                raise Refused(errno.EINVAL)
            if changes.size > _SIZE_MAX:
                raise Refused(errno.EFBIG)
            self._count_blocks(inode, -1)
            inode.data.truncate(changes.size)
            self._count_blocks(inode, 1)
        self._changed(inode, mtime=changes.size is not None)
        if changes.mode is not None:
            inode.mode = stat.S_IFMT(inode.mode) | stat.S_IMODE(changes.mode)
        if changes.uid is not None:
            inode.uid = changes.uid
        if changes.gid is not None:
            inode.gid = changes.gid
        if changes.atime_ns is not None:
            inode.atime_ns = changes.atime_ns
        if changes.mtime_ns is not None:
            inode.mtime_ns = changes.mtime_ns
        if inode.stable is not None:
            # SETATTR is stable at once, also while earlier writes are not.
            data, mtime_ns, _ = inode.stable
            if changes.size is not None:
                data.truncate(changes.size)
            if changes.size is not None or changes.mtime_ns is not None:
                mtime_ns = inode.mtime_ns
            inode.stable = (data, mtime_ns, inode.ctime_ns)

    # --- Names

    def make(self, directory: Inode, name: bytes, wanted: Wanted) -> Inode:
        self._check_new_name(directory, name)
        inode = self._new_inode(wanted.mode, wanted.uid, wanted.gid)
        inode.rdev = wanted.rdev
        inode.data.write(0, wanted.target)
        self._count_blocks(inode, 1)
        if inode.is_directory:
            inode.nlink = 2
            inode.parent = directory
            directory.nlink += 1
        directory.entries[name] = inode
        self._changed(directory)
        return inode

    def link(self, inode: Inode, directory: Inode, name: bytes) -> None:
        self._check_directory(directory)
        if inode.is_directory:
            raise Refused(errno.EPERM)
        self._check_new_name(directory, name)
        inode.nlink += 1
        directory.entries[name] = inode
        self._changed(inode, mtime=False)
        self._changed(directory)

    def remove(self, directory: Inode, name: bytes) -> None:
        inode = self._existing(directory, name)
        if inode.is_directory:
            raise Refused(errno.EISDIR)
        del directory.entries[name]
        self._changed(directory)
        self._unlinked(inode)

    def rmdir(self, directory: Inode, name: bytes) -> None:
        inode = self._existing(directory, name)
        self._check_empty_directory(inode)
        del directory.entries[name]
        directory.nlink -= 1
        self._changed(directory)
        self._unlinked(inode)

    def rename(
        self, directory: Inode, name: bytes, new_directory: Inode, new_name: bytes, flags: int
    ) -> None:
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise Refused(errno.EINVAL)
        self._check_directory(new_directory)
        self._check_name(new_name)
        inode = self._existing(directory, name)
        target = new_directory.entries.get(new_name)
        self._check_no_loop(inode, new_directory)
        if flags == RENAME_NOREPLACE and target is not None:
            raise Refused(errno.EEXIST)
        if flags == RENAME_EXCHANGE:
            if target is None:
                raise Refused(errno.ENOENT)
            self._check_no_loop(target, directory)
        if inode is target:
            return
        if target is not None and flags != RENAME_EXCHANGE:
            if inode.is_directory:
                self._check_empty_directory(target)
                new_directory.nlink -= 1
            elif target.is_directory:
                raise Refused(errno.EISDIR)
        del directory.entries[name]
        if flags == RENAME_EXCHANGE and target is not None:
            directory.entries[name] = target
            self._moved(target, new_directory, directory)
        new_directory.entries[new_name] = inode
        self._moved(inode, directory, new_directory)
        self._changed(directory)
        if new_directory is not directory:
            self._changed(new_directory)
        if target is not None and flags != RENAME_EXCHANGE:
            self._unlinked(target)

    # --- Inside

    def _new_inode(self, mode: int, uid: int, gid: int) -> Inode:
        if self.reuse_fileids and self._free_fileids:
            fileid = self._free_fileids.pop()
        else:
            fileid = self._next_fileid
            self._next_fileid += 1
        self.files_made += 1
        inode = Inode(fileid, self.files_made, mode, uid, gid)
        self._changed(inode)
        inode.atime_ns = inode.mtime_ns
        self._inodes[fileid, inode.generation] = inode
        return inode

    def _changed(self, inode: Inode, *, mtime: bool = True) -> None:
        exact_ns = self._last_ns = max(self._last_ns + 1, self._now_ns())
        inode.ctime_ns = exact_ns - exact_ns % self.time_granularity_ns
        if mtime:
            inode.mtime_ns = inode.ctime_ns

    def _unlinked(self, inode: Inode) -> None:
        inode.nlink = 0 if inode.is_directory else inode.nlink - 1
        if inode.nlink:
            self._changed(inode, mtime=False)
            return
        self._count_blocks(inode, -1)
        del self._inodes[inode.fileid, inode.generation]
        self._free_fileids.append(inode.fileid)

    def _moved(self, inode: Inode, old_directory: Inode, new_directory: Inode) -> None:
        if inode.is_directory:
            inode.parent = new_directory
            old_directory.nlink -= 1
            new_directory.nlink += 1
        self._changed(inode, mtime=False)

    def _count_blocks(self, inode: Inode, sign: int) -> None:
        self._used_blocks += sign * inode.data.used_bytes // _BLOCK_BYTES

    def _existing(self, directory: Inode, name: bytes) -> Inode:
        if name in (b".", b".."):
            raise Refused(errno.EINVAL)
        return self.lookup(directory, name)

    def _check_directory(self, inode: Inode) -> None:
        if not inode.is_directory:
            raise Refused(errno.ENOTDIR)

    def _check_empty_directory(self, inode: Inode) -> None:
        self._check_directory(inode)
        if inode.entries:
            raise Refused(errno.ENOTEMPTY)

    def _check_no_loop(self, inode: Inode, directory: Inode) -> None:
        """*inode* must not become its own descendant."""
        ancestor = directory
        while inode.is_directory and ancestor is not self.root:
            if ancestor is inode:
                raise Refused(errno.EINVAL)
            assert ancestor.parent is not None
            ancestor = ancestor.parent

    def _check_length(self, name: bytes) -> None:
        if len(name) > _NAME_BYTES_MAX:
            raise Refused(errno.ENAMETOOLONG)

    def _check_name(self, name: bytes) -> None:
        self._check_length(name)
        if not name or b"/" in name or b"\0" in name:
            raise Refused(errno.EINVAL)
        if name in (b".", b".."):
            raise Refused(errno.EEXIST)

    def _check_new_name(self, directory: Inode, name: bytes) -> None:
        self._check_directory(directory)
        self._check_name(name)
        if name in directory.entries:
            raise Refused(errno.EEXIST)
