"""Open descriptors of recently used inodes, so that a handle is not resolved for every call.

Owns a bounded number of descriptors and when they are closed.  Called from many threads; a
descriptor in use is never closed under its user.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from filer.core_filer._linux import open_by_handle

_INODES_MAX = 512


class OpenInode:
    """Up to three descriptors of one inode, opened when first needed.

    ``path_fd`` (``O_PATH``) has no side effects on FIFOs and devices and needs no permission;
    only regular files are ever opened for reading or writing.
    """

    def __init__(self, path_fd: int) -> None:
        self.path_fd = path_fd
        self.users = 0
        self.dropped = False
        self._read_fd = -1
        self._write_fd = -1
        self._lock = threading.Lock()

    @property
    def proc_path(self) -> bytes:
        """A path that leads to the inode itself, for calls that take only paths."""
        return b"/proc/self/fd/%d" % self.path_fd

    @property
    def read_fd_if_open(self) -> int:
        """-1 if it is not."""
        return self._read_fd

    def read_fd(self) -> int:
        with self._lock:
            if self._read_fd < 0:
                self._read_fd = os.open(self.proc_path, os.O_RDONLY | os.O_NOATIME)
            return self._read_fd

    def write_fd(self) -> int:
        with self._lock:
            if self._write_fd < 0:
                self._write_fd = os.open(self.proc_path, os.O_WRONLY)
            return self._write_fd

    def close(self) -> None:
        for fd in (self.path_fd, self._read_fd, self._write_fd):
            if fd >= 0:
                os.close(fd)


class Descriptors:
    """*mount_fd*: any (not ``O_PATH``) descriptor on the file system of the handles."""

    def __init__(self, mount_fd: int) -> None:
        self._mount_fd = mount_fd
        self._inodes: OrderedDict[bytes, OpenInode] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def use(self, handle: bytes) -> Iterator[OpenInode]:
        """Raises OSError (ESTALE) if the inode is gone."""
        inode = self.acquire_nowait(handle)
        if inode is None:
            path_fd = open_by_handle(self._mount_fd, handle, os.O_PATH | os.O_NOFOLLOW)
            inode = self._keep(handle, path_fd)
        try:
            yield inode
        finally:
            self.release(inode)

    def acquire_nowait(self, handle: bytes) -> OpenInode | None:
        """``None`` unless it is open already; otherwise the caller must `release` it."""
        with self._lock:
            inode = self._inodes.get(handle)
            if inode is not None:
                self._inodes.move_to_end(handle)
                inode.users += 1
            return inode

    def adopt(self, handle: bytes, path_fd: int) -> None:
        """Keep a descriptor that the caller opened anyway."""
        self.release(self._keep(handle, path_fd))

    def release(self, inode: OpenInode) -> None:
        with self._lock:
            inode.users -= 1
            close = inode.dropped and inode.users == 0
        if close:
            inode.close()

    def drop(self, handle: bytes) -> None:
        """Close what is open of *handle*: a removed file must not keep its space."""
        with self._lock:
            inode = self._inodes.pop(handle, None)
            unused = [] if inode is None else self._mark_dropped([inode])
        for inode in unused:
            inode.close()

    def close(self) -> None:
        with self._lock:
            unused = self._mark_dropped(list(self._inodes.values()))
            self._inodes.clear()
        for inode in unused:
            inode.close()

    def _keep(self, handle: bytes, path_fd: int) -> OpenInode:
        """Enter it into the table, in use; of two threads that come at once one wins."""
        with self._lock:
            inode = self._inodes.get(handle)
            unused = []
            if inode is None:
                inode = self._inodes[handle] = OpenInode(path_fd)
                path_fd = -1
                oldest = [
                    self._inodes.popitem(last=False)[1]
                    for _ in range(len(self._inodes) - _INODES_MAX)
                ]
                unused = self._mark_dropped(oldest)
            inode.users += 1
        if path_fd >= 0:
            os.close(path_fd)
        for other in unused:
            other.close()
        return inode

    @staticmethod
    def _mark_dropped(inodes: list[OpenInode]) -> list[OpenInode]:
        """Those among *inodes* that nobody uses, for the caller to close outside the lock."""
        for inode in inodes:
            inode.dropped = True
        return [inode for inode in inodes if inode.users == 0]
