"""What the namespace must remember over a restart: inodes, directory cookies, orphans.

Owns the LMDB environment ``names/`` and the *names log* beside it.  It caches what the core
filer knows anyway, with one exception that makes it precious enough to survive ``kill -9``:
NFS clients hold inode ids for ever, and only this store knows the core filer's handle behind one.

A put goes to memory and, by ``write(2)``, to the names log (page cache: survives the death of the
process).  About once a second all puts are committed to LMDB in one synchronous transaction in a
worker thread, and the log that covered them is deleted.  A crash leaves:

====================================  ======================================================
crash of                              leaves
====================================  ======================================================
the process, any time                 LMDB as of the last commit + every put, from the log
the machine                           LMDB as of the last commit; a torn log is cut at the
                                      first record whose checksum fails
====================================  ======================================================
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lmdb
import msgspec
import trio
import xxhash

from filer.core_filer.base import Attributes, CoreVersion, Handle
from filer.ids import DataVersion, InodeId

_MAP_BYTES = 64 << 30
_COMMIT_INTERVAL_S = 1.0
_PENDING_MAX = 50_000
"""A commit starts early at this many puts, so that memory stays bounded."""

_HEADER = struct.Struct("<IQ")
_KEY = struct.Struct(">Q")
_DENTRY_KEY = struct.Struct(">QQ")
_DIRECTORY = struct.Struct("<Qq")
_INODE = struct.Struct("<IQQ QIIIIQQQqqqQ qqQ BB")
_INODES, _DENTRIES, _DIRECTORIES, _ORPHANS = range(4)
_NAMES = (b"inodes", b"dentries", b"directories", b"orphans")

_Put = tuple[int, bytes, bytes | None]
_encode = msgspec.msgpack.Encoder().encode
_decode_puts = msgspec.msgpack.Decoder(list[_Put]).decode


@dataclass(frozen=True, slots=True)
class InodeRecord:
    id: InodeId
    generation: int
    parent: InodeId
    handle: Handle
    attributes: Attributes
    """As told to clients."""
    core: CoreVersion
    """As the core filer told them."""
    data_version: DataVersion
    name: bytes = b""
    """One of its names in *parent*, as last seen; a hint."""

    def encode(self) -> bytes:
        a, c = self.attributes, self.core
        return _INODE.pack(
            self.generation, self.parent, self.data_version,
            a.fileid, a.mode, a.nlink, a.uid, a.gid, a.size, a.used_bytes, a.rdev,
            a.atime_ns, a.mtime_ns, a.ctime_ns, a.fsid,
            c.mtime_ns, c.ctime_ns, c.size, len(self.handle), len(self.name),
        ) + self.handle + self.name

    @classmethod
    def decode(cls, inode: InodeId, raw: bytes) -> InodeRecord:
        (generation, parent, data_version, *attributes, mtime_ns, ctime_ns, size,
         handle_length, name_length) = _INODE.unpack_from(raw)
        handle_end = _INODE.size + handle_length
        return cls(
            inode, generation, InodeId(parent), Handle(raw[_INODE.size:handle_end]),
            Attributes(*attributes), CoreVersion(mtime_ns, ctime_ns, size),
            DataVersion(data_version), raw[handle_end:handle_end + name_length],
        )


@dataclass(frozen=True, slots=True)
class DirectoryRecord:
    """A complete listing: *entries* are ``(cookie, name, inode)`` in cookie order."""

    next_cookie: int
    core_mtime_ns: int
    """The directory's mtime in the core filer when the listing was true."""
    entries: list[tuple[int, bytes, InodeId]]


