"""Answers for requests that the kernel sends again after a volume server died.

A create, unlink or rename must not be done twice, nor be answered EEXIST or ENOENT because the
dead server had done it already.  So each is recorded before it is begun, and its answer before
it is given::

    unique = current_unique()
    repeat = records.begin(unique)
    try:
        …
    except Exception as error:
        records.done(unique, errno_of(error))
        raise
    records.done(unique, 0, payload)  # and return, with no await between

Owns the file of records.  It is mapped shared: what is stored survives ``kill -9``.  Nothing is
synced, since a machine that crashes loses the mount, and with it every request; the file names
the mount it belongs to and is emptied for another one.

::

    file  = header (256 bytes) | slot (256 bytes) × SLOTS
    header= magic "filerrec" | format u32 | slot count u32 | mount id 16 bytes
    slot  = state u8 | pad 7 | unique u64 | sequence u64 | crc32 of those two u32
            | errno u16 | payload length u16 | crc32 of errno, length, payload u32
            | payload, up to 200 bytes

The state byte is written last, after the part it vouches for, so a server killed between two
stores leaves the state before.  A checksum that fails all the same counts as the state before.

*How many slots.*  Only requests that have no answer yet are sent again; a server has at most
``HANDLERS_AT_ONCE_MAX`` (2000) of them, and those in progress keep their slots.  Answers are given
in the step in which ``done`` is called, so a record that is done can be needed only if the server
dies within that step; the oldest done records are reused first.  The kernel queues what it sends
again in front of everything else, so a server sees all repeats before it has begun as many
operations as there are slots to spare (2096).
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path

UNIQUE_RESEND = 1 << 63
"""The kernel's mark on the ``unique`` of a request that it sends again (Linux 6.9)."""

PAYLOAD_BYTES_MAX = 200

_SLOTS = 4096
_SLOT_BYTES = 256
_MAGIC = b"filerrec"
_FORMAT = 1
_HEADER = struct.Struct("<8sII16s")
_BEGUN_PART = struct.Struct("<QQ")
_DONE_PART = struct.Struct("<HH")
_CRC = struct.Struct("<I")

_FREE, _BEGUN, _DONE = 0, 1, 2
_BEGUN_AT = 8
_BEGUN_CRC_AT = _BEGUN_AT + _BEGUN_PART.size
_DONE_AT = _BEGUN_CRC_AT + _CRC.size
_DONE_CRC_AT = _DONE_AT + _DONE_PART.size
_PAYLOAD_AT = _DONE_CRC_AT + _CRC.size
assert _PAYLOAD_AT + PAYLOAD_BYTES_MAX <= _SLOT_BYTES


@dataclass(frozen=True, slots=True)
class Repeat:
    """What an earlier server left about the request that was sent again."""

    is_done: bool
    """False: it may have been done, or not; True: it was, and this is the answer."""
    errno: int = 0
    payload: bytes = b""


