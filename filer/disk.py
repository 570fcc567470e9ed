"""The local SSD as the write-behind log sees it: one flat directory of files.

Owns when a call may run on the event loop and when it needs a worker thread, and the exact
meaning of *written* (survives the death of this process) and *synced* (survives the death of
the machine).  Knows nothing of what is in the files.  All methods raise ``OSError``.

The simulated twin, which loses and tears whatever was not synced, is ``tests/sim/disk.py``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import trio

Buffer = bytes | bytearray | memoryview

_INLINE_BYTES_MAX = 128 << 10
"""A worker thread costs 70–400 µs of CPU; copying this much into the page cache costs less."""
_INLINE_BYTES_MAX_FAST = 2 << 20
"""The same while the page cache takes everything at once: 1 MiB is a copy of some 300 µs.  A
kernel that throttles writers makes it a wait of any length, so then a thread does wait."""
_THROTTLED_S = 0.02
_THROTTLED_PAUSE_S = 1.0

_IOV_MAX = 1024
_SYNC_FILE_RANGE_WRITE = 2

_libc = ctypes.CDLL(None, use_errno=True)


class DiskFile(Protocol):
    """One file.  Positions are absolute; concurrent calls are allowed."""

    def can_write_now(self, byte_count: int) -> bool:
        """Whether ``write_now`` of so many bytes would only copy memory, as far as one can know."""
        ...

    def write_now(self, start: int, buffers: Sequence[Buffer]) -> None:
        """As ``write``, without a yield point."""
        ...

    async def write(self, start: int, buffers: Sequence[Buffer]) -> None:
        """Write all *buffers* one after the other; on an error any part may have been written."""
        ...

    async def read(self, start: int, end: int) -> bytes:
        """Shorter than asked only at the end of the file."""
        ...

    async def sync(self) -> None:
        """Everything written before this call survives a crash of the machine (fdatasync)."""
        ...

    async def start_write_out(self, start: int, end: int) -> None:
        """A hint: begin writing these bytes to the medium, so that a later sync is short."""
        ...

    async def truncate(self, size: int) -> None: ...

    async def size(self) -> int: ...

    def close(self) -> None: ...


class Disk(Protocol):
    """A flat directory.  A created or removed *name* survives a crash after sync_directory."""

    async def names(self) -> list[str]: ...

    async def open(self, name: str) -> DiskFile: ...

    async def create(self, name: str) -> DiskFile:
        """A new empty file; one that has this name is emptied."""
        ...

    async def remove(self, name: str) -> None:
        """Remove the name; files that are open stay readable."""
        ...

    async def sync_directory(self) -> None: ...

    async def free_bytes(self) -> int: ...


class LocalFile:
    """A file of a :class:`LocalDisk`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._throttled_until = 0.0

    async def write(self, start: int, buffers: Sequence[Buffer]) -> None:
        if self.can_write_now(sum(map(len, buffers))):
            self.write_now(start, buffers)
        else:
            await trio.to_thread.run_sync(self._write, start, buffers)

    def can_write_now(self, byte_count: int) -> bool:
        return byte_count <= _INLINE_BYTES_MAX or (
            byte_count <= _INLINE_BYTES_MAX_FAST and time.monotonic() >= self._throttled_until)

    def write_now(self, start: int, buffers: Sequence[Buffer]) -> None:
        begun = time.monotonic()
        self._write(start, buffers)
        ended = time.monotonic()
        if ended - begun > _THROTTLED_S:
            self._throttled_until = ended + _THROTTLED_PAUSE_S

    def _write(self, start: int, buffers: Sequence[Buffer]) -> None:
        for first in range(0, len(buffers), _IOV_MAX):
            rest = list(buffers[first : first + _IOV_MAX])
            wanted = sum(map(len, rest))
            done = os.pwritev(self._descriptor, rest, start)
            while done < wanted:  # short only when the disk is nearly full, or by a signal
                whole = b"".join(rest)
                more = os.pwrite(self._descriptor, memoryview(whole)[done:], start + done)
                if more == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                done += more
            start += wanted

    async def read(self, start: int, end: int) -> bytes:
        buffer = bytearray(end - start)
        try:
            count = os.preadv(self._descriptor, [buffer], start, os.RWF_NOWAIT)
        except (BlockingIOError, OSError) as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
            count = 0
        if count == len(buffer):
            return bytes(buffer)
        return await trio.to_thread.run_sync(self._read, start, end)

    def _read(self, start: int, end: int) -> bytes:
        parts = []
        while start < end:
            part = os.pread(self._descriptor, end - start, start)
            if not part:
                break
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def sync(self) -> None:
        await trio.to_thread.run_sync(os.fdatasync, self._descriptor)

    async def start_write_out(self, start: int, end: int) -> None:
        def hint() -> None:
            _libc.sync_file_range(
                self._descriptor, ctypes.c_int64(start), ctypes.c_int64(end - start),
                ctypes.c_uint(_SYNC_FILE_RANGE_WRITE),
            )

        await trio.to_thread.run_sync(hint)

    async def truncate(self, size: int) -> None:
        await trio.to_thread.run_sync(os.ftruncate, self._descriptor, size)

    async def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        os.close(self._descriptor)


class LocalDisk:
    """A directory of the local file system; made if absent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(parents=True, exist_ok=True)

    async def names(self) -> list[str]:
        return await trio.to_thread.run_sync(os.listdir, self._path)

    async def open(self, name: str) -> LocalFile:
        return LocalFile(os.open(self._path / name, os.O_RDWR | os.O_CLOEXEC))

    async def create(self, name: str) -> LocalFile:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        return LocalFile(os.open(self._path / name, flags, 0o600))

    async def remove(self, name: str) -> None:
        # Freeing the extents of a large file takes milliseconds.
        await trio.to_thread.run_sync(os.unlink, self._path / name)

    async def sync_directory(self) -> None:
        def sync() -> None:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

        await trio.to_thread.run_sync(sync)

    async def free_bytes(self) -> int:
        status = os.statvfs(self._path)
        return status.f_bavail * status.f_frsize
