"""What the cases share: expected errors, other users, processes, system calls that os lacks."""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import random
import select
import signal
import stat
import struct
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tests.posix.registry import Skipped

T = TypeVar("T")

USER, OTHER_USER, GROUP, OTHER_GROUP = 12001, 12002, 13001, 13002
"""Numbers that no account of a test machine has."""

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
AT_FDCWD = -100

LARGE_DIRECTORY_ENTRIES = int(os.environ.get("POSIX_SUITE_ENTRIES", "10000"))
"""Fewer where each operation is a round trip from an emulated machine."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.opendir.restype = _libc.readdir64.restype = _libc.fdopendir.restype = ctypes.c_void_p
_libc.opendir.argtypes = [ctypes.c_char_p]
_libc.telldir.restype = ctypes.c_long
for _function in ("readdir64", "telldir", "closedir", "rewinddir"):
    getattr(_libc, _function).argtypes = [ctypes.c_void_p]
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


@contextmanager
def fails_with(*numbers: int) -> Iterator[None]:
    """The block raises an OSError with one of these errno values."""
    wanted = " or ".join(errno.errorcode[n] for n in numbers)
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise AssertionError(f"wanted {wanted}, got {error!r}") from error
    else:
        raise AssertionError(f"wanted {wanted}, but it succeeded")


def _checked(result: int, *paths: object) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *paths[:1])
    return result


def require_root() -> None:
    if os.geteuid() != 0:
        raise Skipped("needs root")


def seeded_random() -> random.Random:
    """A generator whose seed is printed; POSIX_SUITE_SEED repeats a run."""
    seed = int(os.environ.get("POSIX_SUITE_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"seed: POSIX_SUITE_SEED={seed}")
    return random.Random(seed)


def pattern(size: int, seed: int = 0) -> bytes:
    """Bytes in which no two aligned words are alike, so that misplaced data shows."""
    return random.Random(seed).randbytes(size)


def write_file(path: Path, data: bytes = b"", mode: int = 0o644) -> Path:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view):]
    finally:
        os.close(fd)
    return path


@contextmanager
def opened(path: Path | str | bytes, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


# Other processes ------------------------------------------------------------------------


class Child:
    """A forked process that runs one function; ``result`` re-raises what it raised."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._read_fd, write_fd = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._read_fd)
            _run_and_exit(function, write_fd)
        os.close(write_fd)

    def fileno(self) -> int:
        """Readable once the function has ended."""
        return self._read_fd

    def result(self) -> object:
        try:
            with os.fdopen(self._read_fd, "rb") as pipe:
                answer = pipe.read()
        except BaseException:
            self.kill()
            raise
        _, status = os.waitpid(self.pid, 0)
        if not answer:
            raise AssertionError(f"the child process died, wait status {status:#x}")
        value, error, trace = pickle.loads(answer)
        if error is not None:
            error.add_note(f"in the child process:\n{trace}")
            raise error
        return value

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _run_and_exit(function: Callable[[], object], write_fd: int) -> None:
    answer: tuple[object, BaseException | None, str]
    try:
        answer = (function(), None, "")
    except BaseException as error:
        answer = (None, error, traceback.format_exc())
    try:
        message = pickle.dumps(answer)
    except Exception:
        message = pickle.dumps((None, AssertionError(repr(answer[:2])), answer[2]))
    with os.fdopen(write_fd, "wb") as pipe:
        pipe.write(message)
    os._exit(0)


def in_processes(*functions: Callable[[], object]) -> list[object]:
    """Run each function in its own process, all at once; their results in order.

    The first failure ends the others: they may wait for what will never come.
    """
    children = [Child(function) for function in functions]
    results: dict[Child, object] = {}
    running = list(children)
    try:
        while running:
            ready, _, _ = select.select(running, [], [])
            for child in ready:
                running.remove(child)
                results[child] = child.result()
    finally:
        for child in running:
            child.kill()
            os.close(child.fileno())
    return [results[child] for child in children]