class OperationRecords:
    def __init__(self, path: Path, mount_id: bytes) -> None:
        """Open the file at *path*, or make it; *mount_id* is ``KeptMount.mount_id``."""
        header = _HEADER.pack(_MAGIC, _FORMAT, _SLOTS, mount_id)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            is_ours = os.pread(fd, len(header), 0) == header
            if not is_ours:
                os.ftruncate(fd, 0)
            os.ftruncate(fd, (1 + _SLOTS) * _SLOT_BYTES)
            self._file = mmap.mmap(fd, 0)
        finally:
            os.close(fd)
        # A free slot costs nothing to reuse, an old record least of all old ones.
        records = sorted(self._load()) if is_ours else []
        self._earlier = {unique: slot for _, unique, slot in records}
        self._sequence = records[-1][0] if records else 0
        used = {slot for _, _, slot in records}
        self._reusable = deque(at for at in self._slots() if at not in used)
        self._reusable.extend(slot for _, _, slot in records)
        self._in_progress: dict[int, int] = {}
        if not is_ours:
            self._file[: len(header)] = header

    @staticmethod
    def _slots() -> range:
        return range(_SLOT_BYTES, (1 + _SLOTS) * _SLOT_BYTES, _SLOT_BYTES)

    def begin(self, unique: int) -> Repeat | None:
        """Record that the request *unique* is begun; ``None`` if that is the first time.

        If the answer ``is_done``, give it; ``done`` need not be called.
        """
        repeat = None
        if unique & UNIQUE_RESEND:
            unique ^= UNIQUE_RESEND
            slot = self._earlier.pop(unique, None)
            # Reused by now?  Not by the argument above; but then it is no record of this one.
            if slot is not None and self._unique_at(slot) == unique:
                repeat = self._read(slot)
                self._reusable.remove(slot)
                if repeat.is_done:  # nothing will be added, but a third server may ask
                    self._reusable.append(slot)
                else:
                    self._in_progress[unique] = slot
        if repeat is None:
            self._start(unique)
        return repeat

    def done(self, unique: int, errno: int, payload: bytes = b"") -> None:
        """Record the answer to *unique*, which the caller gives in this very step.

        *payload* is what the answer is made from again: the inode that was made, for example.
        """
        slot = self._in_progress.pop(unique & ~UNIQUE_RESEND, None)
        if slot is None:
            return  # answered by an earlier server, or overtaken (see _start)
        assert len(payload) <= PAYLOAD_BYTES_MAX
        part = _DONE_PART.pack(errno, len(payload))
        crc = _CRC.pack(zlib.crc32(payload, zlib.crc32(part)))
        at = slot + _DONE_AT
        record = part + crc + payload
        self._file[at : at + len(record)] = record
        self._file[slot] = _DONE
        self._reusable.append(slot)

    def close(self) -> None:
        self._file.close()

    def _start(self, unique: int) -> None:
        assert unique not in self._in_progress, f"request {unique} was begun twice"
        if not self._reusable:  # begun and never done, 4096 times: answering goes on
            self._reusable.append(self._in_progress.pop(next(iter(self._in_progress))))
        slot = self._reusable.popleft()
        self._sequence += 1
        part = _BEGUN_PART.pack(unique, self._sequence)
        self._file[slot] = _FREE
        at = slot + _BEGUN_AT
        self._file[at : at + _BEGUN_PART.size + _CRC.size] = part + _CRC.pack(zlib.crc32(part))
        self._file[slot] = _BEGUN
        self._in_progress[unique] = slot

    def _unique_at(self, slot: int) -> int:
        unique: int = _BEGUN_PART.unpack_from(self._file, slot + _BEGUN_AT)[0]
        return unique

    def _load(self) -> list[tuple[int, int, int]]:
        """(sequence, unique, slot) of every record."""
        found = []
        for slot in self._slots():
            if self._file[slot] == _FREE:
                continue
            part = self._file[slot + _BEGUN_AT : slot + _BEGUN_CRC_AT]
            if _CRC.unpack_from(self._file, slot + _BEGUN_CRC_AT)[0] == zlib.crc32(part):
                unique, sequence = _BEGUN_PART.unpack(part)
                found.append((sequence, unique, slot))
        return found

    def _read(self, slot: int) -> Repeat:
        if self._file[slot] != _DONE:
            return Repeat(is_done=False)
        part = self._file[slot + _DONE_AT : slot + _DONE_CRC_AT]
        errno, length = _DONE_PART.unpack(part)
        payload = self._file[slot + _PAYLOAD_AT : slot + _PAYLOAD_AT + length]
        crc = _CRC.unpack_from(self._file, slot + _DONE_CRC_AT)[0]
        if length > PAYLOAD_BYTES_MAX or crc != zlib.crc32(payload, zlib.crc32(part)):
            return Repeat(is_done=False)
        return Repeat(True, errno, payload)
