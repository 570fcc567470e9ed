"""Opening and closing a cache directory: the lock, the state file, trust, and what is rebuilt.

Owns ``<directory>/state`` and the rule by which old pages are believed; owns nothing while the
cache is in use (``pages.py`` does).

- The process died, the system did not: all that was written is in the kernel, so it is believed.
- The system died (the boot id differs) without a clean shutdown: neither pages nor index were
  synced, so everything is dropped.
- The index cannot be walked: everything is dropped.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import json
import os
from array import array
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from filer.cache.eviction import Eviction
from filer.cache.files import ChunkFiles
from filer.cache.index import ChunkIndex, IndexFailed, is_readable
from filer.cache.layout import KEY_BYTES, fingerprint
from filer.errors import TryAgain

FORMAT = 1
CHUNKS_MAX = 2_000_000
"""Bounds memory (45 bytes a chunk, see `Eviction` and `Loaded`) and inodes on the SSD."""
LOCK_WAIT_S = 10.0
"""A predecessor killed a moment ago may still be exiting."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The index, and what follows from it."""

    index: ChunkIndex
    policy: Eviction
    slot_keys: bytearray
    """The key of each slot of the eviction queues, end to end."""
    generation: int
    serials: array[int]
    """Of all chunks, sorted."""
    free_bytes: int
    free_bytes_wanted: int


def load(
    directory: Path, files: ChunkFiles, boot_id: str, *, is_trusted: bool = False
) -> Loaded:
    """Open the index, empty if the old one cannot be believed.  Blocks: call in a thread.

    *is_trusted*: believe it whatever the state file says.

    Raises: OSError, IndexFailed: the disk does not let us.
    """
    index_directory = directory / "index"
    is_trusted = is_trusted or _is_state_trusted(directory, boot_id)
    if index_directory.exists() and not (is_trusted and is_readable(index_directory)):
        log.warning("cache dropped", reason="index unreadable" if is_trusted else
                    "the system stopped without a clean shutdown")
        _set_aside(directory)
    try:
        return _read_index(directory, files, boot_id, ChunkIndex(index_directory))
    except IndexFailed as error:
        log.warning("cache dropped", reason=str(error))
        _set_aside(directory)
        return _read_index(directory, files, boot_id, ChunkIndex(index_directory))


def _read_index(
    directory: Path, files: ChunkFiles, boot_id: str, index: ChunkIndex
) -> Loaded:
    """Rebuild in memory what follows from the index."""
    try:
        (directory / "chunks").mkdir(exist_ok=True)
        write_state(directory, boot_id, is_clean=False)
        slot_keys, sizes, serials = bytearray(), array("I"), array("Q")
        damaged = []
        for packed, record in index.scan():
            if record is None:
                damaged.append(packed)
                continue
            missing = record.slot + 1 - len(sizes)
            if missing > CHUNKS_MAX:
                raise IndexFailed(f"index: slot {record.slot}")
            if missing > 0:
                slot_keys += bytes(KEY_BYTES * missing)
                sizes.extend([0] * missing)
                serials.extend([0] * missing)
            if serials[record.slot]:
                raise IndexFailed(f"index: slot {record.slot} taken twice")
            slot_keys[record.slot * KEY_BYTES : (record.slot + 1) * KEY_BYTES] = packed
            sizes[record.slot], serials[record.slot] = record.valid_bytes, record.serial
        index.change(deletes=damaged)
        policy = Eviction()
        policy.restore(
            (slot, fingerprint(slot_keys[slot * KEY_BYTES : (slot + 1) * KEY_BYTES]),
             sizes[slot])
            for slot in sorted(range(len(serials)), key=serials.__getitem__)
            if serials[slot]
        )
        return Loaded(
            index, policy, slot_keys, index.next_generation(),
            array("Q", sorted(serial for serial in serials if serial)),
            files.free_bytes(), files.free_bytes_wanted(),
        )
    except BaseException:
        index.close()
        raise


def _set_aside(directory: Path) -> None:
    """Move everything out of the way; the page store removes it later."""
    discarded = directory / "discarded"
    discarded.mkdir(exist_ok=True)
    number = next(n for n in itertools.count() if not (discarded / f"index{n}").exists()
                  and not (discarded / f"chunks{n}").exists())
    for name in ("index", "chunks"):
        with contextlib.suppress(FileNotFoundError):
            os.rename(directory / name, discarded / f"{name}{number}")


def close_cleanly(directory: Path, index: ChunkIndex, boot_id: str) -> None:
    """Sync everything, then say so.  An empty *boot_id*: believe nothing of it next time."""
    try:
        index.sync()
        _sync_file_system(directory)
        write_state(directory, boot_id, is_clean=bool(boot_id))
    except (IndexFailed, OSError) as error:
        log.warning("cache not closed cleanly", error=str(error))
    finally:
        index.close()


async def lock_directory(directory: Path) -> int:
    """Lock the directory itself: that works on a read-only file system, too.

    Raises: TryAgain: another process holds it (a predecessor that is not quite dead, or a
    second node on the same directory); OSError.
    """
    os.makedirs(directory, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        give_up_at = trio.current_time() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError as error:
                if trio.current_time() >= give_up_at:
                    raise TryAgain(
                        f"the cache directory {directory} is in use by another process"
                    ) from error
            await trio.sleep(0.05)
    except BaseException:
        os.close(descriptor)
        raise


def write_state(directory: Path, boot_id: str, *, is_clean: bool) -> None:
    """Rewritten in place, in one sector: that needs no free space."""
    text = json.dumps({"format": FORMAT, "boot_id": boot_id, "clean": is_clean})
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(directory / "state", flags, 0o600)
    try:
        os.pwrite(descriptor, text.ljust(256).encode(), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_state_trusted(directory: Path, boot_id: str) -> bool:
    try:
        state = json.loads((directory / "state").read_bytes())
        return state["format"] == FORMAT and (state["clean"] is True
                                              or state["boot_id"] == boot_id)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sync_file_system(directory: Path) -> None:
    """Chunk files are not synced one by one; os.sync() would sync everybody's disks."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if libc.syncfs(descriptor):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(descriptor)
