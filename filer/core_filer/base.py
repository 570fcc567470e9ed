"""What every core filer offers: the far-away file system behind a volume.

Owns the vocabulary (attributes, handles, results) and the contract; owns no I/O.
The semantics are NFSv3's (RFC 1813), because that is what a NAS speaks and because its
handles survive renames and restarts: every operation names inodes by *handle*, never by path.

One contract suite (``tests/contract``) runs over all implementations.
"""

from __future__ import annotations

import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NewType, Protocol

Handle = NewType("Handle", bytes)
"""Opaque, at most 128 bytes, equal for equal inodes, valid over restarts of both sides."""


@dataclass(frozen=True, slots=True)
class Attributes:
    """One inode's attributes as the core filer tells them (RFC 1813 §2.6, ``fattr3``)."""

    fileid: int
    mode: int
    """Type and permission bits, as in ``st_mode``."""
    nlink: int
    uid: int
    gid: int
    size: int
    used_bytes: int
    rdev: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    fsid: int = 0

    @property
    def version(self) -> CoreVersion:
        return CoreVersion(self.mtime_ns, self.ctime_ns, self.size)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)


@dataclass(frozen=True, slots=True)
class CoreVersion:
    """By what a change behind our back is noticed (RFC 1813 ``wcc_attr``)."""

    mtime_ns: int
    ctime_ns: int
    size: int

    def same_data(self, other: CoreVersion) -> bool:
        """Whether the bytes are the same, by the rule of the Linux NFS client: mtime and size."""
        return self.mtime_ns == other.mtime_ns and self.size == other.size


@dataclass(frozen=True, slots=True)
class SetAttributes:
    """What to change; ``None`` leaves the attribute alone (RFC 1813 ``sattr3``)."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """An inode reached by name, or just made.  *directory* is its parent after the operation."""

    handle: Handle
    attributes: Attributes
    directory: Attributes | None = None


@dataclass(frozen=True, slots=True)
class ReadResult:
    data: bytes
    """Shorter than asked only at the end of the file."""
    eof: bool
    attributes: Attributes | None


@dataclass(frozen=True, slots=True)
class WriteResult:
    count: int
    """Bytes accepted; may be fewer than sent."""
    verifier: bytes
    """Changes when the core filer may have lost unstable data (RFC 1813 §4.8)."""
    stable: bool
    before: CoreVersion | None
    after: Attributes | None


@dataclass(frozen=True, slots=True)
class CommitResult:
    verifier: bytes
    after: Attributes | None


@dataclass(frozen=True, slots=True)
class DirectoryEntry:
    name: bytes
    fileid: int
    handle: Handle | None
    """``None`` where the core filer did not send it: LOOKUP the name."""
    attributes: Attributes | None


@dataclass(frozen=True, slots=True)
class FileSystemStatistics:
    total_bytes: int
    free_bytes: int
    available_bytes: int
    total_files: int
    free_files: int
    available_files: int


@dataclass(frozen=True, slots=True)
class CoreFilerState:
    """A snapshot for status and metrics."""

    reachable: bool
    unreachable_since: float | None
    """``trio.current_time()`` of the first unanswered attempt, while unreachable."""
    reason: str
    in_flight: int
    reconnects: int


class CoreFiler(Protocol):
    """The interface.  All methods raise:

    - ``Refused`` with the errno the core filer answered (ENOENT, EACCES, ESTALE, ENOSPC, EDQUOT…),
    - ``OutcomeUnknown`` only where ``retry=False`` was configured; otherwise a lost connection
      is retried for ever with backoff, and a repeated non-idempotent request whose first try
      was applied answers as the first would have.

    ``repeated=True`` on a mutation says that an earlier attempt of *another process* may have
    been applied: EEXIST/ENOENT that this explains are then success.

    Every method is cancellable at its yield points; a cancelled request may still be applied.
    """

    @property
    def root(self) -> Handle: ...

    @property
    def io_bytes_max(self) -> int:
        """Largest read or write in one request."""
        ...

    def state(self) -> CoreFilerState: ...

    async def getattr(self, handle: Handle) -> Attributes: ...

    async def setattr(self, handle: Handle, changes: SetAttributes) -> Attributes: ...

    async def lookup(self, directory: Handle, name: bytes) -> Found:
        """*name* may be ``b".."``."""
        ...

    async def readlink(self, handle: Handle) -> bytes: ...

    async def read(self, handle: Handle, start: int, end: int) -> ReadResult:
        """Read ``[start, end)``, at most ``io_bytes_max`` bytes."""
        ...

    async def write(
        self, handle: Handle, start: int, data: bytes | memoryview, *, stable: bool = False
    ) -> WriteResult: ...

    async def commit(self, handle: Handle) -> CommitResult: ...

    async def create(
        self, directory: Handle, name: bytes, *, mode: int, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found:
        """Make a regular file; EEXIST if the name is taken."""
        ...

    async def mkdir(
        self, directory: Handle, name: bytes, *, mode: int, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found: ...

    async def symlink(
        self, directory: Handle, name: bytes, target: bytes, *, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found: ...

    async def mknod(
        self, directory: Handle, name: bytes, *, mode: int, rdev: int, uid: int, gid: int,
        repeated: bool = False,
    ) -> Found:
        """FIFO, socket, character or block device; the type is in *mode*."""
        ...

    async def link(
        self, handle: Handle, directory: Handle, name: bytes, *, repeated: bool = False
    ) -> Found: ...

    async def remove(
        self, directory: Handle, name: bytes, *, repeated: bool = False
    ) -> Attributes | None:
        """Unlink a non-directory; returns the directory's attributes afterwards if told."""
        ...

    async def rmdir(
        self, directory: Handle, name: bytes, *, repeated: bool = False
    ) -> Attributes | None: ...

    async def rename(
        self, directory: Handle, name: bytes, new_directory: Handle, new_name: bytes, *,
        flags: int = 0, repeated: bool = False,
    ) -> tuple[Attributes | None, Attributes | None]:
        """*flags* as in renameat2(2): RENAME_NOREPLACE, RENAME_EXCHANGE.

        A protocol without them emulates: not atomic towards the core filer's other clients.
        """
        ...

    def readdir(self, directory: Handle) -> AsyncIterator[list[DirectoryEntry]]:
        """The whole directory in batches, without ``.`` and ``..``.

        Restarts by itself when the server's cookie verifier changes (RFC 1813 §3.3.17);
        a name may then appear twice.
        """
        ...

    async def statfs(self) -> FileSystemStatistics: ...