def as_user(
    uid: int, function: Callable[[], T], *, gid: int = GROUP, groups: tuple[int, ...] = (),
) -> T:
    """Run *function* in a child process with these ids; return or raise what it did."""
    require_root()

    def run() -> T:
        os.setgroups(groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        return function()

    return Child(run).result()  # type: ignore[return-value]


def umasked(mask: int, function: Callable[[], T]) -> T:
    """Run *function* under this umask."""
    before = os.umask(mask)
    try:
        return function()
    finally:
        os.umask(before)


def open_to_all(root: Path) -> Path:
    """Make *root* and, as far as needed, its parents usable by any user."""
    require_root()
    root.chmod(0o777)
    for parent in root.parents:
        mode = stat.S_IMODE(parent.stat().st_mode)
        if not mode & stat.S_IXOTH:
            parent.chmod(mode | stat.S_IXOTH)
    return root


# Times ----------------------------------------------------------------------------------


def wait_for_clock_tick(root: Path) -> None:
    """Return once the file system gives new changes a later time than it has given so far.

    Time stamps may advance only with the kernel's timer tick, so two changes in a row may
    otherwise carry the same time.
    """
    probe = root / "clock-tick-probe"
    write_file(probe)
    first_ns = probe.stat().st_mtime_ns
    while True:
        os.utime(probe)
        if probe.stat().st_mtime_ns > first_ns:
            break
    probe.unlink()


# System calls ---------------------------------------------------------------------------


def renameat2(old: Path, new: Path, flags: int) -> None:
    _checked(_libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags), old)


def utimensat(path: Path, atime: tuple[int, int], mtime: tuple[int, int]) -> None:
    """Set times from (seconds, nanoseconds); the latter may be UTIME_NOW or UTIME_OMIT."""
    times = (ctypes.c_long * 4)(*atime, *mtime)
    _checked(_libc.utimensat(AT_FDCWD, os.fsencode(path), times, 0), path)


def statx_mask_mode_size(path: Path) -> tuple[int, int, int]:
    """(stx_mask, stx_mode, stx_size) of statx(2) with STATX_BASIC_STATS."""
    answer = ctypes.create_string_buffer(256)
    _checked(_libc.statx(AT_FDCWD, os.fsencode(path), 0, 0x7FF, answer), path)
    (mask,) = struct.unpack_from("=I", answer, 0)
    (mode,) = struct.unpack_from("=H", answer, 28)
    (size,) = struct.unpack_from("=Q", answer, 40)
    return mask, mode, size


_SYS_GETDENTS64 = {"x86_64": 217, "aarch64": 61}.get(os.uname().machine)


def getdents(fd: int, buffer_bytes: int = 4096) -> list[tuple[bytes, int, int, int]]:
    """One getdents64(2): [(name, inode, offset, type)], empty at the end."""
    if _SYS_GETDENTS64 is None:
        raise Skipped("getdents64 has no known number on this machine")
    buffer = ctypes.create_string_buffer(buffer_bytes)
    size = _checked(_libc.syscall(_SYS_GETDENTS64, fd, buffer, buffer_bytes))
    entries = []
    position = 0
    while position < size:
        inode, offset, length, kind = struct.unpack_from("=QqHB", buffer, position)
        raw = buffer.raw[position + 19:position + length]
        entries.append((raw[:raw.index(b"\0")], inode, offset, kind))
        position += length
    return entries


def all_getdents(path: Path, buffer_bytes: int = 4096) -> list[tuple[bytes, int, int, int]]:
    entries = []
    with opened(path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        while batch := getdents(fd, buffer_bytes):
            entries += batch
    return entries


class DirectoryStream:
    """opendir(3) with its telldir, seekdir and rewinddir."""

    def __init__(self, path: Path) -> None:
        self._stream = _libc.opendir(os.fsencode(path))
        if not self._stream:
            _checked(-1, path)

    def __enter__(self) -> DirectoryStream:
        return self

    def __exit__(self, *_: object) -> None:
        _libc.closedir(self._stream)

    def read(self) -> bytes | None:
        """The next name, `.` and `..` included; None at the end."""
        ctypes.set_errno(0)
        entry = _libc.readdir64(self._stream)
        if not entry:
            number = ctypes.get_errno()
            if number:
                raise OSError(number, os.strerror(number))
            return None
        return ctypes.string_at(entry + 19)

    def rest(self) -> list[bytes]:
        names = []
        while (name := self.read()) is not None:
            names.append(name)
        return names

    def tell(self) -> int:
        return int(_libc.telldir(self._stream))

    def seek(self, position: int) -> None:
        _libc.seekdir(self._stream, position)

    def rewind(self) -> None:
        _libc.rewinddir(self._stream)