class NameStore:
    """See the module's docstring.  Puts never block; ``run`` must be running to commit them."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory
        self._environment = lmdb.open(
            str(directory / "lmdb"), max_dbs=len(_NAMES), map_size=_MAP_BYTES, readahead=False,
            metasync=False, max_readers=64,
        )
        self._databases = [self._environment.open_db(name) for name in _NAMES]
        self._pending: list[dict[bytes, bytes | None]] = [{} for _ in _NAMES]
        self._committing: list[dict[bytes, bytes | None]] = [{} for _ in _NAMES]
        self._pending_count = 0
        self.degraded: str | None = None
        """Why puts cannot be made to survive at the moment."""
        self._commit_now = trio.Event()
        self._commit_lock = trio.Lock()
        self._replay()
        self._sequence = 1 + max((n for n, _ in self._logs()), default=0)
        self._log = self._new_log()

    # -- inodes ------------------------------------------------------------------------------

    def inode(self, inode: InodeId) -> InodeRecord | None:
        raw = self._get(_INODES, _KEY.pack(inode))
        return InodeRecord.decode(inode, raw) if raw is not None else None

    def put_inodes(self, records: list[InodeRecord]) -> None:
        self._put([(_INODES, _KEY.pack(r.id), r.encode()) for r in records])

    def forget_inode(self, inode: InodeId) -> None:
        self._put([(_INODES, _KEY.pack(inode), None)])

    def inode_count(self) -> int:
        with self._environment.begin() as txn:
            return int(txn.stat(self._databases[_INODES])["entries"])

    # -- directories -------------------------------------------------------------------------

    def put_directory(self, directory: InodeId, next_cookie: int, core_mtime_ns: int) -> None:
        self._put([(_DIRECTORIES, _KEY.pack(directory),
                    _DIRECTORY.pack(next_cookie, core_mtime_ns))])

    def forget_directory(self, directory: InodeId) -> None:
        """Its listing can no longer be trusted to be complete; cookies stay."""
        self._put([(_DIRECTORIES, _KEY.pack(directory), None)])

    def put_dentries(
        self, directory: InodeId, entries: list[tuple[int, bytes, InodeId | None]]
    ) -> None:
        """``(cookie, name, inode)``; an inode of ``None`` removes the cookie."""
        self._put([
            (_DENTRIES, _DENTRY_KEY.pack(directory, cookie),
             None if inode is None else _KEY.pack(inode) + name)
            for cookie, name, inode in entries
        ])

    async def directory(self, directory: InodeId) -> DirectoryRecord | None:
        """The stored listing, or ``None`` if there is none."""
        overlay = {**self._committing[_DENTRIES], **self._pending[_DENTRIES]}
        prefix = _KEY.pack(directory)
        changes = {key: value for key, value in overlay.items() if key.startswith(prefix)}
        meta = self._get(_DIRECTORIES, prefix)

        def load() -> dict[bytes, bytes | None]:
            found: dict[bytes, bytes | None] = {}
            with self._environment.begin() as txn:
                cursor = txn.cursor(self._databases[_DENTRIES])
                if cursor.set_range(prefix):
                    for key, value in cursor:
                        if not key.startswith(prefix):
                            break
                        found[key] = value
            return found

        found = await trio.to_thread.run_sync(load)
        found.update(changes)
        entries = [
            (_DENTRY_KEY.unpack(key)[1], value[8:], InodeId(_KEY.unpack_from(value)[0]))
            for key, value in sorted(found.items()) if value is not None
        ]
        if meta is None:
            if not entries:
                return None
            return DirectoryRecord(1 + entries[-1][0], -1, entries)
        next_cookie, mtime_ns = _DIRECTORY.unpack(meta)
        return DirectoryRecord(next_cookie, mtime_ns, entries)

    # -- orphans -----------------------------------------------------------------------------

    def put_orphan(self, inode: InodeId, name: bytes) -> None:
        self._put([(_ORPHANS, _KEY.pack(inode), name)])

    def forget_orphan(self, inode: InodeId) -> None:
        self._put([(_ORPHANS, _KEY.pack(inode), None)])

    def orphans(self) -> dict[InodeId, bytes]:
        found: dict[bytes, bytes | None] = {}
        with self._environment.begin() as txn:
            found.update(txn.cursor(self._databases[_ORPHANS]))
        found.update(self._committing[_ORPHANS])
        found.update(self._pending[_ORPHANS])
        return {
            InodeId(_KEY.unpack(key)[0]): name for key, name in found.items() if name is not None
        }

    # -- life --------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Commit in the background until cancelled."""
        task_status.started()
        while True:
            with trio.move_on_after(_COMMIT_INTERVAL_S):
                await self._commit_now.wait()
            await self.commit()

    async def commit(self) -> None:
        """Make every put so far survive a machine crash."""
        async with self._commit_lock:
            if not self._pending_count:
                return
            self._commit_now = trio.Event()
            self._committing, self._pending = self._pending, [{} for _ in _NAMES]
            self._pending_count = 0
            old_log, covered = self._log, self._sequence
            self._sequence += 1
            self._log = self._new_log()
            # The worker thread must finish what it began: the puts live only in memory until then.
            with trio.CancelScope(shield=True):
                try:
                    await trio.to_thread.run_sync(self._commit_batch, self._committing)
                except (lmdb.Error, OSError) as exc:
                    self._take_back(exc)
                else:
                    self.degraded = None
                    self._committing = [{} for _ in _NAMES]
                    for sequence, path in self._logs():
                        if sequence <= covered:
                            path.unlink(missing_ok=True)
                finally:
                    os.close(old_log)

    def close(self) -> None:
        os.close(self._log)
        self._environment.close()

    # -- mechanism ---------------------------------------------------------------------------

    def _get(self, database: int, key: bytes) -> bytes | None:
        for overlay in (self._pending[database], self._committing[database]):
            if key in overlay:
                return overlay[key]
        with self._environment.begin() as txn:
            value: bytes | None = txn.get(key, db=self._databases[database])
            return value

    def _put(self, puts: list[_Put]) -> None:
        if not puts:
            return
        payload = _encode(puts)
        record = _HEADER.pack(len(payload), xxhash.xxh3_64_intdigest(payload)) + payload
        try:
            if os.write(self._log, record) != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as exc:
            # The puts still reach LMDB with the next commit, whose new log starts clean.
            self.degraded = f"names log: {exc.strerror}"
            self._commit_now.set()
        for database, key, value in puts:
            self._pending[database][key] = value
        self._pending_count += len(puts)
        if self._pending_count >= _PENDING_MAX:
            self._commit_now.set()

    def _commit_batch(self, batch: list[dict[bytes, bytes | None]]) -> None:
        with self._environment.begin(write=True) as txn:
            for database, puts in zip(self._databases, batch, strict=True):
                for key, value in sorted(puts.items()):
                    if value is None:
                        txn.delete(key, db=database)
                    else:
                        txn.put(key, value, db=database)

    def _take_back(self, exc: Exception) -> None:
        """A commit failed (a full disk, say): keep its puts for the next one."""
        self.degraded = f"names store: {exc}"
        self._pending = [
            {**old, **new} for old, new in zip(self._committing, self._pending, strict=True)
        ]
        self._committing = [{} for _ in _NAMES]
        self._pending_count = sum(map(len, self._pending))

    def _logs(self) -> list[tuple[int, Path]]:
        return sorted((int(p.suffix[1:]), p) for p in self._path.glob("log.*"))

    def _new_log(self) -> int:
        path = self._path / f"log.{self._sequence}"
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _replay(self) -> None:
        logs = self._logs()
        if not logs:
            return
        for _, path in logs:
            for puts in _records(path.read_bytes()):
                for database, key, value in puts:
                    self._pending[database][key] = value
        self._commit_batch(self._pending)
        self._pending = [{} for _ in _NAMES]
        for _, path in logs:
            path.unlink()


def _records(raw: bytes) -> Iterator[list[_Put]]:
    """Records up to the first torn one."""
    at = 0
    while at + _HEADER.size <= len(raw):
        length, checksum = _HEADER.unpack_from(raw, at)
        payload = raw[at + _HEADER.size:at + _HEADER.size + length]
        if len(payload) < length or xxhash.xxh3_64_intdigest(payload) != checksum:
            return
        yield _decode_puts(payload)
        at += _HEADER.size + length
