"""One supervisor to a cache directory and a run directory; what a killed one left is removed.

Owns the lock files and the clean-up at start.  The locks are flock(2): the kernel drops them
with the process, so they are never stale.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from filer.errors import Misconfigured
from filer.supervisor.layout import CHILD_OF, Layout

log = structlog.get_logger()

_MNT_DETACH = 2
_END_WITHIN_S = 10.0


@contextmanager
def claim(layout: Layout) -> Iterator[None]:
    """Hold both directories; on entry, nothing of an earlier node is left in them.

    Raises: Misconfigured: another supervisor runs there, or a directory cannot be used.
    """
    for what, directory in (("cache_dir", layout.cache_dir), ("run_dir", layout.run_dir)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise Misconfigured(
                f"{what} {directory} cannot be made: {exc.strerror}",
                "name a directory on a local disk that root may write") from exc
    with _locked(layout.cache_lock, "cache_dir") as cache_lock, \
            _locked(layout.run_lock, "run_dir") as run_lock:
        # The last node on this cache may have had another run directory.
        previous = {_owner(cache_lock)[1], str(layout.run_dir)} - {""}
        for lock in (cache_lock, run_lock):
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n{layout.run_dir}\n".encode(), 0)
        for run_dir in sorted(previous):
            remove_leftovers(Layout(Path(run_dir), layout.cache_dir))
        yield


@contextmanager
def _locked(path: Path, key: str) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise Misconfigured(
            f"{key} {path.parent} cannot be written: {exc.strerror}",
            "name a directory on a local disk that root may write") from exc
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            pid, run_dir = _owner(fd)
            raise Misconfigured(
                f"{key} {path.parent} is in use by another node"
                f" (pid {pid or 'unknown'}, run_dir {run_dir or 'unknown'})",
                f"stop that node first, or give this one another {key}") from exc
        yield fd
    finally:
        os.close(fd)


def _owner(lock: int) -> tuple[str, str]:
    """What ``claim`` wrote: the supervisor's pid and its run directory."""
    pid, _, rest = os.pread(lock, 4096, 0).decode(errors="replace").partition("\n")
    return pid.strip(), rest.partition("\n")[0].strip()


def remove_leftovers(layout: Layout) -> None:
    """End the processes and mounts of a killed supervisor.  Dirty data stays in the log.

    Keepers are asked first (SIGTERM: they stop their volume server and unmount); the NFS server
    has nothing to lose and would only keep the mounts busy.
    """
    orphans = _descendants(layout.run_dir)
    if orphans:
        log.warning("ending what an earlier node left running",
                    pids=sorted(orphans), run_dir=str(layout.run_dir))
        for pid, command in orphans.items():
            if b"filer.keeper" in command:
                _signal(pid, signal.SIGTERM)
            elif b"ganesha" in command:
                _signal(pid, signal.SIGKILL)
        deadline_s = time.monotonic() + _END_WITHIN_S
        while time.monotonic() < deadline_s and any(
            b"filer.keeper" in command for command in _descendants(layout.run_dir).values()
        ):
            time.sleep(0.02)
        for pid in _descendants(layout.run_dir):
            _signal(pid, signal.SIGKILL)
        while time.monotonic() < deadline_s and _descendants(layout.run_dir):
            time.sleep(0.02)
    for mountpoint in mounts_below(layout.mounts_dir):
        log.warning("unmounting what an earlier node left", mountpoint=str(mountpoint))
        unmount(mountpoint)


def _descendants(run_dir: Path) -> dict[int, bytes]:
    """Live processes that carry this node's mark, and their command lines."""
    mark = f"{CHILD_OF}={run_dir}".encode()
    found = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in Path(entry.path, "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = Path(entry.path, "cmdline").read_bytes()
        except OSError:
            continue  # it ended meanwhile
    return found


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def mounts_below(directory: Path) -> list[Path]:
    """Mountpoints in *directory*, the innermost first."""
    points = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        # Space, tab, newline and backslash are octal escapes (proc(5)).
        raw = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split(b" ")[4])
        point = Path(os.fsdecode(raw))
        if point != directory and point.is_relative_to(directory):
            points.append(point)
    return sorted(points, key=lambda point: len(point.parts), reverse=True)


def is_mounted(mountpoint: Path) -> bool:
    """By the mount table: asking the file system itself may block on a server that hangs."""
    return mountpoint in mounts_below(mountpoint.parent)


def unmount(mountpoint: Path) -> None:
    """Lazily: somebody may still hold a file on it.

    Raises: OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), _MNT_DETACH) != 0:
        number = ctypes.get_errno()
        if number != errno.EINVAL:  # EINVAL: it is no mountpoint any more
            raise OSError(number, os.strerror(number), str(mountpoint))
