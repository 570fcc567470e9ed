"""A small synchronous NFSv3 client over TCP: XDR, ONC RPC, MOUNT, NFS and NLM4, no kernel.

For tests that must know which call was sent, hold a file handle across restarts of a server, or
see a status that a kernel client would hide.  Owns: encoding (RFC 4506), calls (RFC 5531),
the procedures (RFC 1813) and, for a *hard* client, waiting out a server that is away.  Does not
own any cache: every method is one RPC, except `Nfs3.walk` and the two whole-directory readers.
"""

from __future__ import annotations

import enum
import itertools
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

_NFS, _MOUNT, _NLM = (100003, 3), (100005, 3), (100021, 4)
_LAST_FRAGMENT = 0x80000000
_RETRY_PAUSE_S = 0.02


class Status(enum.IntEnum):
    """nfsstat3."""

    OK = 0
    PERM = 1
    NOENT = 2
    IO = 5
    NXIO = 6
    ACCES = 13
    EXIST = 17
    XDEV = 18
    NODEV = 19
    NOTDIR = 20
    ISDIR = 21
    INVAL = 22
    FBIG = 27
    NOSPC = 28
    ROFS = 30
    MLINK = 31
    NAMETOOLONG = 63
    NOTEMPTY = 66
    DQUOT = 69
    STALE = 70
    REMOTE = 71
    BADHANDLE = 10001
    NOT_SYNC = 10002
    BAD_COOKIE = 10003
    NOTSUPP = 10004
    TOOSMALL = 10005
    SERVERFAULT = 10006
    BADTYPE = 10007
    JUKEBOX = 10008


class Stable(enum.IntEnum):
    UNSTABLE = 0
    DATA_SYNC = 1
    FILE_SYNC = 2


class Create(enum.IntEnum):
    UNCHECKED = 0
    GUARDED = 1
    EXCLUSIVE = 2


class FileType(enum.IntEnum):
    REGULAR = 1
    DIRECTORY = 2
    BLOCK = 3
    CHARACTER = 4
    SYMLINK = 5
    SOCKET = 6
    FIFO = 7


class Access(enum.IntFlag):
    READ = 1
    LOOKUP = 2
    MODIFY = 4
    EXTEND = 8
    DELETE = 16
    EXECUTE = 32


class LockStatus(enum.IntEnum):
    """nlm4_stats."""

    GRANTED = 0
    DENIED = 1
    DENIED_NOLOCKS = 2
    BLOCKED = 3
    DENIED_GRACE_PERIOD = 4
    DEADLCK = 5
    ROFS = 6
    STALE_FH = 7
    FBIG = 8
    FAILED = 9


class NfsError(Exception):
    """The server answered with a status other than OK."""

    def __init__(self, procedure: str, status: int) -> None:
        self.procedure = procedure
        self.status = Status(status) if status in set(Status) else status
        super().__init__(f"{procedure}: {getattr(self.status, 'name', status)}")


class RpcError(Exception):
    """The server refused the call itself: bad credentials, unknown program or procedure."""


class Reader:
    """Decodes XDR."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def uint(self) -> int:
        (value,) = struct.unpack_from(">I", self._data, self._at)
        self._at += 4
        return int(value)

    def uhyper(self) -> int:
        (value,) = struct.unpack_from(">Q", self._data, self._at)
        self._at += 8
        return int(value)

    def fixed(self, size: int) -> bytes:
        value = bytes(self._data[self._at:self._at + size])
        if len(value) != size:
            raise RpcError("the reply is shorter than its contents")
        self._at += size + -size % 4
        return value

    def opaque(self) -> bytes:
        return self.fixed(self.uint())

    def optional(self, decode: Callable[[Reader], T]) -> T | None:
        return decode(self) if self.uint() else None


def uint(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def uhyper(*values: int) -> bytes:
    return struct.pack(f">{len(values)}Q", *values)


def opaque(data: bytes) -> bytes:
    return b"".join((uint(len(data)), data, bytes(-len(data) % 4)))


def name_bytes(name: str | bytes) -> bytes:
    return opaque(os.fsencode(name))


@dataclass(frozen=True, slots=True)
class Credentials:
    """AUTH_SYS."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    machine: str = "nfs3-test-client"

    def encode(self) -> bytes:
        body = b"".join((uint(0), name_bytes(self.machine), uint(self.uid, self.gid),
                         uint(len(self.groups), *self.groups)))
        return uint(1) + opaque(body) + uint(0, 0)


