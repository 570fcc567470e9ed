"""Sizes, keys and the index record of the page cache: what the bytes on the cache disk mean.

Owns the byte format of index keys and records, and the checksums of blocks.  Pure: owns no file
and no database.  ``docs/cache.md`` has the byte tables.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from xxhash import xxh3_64_digest, xxh3_64_intdigest

from filer.errors import Corrupt
from filer.ids import DataVersion, InodeId

BLOCK_BYTES = 64 << 10
"""Unit of checksums: a 4 KiB read verifies 64 KiB (4 µs), not a whole page (55 µs)."""
PAGE_BYTES = 1 << 20
"""Unit of caching and fetching: the largest READ the kernel and a NAS exchange."""
CHUNK_BYTES = 4 << 20
"""One file on the cache disk, one index record, one unit of eviction."""
PAGES_PER_CHUNK = CHUNK_BYTES // PAGE_BYTES

_DIGEST_BYTES = 8
_KEY = struct.Struct(">QQI")
_FILE_PREFIX = struct.Struct(">QQ")
_INODE_PREFIX = struct.Struct(">Q")
_BODY = struct.Struct(f"<QI{PAGES_PER_CHUNK}I")
_U64 = (1 << 64) - 1

KEY_BYTES = _KEY.size


@dataclass(frozen=True, slots=True)
class FileKey:
    """One state of one file's bytes."""

    inode: InodeId
    version: DataVersion


def chunk_key(key: FileKey, chunk: int) -> bytes:
    """Index key; big-endian, so that the chunks of a file and the versions of an inode adjoin."""
    return _KEY.pack(key.inode & _U64, key.version & _U64, chunk)


def file_prefix(key: FileKey) -> bytes:
    return _FILE_PREFIX.pack(key.inode & _U64, key.version & _U64)


def inode_prefix(inode: InodeId) -> bytes:
    return _INODE_PREFIX.pack(inode & _U64)


def chunk_of_key(packed: bytes) -> int:
    chunk: int = _KEY.unpack(packed)[2]
    return chunk


def fingerprint(packed: bytes | bytearray) -> int:
    """64 bit name of a chunk, for queues that only remember having seen it."""
    value: int = xxh3_64_intdigest(packed)
    return value


def block_digests(data: bytes | bytearray | memoryview) -> bytes:
    """The xxh3-64 of every 64 KiB block, concatenated; the last block may be short."""
    view = memoryview(data)
    return b"".join(
        [xxh3_64_digest(view[at : at + BLOCK_BYTES]) for at in range(0, len(view), BLOCK_BYTES)]
    )


@dataclass(frozen=True, slots=True)
class ChunkRecord:
    """What the index knows of one chunk."""

    serial: int
    """Names the file on the cache disk; never used twice, so a late unlink hits no newer file."""
    slot: int
    """The chunk's place in the eviction queues."""
    lengths: tuple[int, ...]
    """Valid bytes of each page from its start; 0: the page is not cached."""
    all_digests: bytes
    """Block checksums of the cached pages, one page after the other."""

    @classmethod
    def empty(cls, serial: int, slot: int) -> ChunkRecord:
        return cls(serial, slot, (0,) * PAGES_PER_CHUNK, b"")

    @property
    def valid_bytes(self) -> int:
        return sum(self.lengths)

    def with_page(self, page: int, length: int, digests: bytes) -> ChunkRecord:
        """A record in which *page* (0 … 3) holds *length* bytes; 0 makes it invalid."""
        start, end = self._digests_of(page)
        return ChunkRecord(
            self.serial, self.slot,
            (*self.lengths[:page], length, *self.lengths[page + 1 :]),
            self.all_digests[:start] + digests + self.all_digests[end:],
        )

    def digests(self, page: int) -> bytes:
        start, end = self._digests_of(page)
        return self.all_digests[start:end]

    def _digests_of(self, page: int) -> tuple[int, int]:
        start = sum(map(_digest_bytes, self.lengths[:page]))
        return start, start + _digest_bytes(self.lengths[page])

    def covers(self, start: int, end: int) -> bool:
        """Whether bytes ``[start, end)`` of the chunk are valid."""
        for page in range(start // PAGE_BYTES, (end - 1) // PAGE_BYTES + 1):
            if self.lengths[page] < min(end - page * PAGE_BYTES, PAGE_BYTES):
                return False
        return True

    def pack(self, key: bytes) -> bytes:
        body = _BODY.pack(self.serial, self.slot, *self.lengths) + self.all_digests
        return xxh3_64_digest(key + body) + body

    @classmethod
    def unpack(cls, key: bytes, value: bytes) -> ChunkRecord:
        """Raises: Corrupt: the record is not what was written under this key."""
        body = value[_DIGEST_BYTES:]
        if len(body) < _BODY.size or xxh3_64_digest(key + body) != value[:_DIGEST_BYTES]:
            raise Corrupt("index record: checksum mismatch")
        serial, slot, *lengths = _BODY.unpack_from(body)
        return cls(serial, slot, tuple(lengths), body[_BODY.size :])


def _digest_bytes(length: int) -> int:
    """What the checksums of *length* bytes take."""
    return -(-length // BLOCK_BYTES) * _DIGEST_BYTES


def first_bad_block(
    record: ChunkRecord, start: int, data: memoryview
) -> int | None:
    """Check bytes of one chunk against *record*.

    *start* (within the chunk) is a multiple of 64 KiB; *data* ends at a block's end or at the end
    of a short page.

    Returns: the offset within the chunk of the first block that is not what was written.
    """
    at, end = start, start + len(data)
    while at < end:
        page = at // PAGE_BYTES
        page_start = page * PAGE_BYTES
        stop = min(end, page_start + record.lengths[page])
        got = block_digests(data[at - start : stop - start])
        first = (at - page_start) // BLOCK_BYTES * _DIGEST_BYTES
        want = record.digests(page)[first : first + len(got)]
        if got != want:
            for block in range(0, len(got), _DIGEST_BYTES):
                if got[block : block + _DIGEST_BYTES] != want[block : block + _DIGEST_BYTES]:
                    return at + block // _DIGEST_BYTES * BLOCK_BYTES
        at = page_start + PAGE_BYTES
    return None
