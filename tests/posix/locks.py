"""fcntl and flock locks between processes."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

from tests.posix.registry import case
from tests.posix.tools import Child, fails_with, in_processes, opened, write_file

_FLOCK = "hhqqi4x"  # struct flock: l_type, l_whence, l_start, l_len, l_pid


def try_lock(fd: int, kind: int, start: int = 0, length: int = 0) -> bool:
    try:
        fcntl.lockf(fd, kind | fcntl.LOCK_NB, length, start)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def elsewhere(path: Path, kind: int, start: int = 0, length: int = 0) -> bool:
    """Whether another process gets this lock (which it drops again)."""
    def attempt() -> bool:
        with opened(path, os.O_RDWR) as fd:
            return try_lock(fd, kind, start, length)

    return bool(in_processes(attempt)[0])


def lock_test(fd: int, command: int = fcntl.F_GETLK) -> tuple[int, int, int, int]:
    """F_GETLK for a write lock on the whole file: (type, start, length, pid)."""
    answer = fcntl.fcntl(fd, command, struct.pack(_FLOCK, fcntl.F_WRLCK, 0, 0, 0, 0))
    kind, _, start, length, pid = struct.unpack(_FLOCK, answer)
    return kind, start, length, pid


class Holder:
    """Another process that keeps a lock until it is told to let go."""

    def __init__(self, path: Path, lock: Callable[[int], object]) -> None:
        ready_read, ready_write = os.pipe()
        go_read, self._go_write = os.pipe()

        def hold() -> None:
            os.close(self._go_write)
            with opened(path, os.O_RDWR) as fd:
                lock(fd)
                os.write(ready_write, b"x")
                os.read(go_read, 1)

        self._child = Child(hold)
        self.pid = self._child.pid
        os.close(ready_write)
        os.close(go_read)
        is_ready = os.read(ready_read, 1)
        os.close(ready_read)
        if not is_ready:
            self.release()

    def release(self) -> None:
        os.close(self._go_write)
        self._child.result()


@case
def a_write_lock_keeps_other_processes_out(root: Path) -> None:
    file = write_file(root / "file")
    with opened(file, os.O_RDWR) as fd:
        assert try_lock(fd, fcntl.LOCK_EX)
        assert not elsewhere(file, fcntl.LOCK_EX)
        assert not elsewhere(file, fcntl.LOCK_SH)
        fcntl.lockf(fd, fcntl.LOCK_UN)
        assert elsewhere(file, fcntl.LOCK_EX)


@case
def read_locks_are_shared(root: Path) -> None:
    file = write_file(root / "file")
    with opened(file, os.O_RDWR) as fd:
        assert try_lock(fd, fcntl.LOCK_SH)
        assert elsewhere(file, fcntl.LOCK_SH)
        assert not elsewhere(file, fcntl.LOCK_EX)


@case
def locks_hold_byte_ranges(root: Path) -> None:
    file = write_file(root / "file")
    with opened(file, os.O_RDWR) as fd:
        assert try_lock(fd, fcntl.LOCK_EX, 100, 100)
        assert elsewhere(file, fcntl.LOCK_EX, 0, 100)
        assert elsewhere(file, fcntl.LOCK_EX, 200, 100)
        assert not elsewhere(file, fcntl.LOCK_EX, 199, 1)
        assert not elsewhere(file, fcntl.LOCK_EX, 0, 0)
        # Unlocking the middle leaves both ends locked.
        fcntl.lockf(fd, fcntl.LOCK_UN, 50, 125)
        assert elsewhere(file, fcntl.LOCK_EX, 125, 50)
        assert not elsewhere(file, fcntl.LOCK_EX, 100, 1)
        assert not elsewhere(file, fcntl.LOCK_EX, 199, 1)
        assert try_lock(fd, fcntl.LOCK_EX, 1 << 40, 10)
        assert not elsewhere(file, fcntl.LOCK_EX, (1 << 40) + 5, 1)


@case
def the_holder_of_a_lock_can_be_asked_for(root: Path) -> None:
    file = write_file(root / "file")
    holder = Holder(file, lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX, 20, 10))
    try:
        with opened(file, os.O_RDWR) as fd:
            kind, start, length, _ = lock_test(fd)
            assert (kind, start, length) == (fcntl.F_WRLCK, 10, 20)
    finally:
        holder.release()
    with opened(file, os.O_RDWR) as fd:
        assert lock_test(fd)[0] == fcntl.F_UNLCK


@case
def a_lock_goes_with_its_process(root: Path) -> None:
    file = write_file(root / "file")
    holder = Holder(file, lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX))
    with opened(file, os.O_RDWR) as fd:
        is_free_before = try_lock(fd, fcntl.LOCK_EX)
        holder.release()
        assert not is_free_before
        fcntl.lockf(fd, fcntl.LOCK_EX)


@case
def closing_any_descriptor_of_the_file_drops_the_locks_of_the_process(root: Path) -> None:
    file = write_file(root / "file")
    with opened(file, os.O_RDWR) as fd:
        assert try_lock(fd, fcntl.LOCK_EX)
        os.close(os.open(file, os.O_RDONLY))
        assert elsewhere(file, fcntl.LOCK_EX)


@case
def a_lock_is_upgraded_and_downgraded(root: Path) -> None:
    file = write_file(root / "file")
    with opened(file, os.O_RDWR) as fd:
        assert try_lock(fd, fcntl.LOCK_SH)
        assert try_lock(fd, fcntl.LOCK_EX)
        assert not elsewhere(file, fcntl.LOCK_SH)
        assert try_lock(fd, fcntl.LOCK_SH)
        assert elsewhere(file, fcntl.LOCK_SH)
        assert not elsewhere(file, fcntl.LOCK_EX)


@case
def a_waiting_process_gets_the_lock_when_it_is_free(root: Path) -> None:
    """Each process adds one to a number under the lock: no increment is lost."""
    file = write_file(root / "counter", b"0")

    def count() -> None:
        with opened(file, os.O_RDWR) as fd:
            for _ in range(25):
                fcntl.lockf(fd, fcntl.LOCK_EX)
                number = int(os.pread(fd, 20, 0)) + 1
                os.pwrite(fd, b"%d" % number, 0)
                os.fsync(fd)
                fcntl.lockf(fd, fcntl.LOCK_UN)

    in_processes(count, count, count)
    assert int(file.read_bytes()) == 75


@case
def locks_follow_the_file_and_not_its_name(root: Path) -> None:
    file = write_file(root / "file")
    os.link(file, root / "link")
    with opened(file, os.O_RDWR) as fd:
        assert try_lock(fd, fcntl.LOCK_EX)
        assert not elsewhere(root / "link", fcntl.LOCK_EX)
        os.rename(file, root / "renamed")
        write_file(file)
        assert elsewhere(file, fcntl.LOCK_EX)
        assert not elsewhere(root / "renamed", fcntl.LOCK_EX)


@case
def a_write_lock_needs_a_descriptor_for_writing(root: Path) -> None:
    with opened(write_file(root / "file"), os.O_RDONLY) as fd, fails_with(errno.EBADF):
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


@case
def flock_excludes_other_opens(root: Path) -> None:
    file = write_file(root / "file")

    def attempt(kind: int) -> bool:
        with opened(file, os.O_RDWR) as fd:
            try:
                fcntl.flock(fd, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    with opened(file, os.O_RDWR) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert in_processes(lambda: attempt(fcntl.LOCK_SH)) == [False]
        fcntl.flock(fd, fcntl.LOCK_UN)
        fcntl.flock(fd, fcntl.LOCK_SH)
        assert in_processes(lambda: attempt(fcntl.LOCK_SH)) == [True]
        assert in_processes(lambda: attempt(fcntl.LOCK_EX)) == [False]
    assert in_processes(lambda: attempt(fcntl.LOCK_EX)) == [True]


@case
def open_file_description_locks_exclude_each_other(root: Path) -> None:
    file = write_file(root / "file")
    request = struct.pack(_FLOCK, fcntl.F_WRLCK, 0, 0, 10, 0)
    with opened(file, os.O_RDWR) as one, opened(file, os.O_RDWR) as two:
        fcntl.fcntl(one, fcntl.F_OFD_SETLK, request)
        with fails_with(errno.EAGAIN, errno.EACCES):
            fcntl.fcntl(two, fcntl.F_OFD_SETLK, request)
        assert lock_test(two, fcntl.F_OFD_GETLK)[0] == fcntl.F_WRLCK
    with opened(file, os.O_RDWR) as two:
        fcntl.fcntl(two, fcntl.F_OFD_SETLK, request)