class Rpc:
    """One TCP connection to one program.

    A *hard* client reconnects and repeats the call, with the same xid, until the server answers
    or *timeout_s* has passed; otherwise a lost connection raises ConnectionError.
    """

    def __init__(
        self, host: str, port: int, program: tuple[int, int], *,
        credentials: Credentials | None = None, timeout_s: float = 60.0, is_hard: bool = False,
    ) -> None:
        self.credentials = credentials or Credentials()
        self.reconnections = 0
        self._address, self._program = (host, port), program
        self._timeout_s, self._is_hard = timeout_s, is_hard
        self._xids = itertools.count(int.from_bytes(os.urandom(3), "big") << 8)
        self._socket: socket.socket | None = None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def call(self, procedure: int, arguments: bytes = b"") -> Reader:
        xid = next(self._xids) & 0xFFFFFFFF
        message = b"".join((uint(xid, 0, 2, *self._program, procedure),
                            self.credentials.encode(), arguments))
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            try:
                return self._exchange(xid, message, deadline_s)
            except OSError:
                self.close()
                if not self._is_hard or time.monotonic() > deadline_s:
                    raise
                self.reconnections += 1
                select.select([], [], [], _RETRY_PAUSE_S)

    def _exchange(self, xid: int, message: bytes, deadline_s: float) -> Reader:
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=self._timeout_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(max(0.01, deadline_s - time.monotonic()))
        self._socket.sendall(uint(_LAST_FRAGMENT | len(message)) + message)
        while True:
            reader = Reader(memoryview(self._receive_record(self._socket)))
            # A reply to a call that an earlier connection gave up can still arrive.
            if reader.uint() == xid:
                break
        reader.uint()
        if reader.uint() != 0:
            raise RpcError("the server denied the call")
        reader.uint()
        reader.opaque()
        accept_status = reader.uint()
        if accept_status != 0:
            raise RpcError(f"the server did not execute the call: accept status {accept_status}")
        return reader

    @staticmethod
    def _receive_record(connection: socket.socket) -> bytearray:
        record = bytearray()
        while True:
            (header,) = struct.unpack(">I", _receive(connection, 4))
            record += _receive(connection, header & ~_LAST_FRAGMENT)
            if header & _LAST_FRAGMENT:
                return record


