"""Records of the write-behind log and their bytes.  Pure: no I/O, no clock.

Owns the format.  A record is a header, a body that depends on its kind, and data (file bytes,
of WRITE only).  All integers are little-endian:

    ======  =====  ================================================================
    offset  bytes  header
    ======  =====  ================================================================
    0       4      magic ``FWBJ``
    4       1      format version, 1
    5       1      kind
    6       2      length of the body
    8       4      length of the data
    12      8      lsn: the position of this record's first byte in the log
    20      8      epoch of the writer
    28      8      stable_end: every byte of the log below it was on stable storage
                   when this record was written
    36      8      wall clock when this record was written, ns
    44      8      xxh3-64 of header bytes 0–43, body and data
    52      …      body, then data
    ======  =====  ================================================================

A record that is not at the position it claims is not a record: bytes of a client's file that
look like one, or what an earlier use of the disk left behind, are never taken for one.
``stable_end`` is what tells a torn tail (never acknowledged as stable: cut it) from damage.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from filer.core_filer.base import CoreVersion, Handle
from filer.ids import DataVersion, Epoch, InodeId, Lsn

Buffer = bytes | bytearray | memoryview

MAGIC = b"FWBJ"
_VERSION = 1
_HEADER = struct.Struct("<4sBBHIQQQQ")  # without the checksum, which is packed after it
_CHECKSUM = struct.Struct("<Q")
HEADER_BYTES = _HEADER.size + _CHECKSUM.size

DATA_BYTES_MAX = 4 << 20
"""Of one record.  Longer writes become several, so that recovery needs a bounded buffer."""
RECORD_BYTES_MAX = HEADER_BYTES + 0xFFFF + DATA_BYTES_MAX

_NO_TIME = -(1 << 63)
"""Stands for "not told" where a time is optional."""


@dataclass(frozen=True, slots=True)
class SegmentStart:
    """The first record of every segment."""

    node: str
    """Who wrote it; for people."""


@dataclass(frozen=True, slots=True)
class Base:
    """*inode* becomes dirty: the clean state that its following records change.

    Makes every earlier record of the inode void.
    """

    inode: InodeId
    handle: Handle
    version: CoreVersion
    data_version: DataVersion


@dataclass(frozen=True, slots=True)
class Write:
    inode: InodeId
    start: int
    mtime_ns: int
    data: Buffer


@dataclass(frozen=True, slots=True)
class Size:
    """Truncated or extended to *size*."""

    inode: InodeId
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Times:
    """``None``: not changed."""

    inode: InodeId
    atime_ns: int | None
    mtime_ns: int | None


@dataclass(frozen=True, slots=True)
class FlushBegun:
    """From here on the core filer's file may hold any part of what was dirty before.

    Carries all of the inode's state but the extents, so that the records before it are needed
    only until the flush has ended.
    """

    inode: InodeId
    handle: Handle
    version: CoreVersion
    data_version: DataVersion
    size: int
    clean_limit: int
    atime_ns: int | None
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Flushed:
    """All changes before the FlushBegun at *up_to* are stable in the core filer."""

    inode: InodeId
    up_to: Lsn
    version: CoreVersion
    data_version: DataVersion


@dataclass(frozen=True, slots=True)
class Rebased:
    """A flush failed part way; *version* is what it left in the core filer, all our own doing."""

    inode: InodeId
    version: CoreVersion


@dataclass(frozen=True, slots=True)
class Discarded:
    """Nothing of this inode is dirty any more: unlinked, or kept elsewhere."""

    inode: InodeId


@dataclass(frozen=True, slots=True)
class Probe:
    """Means nothing; shows that the log can be written again."""


Record = (
    SegmentStart | Base | Write | Size | Times | FlushBegun | Flushed | Rebased | Discarded | Probe
)


@dataclass(slots=True)
class Logged:
    """A record and where it stands.  Not frozen only because that costs 2 µs a write."""

    record: Record
    lsn: Lsn
    data_at: int
    """Log position of the first data byte (of WRITE; elsewhere the record's end)."""
    written_at_ns: int
    epoch: Epoch
    stable_end: int
    end: int


@dataclass(frozen=True, slots=True)
class Incomplete:
    """The buffer ends before the record does."""

    bytes_needed: int


@dataclass(frozen=True, slots=True)
class Bad:
    """Here is no valid record."""

    reason: str


# --- bodies -----------------------------------------------------------------------------------

_INODE = struct.Struct("<Q")
_CORE_VERSION = struct.Struct("<qqQ")
_BASE = struct.Struct("<QqqQQ")
_WRITE = struct.Struct("<QQq")
_SIZE = struct.Struct("<QQq")
_TIMES = struct.Struct("<Qqq")
_FLUSH_BEGUN = struct.Struct("<QqqQQQQqq")
_FLUSHED = struct.Struct("<QQqqQQ")
_REBASED = struct.Struct("<QqqQ")


def _time(value: int | None) -> int:
    return _NO_TIME if value is None else value


def _no_time(value: int) -> int | None:
    return None if value == _NO_TIME else value


def _body(record: Record) -> tuple[int, bytes]:
    match record:
        case Write(inode, start, mtime_ns):
            return 3, _WRITE.pack(inode, start, mtime_ns)
        case SegmentStart(node):
            return 1, node.encode()
        case Base(inode, handle, v, data_version):
            return 2, _BASE.pack(inode, v.mtime_ns, v.ctime_ns, v.size, data_version) + handle
        case Size(inode, size, mtime_ns):
            return 4, _SIZE.pack(inode, size, mtime_ns)
        case Times(inode, atime_ns, mtime_ns):
            return 5, _TIMES.pack(inode, _time(atime_ns), _time(mtime_ns))
        case FlushBegun(inode, handle, v, data_version, size, clean_limit, atime_ns, mtime_ns):
            return 6, _FLUSH_BEGUN.pack(
                inode, v.mtime_ns, v.ctime_ns, v.size, data_version, size, clean_limit,
                _time(atime_ns), mtime_ns,
            ) + handle
        case Flushed(inode, up_to, v, data_version):
            return 7, _FLUSHED.pack(inode, up_to, v.mtime_ns, v.ctime_ns, v.size, data_version)
        case Rebased(inode, v):
            return 8, _REBASED.pack(inode, v.mtime_ns, v.ctime_ns, v.size)
        case Discarded(inode):
            return 9, _INODE.pack(inode)
        case Probe():
            return 10, b""


def _decode_base(body: bytes, _: Buffer) -> Record:
    inode, mtime_ns, ctime_ns, size, data_version = _BASE.unpack_from(body)
    handle = Handle(body[_BASE.size :])
    return Base(inode, handle, CoreVersion(mtime_ns, ctime_ns, size), data_version)


def _decode_write(body: bytes, data: Buffer) -> Record:
    inode, start, mtime_ns = _WRITE.unpack(body)
    return Write(inode, start, mtime_ns, data)


def _decode_times(body: bytes, _: Buffer) -> Record:
    inode, atime_ns, mtime_ns = _TIMES.unpack(body)
    return Times(inode, _no_time(atime_ns), _no_time(mtime_ns))


def _decode_flush_begun(body: bytes, _: Buffer) -> Record:
    (
        inode, mtime_ns, ctime_ns, core_size, data_version, size, clean_limit, atime, mtime,
    ) = _FLUSH_BEGUN.unpack_from(body)
    return FlushBegun(
        inode, Handle(body[_FLUSH_BEGUN.size :]), CoreVersion(mtime_ns, ctime_ns, core_size),
        data_version, size, clean_limit, _no_time(atime), mtime,
    )


def _decode_flushed(body: bytes, _: Buffer) -> Record:
    inode, up_to, mtime_ns, ctime_ns, size, data_version = _FLUSHED.unpack(body)
    return Flushed(inode, up_to, CoreVersion(mtime_ns, ctime_ns, size), data_version)


def _decode_rebased(body: bytes, _: Buffer) -> Record:
    inode, *version = _REBASED.unpack(body)
    return Rebased(inode, CoreVersion(*version))


_DECODERS: dict[int, Callable[[bytes, Buffer], Record]] = {
    1: lambda body, _: SegmentStart(body.decode()),
    2: _decode_base,
    3: _decode_write,
    4: lambda body, _: Size(*_SIZE.unpack(body)),
    5: _decode_times,
    6: _decode_flush_begun,
    7: _decode_flushed,
    8: _decode_rebased,
    9: lambda body, _: Discarded(*_INODE.unpack(body)),
    10: lambda _body, _data: Probe(),
}


# --- records ----------------------------------------------------------------------------------

def encode(
    record: Record, *, lsn: Lsn, epoch: Epoch, stable_end: int, written_at_ns: int
) -> tuple[bytes, Buffer]:
    """The record's bytes as (header and body, data): the data is never copied."""
    kind, body = _body(record)
    data = record.data if isinstance(record, Write) else b""
    assert len(data) <= DATA_BYTES_MAX
    head = _HEADER.pack(
        MAGIC, _VERSION, kind, len(body), len(data), lsn, epoch, stable_end, written_at_ns)
    checksum = xxhash.xxh3_64(head)
    checksum.update(body)
    checksum.update(data)
    return head + _CHECKSUM.pack(checksum.intdigest()) + body, data


def decode(buffer: memoryview, lsn: int) -> Logged | Incomplete | Bad:
    """The record at the beginning of *buffer*, which is position *lsn* of the log.

    The data of the result is a view of *buffer*.
    """
    if len(buffer) < HEADER_BYTES:
        return Incomplete(HEADER_BYTES)
    magic, version, kind, body_length, data_length, own_lsn, epoch, stable_end, written_at_ns = (
        _HEADER.unpack_from(buffer))
    if magic != MAGIC:
        return Bad("no record begins here")
    if version != _VERSION:
        return Bad(f"record format version {version}, this program knows {_VERSION}")
    if own_lsn != lsn:
        return Bad(f"a record of position {own_lsn}")
    if data_length > DATA_BYTES_MAX:
        return Bad(f"a record of {data_length} data bytes")
    body_end = HEADER_BYTES + body_length
    end = body_end + data_length
    if len(buffer) < end:
        return Incomplete(end)
    checksum = xxhash.xxh3_64(buffer[: _HEADER.size])
    checksum.update(buffer[HEADER_BYTES:end])
    if checksum.intdigest() != _CHECKSUM.unpack_from(buffer, _HEADER.size)[0]:
        return Bad("checksum mismatch")
    decoder = _DECODERS.get(kind)
    if decoder is None:
        return Bad(f"unknown record kind {kind}")
    try:
        record = decoder(bytes(buffer[HEADER_BYTES:body_end]), buffer[body_end:end])
    except (struct.error, UnicodeDecodeError) as error:
        return Bad(f"malformed body: {error}")
    return Logged(
        record, Lsn(lsn), lsn + body_end, written_at_ns, Epoch(epoch), stable_end, lsn + end)
