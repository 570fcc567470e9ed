"""The index of the page cache: which pages of which chunks are valid, in lmdb.

Owns the database files and the translation of lmdb's errors; owns no page.  Transactions are
short and synchronous and all belong to one thread; nothing here is ever awaited.

lmdb reads through a memory map, and a damaged tree can kill the process that follows it.  The
index is therefore walked by a child process before this one opens it (`is_readable`); whatever
is wrong with it, the remedy is an empty index, because clean pages can be fetched again.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import lmdb

from filer.cache.layout import KEY_BYTES, ChunkRecord
from filer.errors import Corrupt, FilerError

MAP_BYTES = 16 << 30
"""Address space, not memory: 2 million chunks of 600 bytes need 2 GiB, with copy-on-write slack."""
CHECK_TIMEOUT_S = 60

RECENT_MAX = 2048
"""Records kept unpacked: the chunks that streams are in.  About 1 KiB each."""

_GENERATION_KEY = b"generation"
"""Shorter than a chunk's key, hence never taken for one."""

_WALK = """
import sys, lmdb
env = lmdb.open(sys.argv[1], map_size=int(sys.argv[2]), readonly=True, lock=False,
                readahead=False, create=False)
with env.begin() as txn:
    for _ in txn.cursor():
        pass
"""
"""Touches every page of the tree; ends by exception or signal if that is impossible."""


class IndexFailed(FilerError):
    """The index cannot be read or written; close it and treat every page as not cached."""


def is_readable(directory: Path) -> bool:
    """Whether a child process could walk the whole index and live.  Blocks: call in a thread."""
    command = [sys.executable, "-c", _WALK, str(directory), str(MAP_BYTES)]
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, timeout=CHECK_TIMEOUT_S, check=False,
        ).returncode == 0
    except subprocess.TimeoutExpired:
        return False


class ChunkIndex:
    def __init__(self, directory: Path) -> None:
        """Open, or make an empty one.  Raises: IndexFailed, OSError."""
        directory.mkdir(parents=True, exist_ok=True)
        try:
            # No writemap: a full disk would raise SIGBUS instead of an error.  No lmdb lock file:
            # the cache directory as a whole is locked by its page store.
            self._env = lmdb.open(
                str(directory), map_size=MAP_BYTES, sync=False, metasync=False, readahead=False,
                lock=False, max_spare_txns=1,
            )
        except lmdb.Error as error:
            raise IndexFailed(f"index: {error}") from error
        self._recent: dict[bytes, ChunkRecord | None] = {}

    @staticmethod
    def destroy(directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)

    def next_generation(self) -> int:
        """Count one more opening; serials made under it are unique for ever."""
        try:
            with self._env.begin(write=True) as txn:
                stored = txn.get(_GENERATION_KEY)
                generation: int = (struct.unpack("<Q", stored)[0] if stored else 0) + 1
                txn.put(_GENERATION_KEY, struct.pack("<Q", generation))
        except (lmdb.Error, struct.error) as error:
            raise IndexFailed(f"index: {error}") from error
        return generation

    def get(self, key: bytes) -> ChunkRecord | None:
        """Raises: IndexFailed; Corrupt: this one record is damaged (`delete` it)."""
        try:
            return self._recent[key]
        except KeyError:
            pass
        try:
            with self._env.begin() as txn:
                value = txn.get(key)
        except lmdb.Error as error:
            raise IndexFailed(f"index: {error}") from error
        record = None if value is None else ChunkRecord.unpack(key, value)
        if len(self._recent) >= RECENT_MAX:
            self._recent.clear()
        self._recent[key] = record
        return record

    def change(
        self, puts: Iterable[tuple[bytes, ChunkRecord]] = (), deletes: Iterable[bytes] = ()
    ) -> None:
        """All or nothing for every later reader, a restarted process included."""
        try:
            with self._env.begin(write=True) as txn:
                for key in deletes:
                    self._recent.pop(key, None)
                    txn.delete(key)
                for key, record in puts:
                    self._recent.pop(key, None)
                    txn.put(key, record.pack(key))
        except lmdb.Error as error:
            raise IndexFailed(f"index: {error}") from error

    def scan(
        self, prefix: bytes = b"", start: bytes = b""
    ) -> Iterator[tuple[bytes, ChunkRecord | None]]:
        """Chunks whose key has *prefix*, from *start* on, in key order; ``None``: damaged.

        The transaction is open while the caller iterates: neither write nor await in the loop.
        """
        try:
            with self._env.begin() as txn, txn.cursor() as cursor:
                if not cursor.set_range(start or prefix):
                    return
                for key, value in cursor:
                    if not key.startswith(prefix):
                        return
                    if len(key) != KEY_BYTES:
                        continue
                    try:
                        yield key, ChunkRecord.unpack(key, value)
                    except Corrupt:
                        yield key, None
        except lmdb.Error as error:
            raise IndexFailed(f"index: {error}") from error

    def sync(self) -> None:
        try:
            self._env.sync(True)
        except lmdb.Error as error:
            raise IndexFailed(f"index: {error}") from error

    def close(self) -> None:
        self._env.close()