def _receive(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionResetError("the server closed the connection")
        view = view[count:]
    return data


@dataclass(frozen=True, slots=True)
class Attributes:
    """fattr3."""

    type: FileType
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    used_bytes: int
    rdev: tuple[int, int]
    fsid: int
    fileid: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int


def _time(reader: Reader) -> int:
    seconds = reader.uint()
    return seconds * 1_000_000_000 + reader.uint()


def _attributes(r: Reader) -> Attributes:
    return Attributes(
        FileType(r.uint()), r.uint(), r.uint(), r.uint(), r.uint(), r.uhyper(), r.uhyper(),
        (r.uint(), r.uint()), r.uhyper(), r.uhyper(), _time(r), _time(r), _time(r))


def _post_attributes(reader: Reader) -> Attributes | None:
    return reader.optional(_attributes)


@dataclass(frozen=True, slots=True)
class WeakCache:
    """wcc_data: (size, mtime_ns, ctime_ns) before, attributes after."""

    before: tuple[int, int, int] | None
    after: Attributes | None


def _weak_cache(reader: Reader) -> WeakCache:
    before = reader.optional(lambda r: (r.uhyper(), _time(r), _time(r)))
    return WeakCache(before, _post_attributes(reader))


SERVER_TIME = -1
"""As a time of `SetAttributes`: the server's present."""


@dataclass(frozen=True, slots=True)
class SetAttributes:
    """sattr3; None leaves an attribute alone."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None

    def encode(self) -> bytes:
        parts = [uint(0) if value is None else uint(1, value)
                 for value in (self.mode, self.uid, self.gid)]
        parts.append(uint(0) if self.size is None else uint(1) + uhyper(self.size))
        for time_ns in (self.atime_ns, self.mtime_ns):
            if time_ns is None:
                parts.append(uint(0))
            elif time_ns == SERVER_TIME:
                parts.append(uint(1))
            else:
                parts.append(uint(2, *divmod(time_ns, 1_000_000_000)))
        return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Found:
    """An object with its handle."""

    handle: bytes
    attributes: Attributes | None


@dataclass(frozen=True, slots=True)
class Read:
    data: bytes
    is_end: bool
    attributes: Attributes | None


@dataclass(frozen=True, slots=True)
class Written:
    count: int
    committed: Stable
    verifier: bytes
    cache: WeakCache


@dataclass(frozen=True, slots=True)
class Entry:
    name: bytes
    fileid: int
    cookie: int
    attributes: Attributes | None = None
    handle: bytes | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    """One reply of READDIR or READDIRPLUS."""

    entries: list[Entry]
    cookie_verifier: bytes
    is_end: bool


@dataclass(frozen=True, slots=True)
class FsInfo:
    read_max: int
    read_preferred: int
    read_multiple: int
    write_max: int
    write_preferred: int
    write_multiple: int
    readdir_preferred: int
    file_size_max: int
    time_delta_ns: int
    properties: int


@dataclass(frozen=True, slots=True)
class FsStat:
    total_bytes: int
    free_bytes: int
    available_bytes: int
    total_files: int
    free_files: int
    available_files: int
    invariant_s: int


@dataclass(frozen=True, slots=True)
class PathConf:
    link_max: int
    name_max: int
    no_truncation: bool
    chown_restricted: bool
    case_insensitive: bool
    case_preserving: bool


def mount(
    host: str, port: int, path: str, *, credentials: Credentials | None = None,
    timeout_s: float = 60.0,
) -> bytes:
    """MOUNT: the root handle of an export."""
    rpc = Rpc(host, port, _MOUNT, credentials=credentials, timeout_s=timeout_s)
    try:
        reader = rpc.call(1, name_bytes(path))
        status = reader.uint()
        if status:
            raise NfsError("MNT", status)
        return reader.opaque()
    finally:
        rpc.close()


def exports(host: str, port: int) -> list[str]:
    """EXPORT: the paths a server offers."""
    rpc = Rpc(host, port, _MOUNT)
    try:
        reader = rpc.call(5)
        paths = []
        while reader.uint():
            paths.append(os.fsdecode(reader.opaque()))
            while reader.uint():
                reader.opaque()
        return paths
    finally:
        rpc.close()


@dataclass
class Nfs3:
    """The procedures of NFSv3.  Failures raise `NfsError`.

    A hard client repeats calls answered with JUKEBOX, and those lost with a connection, until
    *timeout_s* has passed; `repeats` counts both.
    """

    host: str
    port: int
    credentials: Credentials = field(default_factory=Credentials)
    timeout_s: float = 60.0
    is_hard: bool = False
    repeats_of_jukebox: int = 0

    def __post_init__(self) -> None:
        self._rpc = Rpc(self.host, self.port, _NFS, credentials=self.credentials,
                        timeout_s=self.timeout_s, is_hard=self.is_hard)

    def __enter__(self) -> Nfs3:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._rpc.close()

    @property
    def repeats(self) -> int:
        return self.repeats_of_jukebox + self._rpc.reconnections

    def _call(self, procedure: int, name: str, *arguments: bytes) -> Reader:
        deadline_s = time.monotonic() + self.timeout_s
        while True:
            reader = self._rpc.call(procedure, b"".join(arguments))
            status = reader.uint()
            if status == Status.OK:
                return reader
            if not self.is_hard or status != Status.JUKEBOX or time.monotonic() > deadline_s:
                raise NfsError(name, status)
            self.repeats_of_jukebox += 1
            select.select([], [], [], _RETRY_PAUSE_S)

    # Attributes and names

    def null(self) -> None:
        self._rpc.call(0)

    def getattr(self, handle: bytes) -> Attributes:
        return _attributes(self._call(1, "GETATTR", opaque(handle)))

    def setattr(
        self, handle: bytes, attributes: SetAttributes, *, guard_ctime_ns: int | None = None,
    ) -> WeakCache:
        guard = uint(0) if guard_ctime_ns is None else uint(
            1, *divmod(guard_ctime_ns, 1_000_000_000))
        return _weak_cache(self._call(2, "SETATTR", opaque(handle), attributes.encode(), guard))

    def lookup(self, directory: bytes, name: str | bytes) -> Found:
        reader = self._call(3, "LOOKUP", opaque(directory), name_bytes(name))
        return Found(reader.opaque(), _post_attributes(reader))

    def walk(self, root: bytes, path: str) -> Found:
        """LOOKUP each component of *path* below *root*."""
        found = Found(root, None)
        for name in path.split("/"):
            if name:
                found = self.lookup(found.handle, name)
        return found

    def access(self, handle: bytes, wanted: int = 63) -> Access:
        reader = self._call(4, "ACCESS", opaque(handle), uint(wanted))
        _post_attributes(reader)
        return Access(reader.uint())

    def readlink(self, handle: bytes) -> bytes:
        reader = self._call(5, "READLINK", opaque(handle))
        _post_attributes(reader)
        return reader.opaque()

    # Data

    def read(self, handle: bytes, offset: int, count: int) -> Read:
        reader = self._call(6, "READ", opaque(handle), uhyper(offset), uint(count))
        attributes = _post_attributes(reader)
        reader.uint()
        is_end = bool(reader.uint())
        return Read(reader.opaque(), is_end, attributes)

    def write(
        self, handle: bytes, offset: int, data: bytes, stable: Stable = Stable.UNSTABLE,
    ) -> Written:
        reader = self._call(7, "WRITE", opaque(handle), uhyper(offset), uint(len(data), stable),
                            opaque(data))
        cache = _weak_cache(reader)
        return Written(reader.uint(), Stable(reader.uint()), reader.fixed(8), cache)

    def commit(self, handle: bytes, offset: int = 0, count: int = 0) -> bytes:
        """The write verifier."""
        reader = self._call(21, "COMMIT", opaque(handle), uhyper(offset), uint(count))
        _weak_cache(reader)
        return reader.fixed(8)

    # Changes of names

    def create(
        self, directory: bytes, name: str | bytes, attributes: SetAttributes | None = None, *,
        how: Create = Create.UNCHECKED, verifier: bytes = bytes(8),
    ) -> Found:
        """Attributes default to mode 0644; EXCLUSIVE sends *verifier* in their place."""
        attributes = attributes or SetAttributes(mode=0o644)
        reader = self._call(
            8, "CREATE", opaque(directory), name_bytes(name), uint(how),
            verifier if how is Create.EXCLUSIVE else attributes.encode())
        return self._made(reader, directory, name)

    def mkdir(
        self, directory: bytes, name: str | bytes, attributes: SetAttributes | None = None,
    ) -> Found:
        attributes = attributes or SetAttributes(mode=0o755)
        reader = self._call(9, "MKDIR", opaque(directory), name_bytes(name), attributes.encode())
        return self._made(reader, directory, name)

    def symlink(
        self, directory: bytes, name: str | bytes, target: str | bytes,
        attributes: SetAttributes | None = None,
    ) -> Found:
        attributes = attributes or SetAttributes(mode=0o777)
        reader = self._call(10, "SYMLINK", opaque(directory), name_bytes(name),
                            attributes.encode(), name_bytes(target))
        return self._made(reader, directory, name)

    def mknod(
        self, directory: bytes, name: str | bytes, kind: FileType,
        attributes: SetAttributes | None = None, *, rdev: tuple[int, int] = (0, 0),
    ) -> Found:
        attributes = attributes or SetAttributes(mode=0o644)
        device = uint(*rdev) if kind in (FileType.BLOCK, FileType.CHARACTER) else b""
        reader = self._call(11, "MKNOD", opaque(directory), name_bytes(name), uint(kind),
                            attributes.encode(), device)
        return self._made(reader, directory, name)

    def _made(self, reader: Reader, directory: bytes, name: str | bytes) -> Found:
        handle = reader.optional(Reader.opaque)
        # A server may leave the handle out.
        return self.lookup(directory, name) if handle is None else Found(
            handle, _post_attributes(reader))

    def remove(self, directory: bytes, name: str | bytes) -> WeakCache:
        return _weak_cache(self._call(12, "REMOVE", opaque(directory), name_bytes(name)))

    def rmdir(self, directory: bytes, name: str | bytes) -> WeakCache:
        return _weak_cache(self._call(13, "RMDIR", opaque(directory), name_bytes(name)))

    def rename(
        self, directory: bytes, name: str | bytes, to_directory: bytes, to_name: str | bytes,
    ) -> tuple[WeakCache, WeakCache]:
        reader = self._call(14, "RENAME", opaque(directory), name_bytes(name),
                            opaque(to_directory), name_bytes(to_name))
        return _weak_cache(reader), _weak_cache(reader)

    def link(self, handle: bytes, directory: bytes, name: str | bytes) -> Attributes | None:
        return _post_attributes(self._call(
            15, "LINK", opaque(handle), opaque(directory), name_bytes(name)))

    # Listings

    def readdir(
        self, directory: bytes, cookie: int = 0, cookie_verifier: bytes = bytes(8), *,
        count: int = 32_768,
    ) -> Listing:
        reader = self._call(16, "READDIR", opaque(directory), uhyper(cookie), cookie_verifier,
                            uint(count))
        _post_attributes(reader)
        verifier = reader.fixed(8)
        entries = []
        while reader.uint():
            fileid, name = reader.uhyper(), reader.opaque()
            entries.append(Entry(name, fileid, reader.uhyper()))
        return Listing(entries, verifier, bool(reader.uint()))

    def readdirplus(
        self, directory: bytes, cookie: int = 0, cookie_verifier: bytes = bytes(8), *,
        name_bytes_max: int = 8192, reply_bytes_max: int = 65_536,
    ) -> Listing:
        reader = self._call(17, "READDIRPLUS", opaque(directory), uhyper(cookie),
                            cookie_verifier, uint(name_bytes_max, reply_bytes_max))
        _post_attributes(reader)
        verifier = reader.fixed(8)
        entries = []
        while reader.uint():
            fileid, name = reader.uhyper(), reader.opaque()
            entries.append(Entry(name, fileid, reader.uhyper(), _post_attributes(reader),
                                 reader.optional(Reader.opaque)))
        return Listing(entries, verifier, bool(reader.uint()))

    def list_names(self, directory: bytes, *, count: int = 32_768) -> list[bytes]:
        """READDIR to the end; without `.` and `..`."""
        return [entry.name for entry in self._entries(
            lambda cookie, verifier: self.readdir(directory, cookie, verifier, count=count))]

    def list_entries(self, directory: bytes, *, reply_bytes_max: int = 65_536) -> list[Entry]:
        """READDIRPLUS to the end; without `.` and `..`."""
        return list(self._entries(lambda cookie, verifier: self.readdirplus(
            directory, cookie, verifier, reply_bytes_max=reply_bytes_max)))

    @staticmethod
    def _entries(read: Callable[[int, bytes], Listing]) -> Iterator[Entry]:
        cookie, verifier = 0, bytes(8)
        while True:
            listing = read(cookie, verifier)
            yield from (e for e in listing.entries if e.name not in (b".", b".."))
            if listing.is_end:
                return
            cookie, verifier = listing.entries[-1].cookie, listing.cookie_verifier

    # The file system

    def fsstat(self, root: bytes) -> FsStat:
        r = self._call(18, "FSSTAT", opaque(root))
        _post_attributes(r)
        return FsStat(
            r.uhyper(), r.uhyper(), r.uhyper(), r.uhyper(), r.uhyper(), r.uhyper(), r.uint())

    def fsinfo(self, root: bytes) -> FsInfo:
        r = self._call(19, "FSINFO", opaque(root))
        _post_attributes(r)
        return FsInfo(r.uint(), r.uint(), r.uint(), r.uint(), r.uint(), r.uint(), r.uint(),
                      r.uhyper(), _time(r), r.uint())

    def pathconf(self, handle: bytes) -> PathConf:
        r = self._call(20, "PATHCONF", opaque(handle))
        _post_attributes(r)
        return PathConf(r.uint(), r.uint(), *(bool(r.uint()) for _ in range(4)))


class Nlm4:
    """The lock manager's procedures, for one owner."""

    def __init__(
        self, host: str, port: int, *, owner: bytes = b"owner", process: int = 1,
        caller: str = "nfs3-test-client", timeout_s: float = 60.0,
    ) -> None:
        self._rpc = Rpc(host, port, _NLM, timeout_s=timeout_s)
        self._owner, self._process, self._caller = owner, process, caller

    def close(self) -> None:
        self._rpc.close()

    def _lock(self, handle: bytes, start: int, length: int) -> bytes:
        return b"".join((name_bytes(self._caller), opaque(handle), opaque(self._owner),
                         uint(self._process), uhyper(start, length)))

    def _call(self, procedure: int, *arguments: bytes) -> LockStatus:
        reader = self._rpc.call(procedure, opaque(b"cookie") + b"".join(arguments))
        reader.opaque()
        return LockStatus(reader.uint())

    def test(
        self, handle: bytes, start: int = 0, length: int = 0, *, is_exclusive: bool = True,
    ) -> LockStatus:
        return self._call(1, uint(is_exclusive), self._lock(handle, start, length))

    def lock(
        self, handle: bytes, start: int = 0, length: int = 0, *, is_exclusive: bool = True,
        is_reclaim: bool = False,
    ) -> LockStatus:
        """Try once; never waits."""
        return self._call(2, uint(0, is_exclusive), self._lock(handle, start, length),
                          uint(is_reclaim, 1))

    def unlock(self, handle: bytes, start: int = 0, length: int = 0) -> LockStatus:
        return self._call(4, self._lock(handle, start, length))

    def free_all(self) -> None:
        """What a rebooted client says; drops every lock of this caller."""
        self._rpc.call(23, name_bytes(self._caller) + uint(0))


def file_type_of_mode(mode: int) -> FileType:
    """The type that `os.stat` has in st_mode."""
    return {
        stat.S_IFREG: FileType.REGULAR, stat.S_IFDIR: FileType.DIRECTORY,
        stat.S_IFBLK: FileType.BLOCK, stat.S_IFCHR: FileType.CHARACTER,
        stat.S_IFLNK: FileType.SYMLINK, stat.S_IFSOCK: FileType.SOCKET,
        stat.S_IFIFO: FileType.FIFO,
    }[stat.S_IFMT(mode)]
