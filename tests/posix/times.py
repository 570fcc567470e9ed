"""Which operation changes which time stamp, and that explicit times are kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.posix.registry import case
from tests.posix.tools import (
    UTIME_NOW,
    UTIME_OMIT,
    opened,
    utimensat,
    wait_for_clock_tick,
    write_file,
)


class Stamps:
    """Watches time stamps below ``work``; the probe of the clock lies outside it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.work = root / "work"
        self.work.mkdir()

    def wait_for_tick(self) -> None:
        wait_for_clock_tick(self._root)

    @contextmanager
    def changes(self, *paths: Path, mtime: bool, ctime: bool) -> Iterator[None]:
        """The block moves exactly these times of *paths* forward."""
        before = [path.lstat() for path in paths]
        self.wait_for_tick()
        yield
        for path, old in zip(paths, before, strict=True):
            new = path.lstat()
            for name, is_moved in (("st_mtime_ns", mtime), ("st_ctime_ns", ctime)):
                moved_ns = getattr(new, name) - getattr(old, name)
                assert moved_ns > 0 if is_moved else moved_ns == 0, (name, moved_ns, path.name)


@case
def a_new_file_is_stamped_with_the_present(root: Path) -> None:
    stamps = Stamps(root)
    before = write_file(stamps.work / "before").stat().st_mtime_ns
    stamps.wait_for_tick()
    found = write_file(stamps.work / "file").stat()
    stamps.wait_for_tick()
    after = write_file(stamps.work / "after").stat().st_mtime_ns
    for stamp in (found.st_mtime_ns, found.st_ctime_ns):
        assert before < stamp < after


@case
def a_new_file_was_last_read_when_it_was_made(root: Path) -> None:
    stamps = Stamps(root)
    before = write_file(stamps.work / "before").stat().st_mtime_ns
    stamps.wait_for_tick()
    found_ns = write_file(stamps.work / "file").stat().st_atime_ns
    stamps.wait_for_tick()
    assert before < found_ns < write_file(stamps.work / "after").stat().st_mtime_ns


@case
def a_write_changes_mtime_and_ctime(root: Path) -> None:
    stamps = Stamps(root)
    file = write_file(stamps.work / "file", b"old")
    with stamps.changes(file, mtime=True, ctime=True), opened(file, os.O_WRONLY) as fd:
        os.write(fd, b"new")


@case
def every_write_is_stamped_even_while_the_file_stays_open(root: Path) -> None:
    stamps = Stamps(root)
    file = write_file(stamps.work / "file", b"old")
    with opened(file, os.O_WRONLY) as fd:
        for _ in range(3):
            with stamps.changes(file, mtime=True, ctime=True):
                os.pwrite(fd, b"new", 0)
                os.fsync(fd)


@case
def a_read_changes_neither_mtime_nor_ctime(root: Path) -> None:
    stamps = Stamps(root)
    file = write_file(stamps.work / "file", b"content")
    with stamps.changes(file, mtime=False, ctime=False):
        assert file.read_bytes() == b"content"
    with stamps.changes(stamps.work, mtime=False, ctime=False):
        os.listdir(stamps.work)


@case
def truncation_changes_mtime_and_ctime(root: Path) -> None:
    stamps = Stamps(root)
    file = write_file(stamps.work / "file", b"content")
    for size in (3, 1000):
        with stamps.changes(file, mtime=True, ctime=True):
            os.truncate(file, size)
    with stamps.changes(file, mtime=True, ctime=True):
        os.close(os.open(file, os.O_WRONLY | os.O_TRUNC))


@case
def changes_of_attributes_change_ctime_alone(root: Path) -> None:
    stamps = Stamps(root)
    file = write_file(stamps.work / "file", b"content")
    with stamps.changes(file, mtime=False, ctime=True):
        file.chmod(0o600)
    with stamps.changes(file, mtime=False, ctime=True):
        os.chown(file, os.getuid(), os.getgid())
    with stamps.changes(file, mtime=False, ctime=True):
        os.link(file, stamps.work / "other")
    with stamps.changes(file, mtime=False, ctime=True):
        (stamps.work / "other").unlink()


@case
def a_new_name_changes_the_times_of_its_directory(root: Path) -> None:
    stamps = Stamps(root)
    def check(act: Callable[[], object]) -> None:
        with stamps.changes(stamps.work, mtime=True, ctime=True):
            act()

    check(lambda: write_file(stamps.work / "file"))
    check(lambda: os.mkdir(stamps.work / "dir"))
    check(lambda: os.symlink("target", stamps.work / "symlink"))
    check(lambda: os.mkfifo(stamps.work / "fifo"))
    check(lambda: os.link(stamps.work / "file", stamps.work / "link"))


@case
def a_removed_name_changes_the_times_of_its_directory(root: Path) -> None:
    stamps = Stamps(root)
    write_file(stamps.work / "file")
    (stamps.work / "dir").mkdir()
    with stamps.changes(stamps.work, mtime=True, ctime=True):
        (stamps.work / "file").unlink()
    with stamps.changes(stamps.work, mtime=True, ctime=True):
        (stamps.work / "dir").rmdir()


@case
def a_rename_changes_the_times_of_both_directories(root: Path) -> None:
    stamps = Stamps(root)
    (stamps.work / "a").mkdir()
    (stamps.work / "b").mkdir()
    write_file(stamps.work / "a" / "file")
    with stamps.changes(stamps.work / "a", stamps.work / "b", mtime=True, ctime=True):
        os.rename(stamps.work / "a" / "file", stamps.work / "b" / "file")


@case
def a_change_inside_a_file_leaves_its_directory_alone(root: Path) -> None:
    stamps = Stamps(root)
    file = write_file(stamps.work / "file", b"old")
    with stamps.changes(stamps.work, mtime=False, ctime=False):
        with opened(file, os.O_WRONLY) as fd:
            os.write(fd, b"new")
        file.chmod(0o600)
        os.truncate(file, 1)


@case
def a_failed_operation_changes_no_time(root: Path) -> None:
    stamps = Stamps(root)
    (stamps.work / "dir").mkdir()
    write_file(stamps.work / "dir" / "file", b"x")
    unchanged = (stamps.work / "dir", stamps.work / "dir" / "file")
    with stamps.changes(*unchanged, mtime=False, ctime=False):
        for act in (lambda: os.mkdir(stamps.work / "dir" / "file"),
                    lambda: os.rmdir(stamps.work / "dir"),
                    lambda: os.rename(stamps.work / "dir" / "missing", stamps.work / "dir" / "new"),
                    lambda: os.unlink(stamps.work / "dir" / "missing")):
            try:
                act()
            except OSError:
                continue
            raise AssertionError("it succeeded")


@case
def utime_sets_nanoseconds(root: Path) -> None:
    stamps = Stamps(root)
    file = write_file(stamps.work / "file")
    (stamps.work / "dir").mkdir()
    for path in (file, stamps.work / "dir"):
        for atime_ns, mtime_ns in (
            (1_234_567_890_123_456_789, 987_654_321_987_654_321), (10**9, 2 * 10**9 - 1),
        ):
            os.utime(path, ns=(atime_ns, mtime_ns))
            assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (atime_ns, mtime_ns)


@case
def times_after_2038_are_kept(root: Path) -> None:
    file = write_file(root / "file")
    late_ns = (1 << 31) * 10**9 + 5, ((1 << 32) - 1) * 10**9 + 7
    os.utime(file, ns=late_ns)
    assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == late_ns


@case
def a_time_within_the_first_second_is_kept(root: Path) -> None:
    file = write_file(root / "file")
    os.utime(file, ns=(0, 1))
    assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (0, 1)


@case
def utime_omit_leaves_a_time_alone(root: Path) -> None:
    stamps = Stamps(root)
    file = write_file(stamps.work / "file")
    os.utime(file, ns=(10**18 + 1, 10**18 + 2))
    utimensat(file, (5, 6), (0, UTIME_OMIT))
    assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (5 * 10**9 + 6, 10**18 + 2)
    utimensat(file, (0, UTIME_OMIT), (7, 8))
    assert (file.stat().st_atime_ns, file.stat().st_mtime_ns) == (5 * 10**9 + 6, 7 * 10**9 + 8)
    with stamps.changes(file, mtime=False, ctime=False):
        utimensat(file, (0, UTIME_OMIT), (0, UTIME_OMIT))


@case
def utime_now_is_the_present(root: Path) -> None:
    stamps = Stamps(root)
    file = write_file(stamps.work / "file")
    before_ns = file.stat().st_mtime_ns
    os.utime(file, ns=(1, 1))
    stamps.wait_for_tick()
    utimensat(file, (3, 4), (0, UTIME_NOW))
    assert file.stat().st_atime_ns == 3 * 10**9 + 4
    assert file.stat().st_mtime_ns > before_ns
    utimensat(file, (0, UTIME_NOW), (0, UTIME_OMIT))
    assert file.stat().st_atime_ns > before_ns


@case
def setting_times_moves_ctime_forward(root: Path) -> None:
    stamps = Stamps(root)
    file = write_file(stamps.work / "file")
    before = file.stat()
    stamps.wait_for_tick()
    os.utime(file, ns=(1, 1))
    assert file.stat().st_ctime_ns > before.st_ctime_ns


@case
def a_time_set_after_writing_is_kept(root: Path) -> None:
    """Copying tools write, set the time and close: a later write-back must not move it."""
    stamps = Stamps(root)
    file = stamps.work / "file"
    stamp_ns = 1_500_000_000_123_456_789
    with opened(file, os.O_CREAT | os.O_WRONLY) as fd:
        for _ in range(3):
            os.write(fd, b"x" * 100_000)
        os.utime(fd, ns=(stamp_ns, stamp_ns))
        assert os.fstat(fd).st_mtime_ns == stamp_ns
    assert file.stat().st_mtime_ns == stamp_ns
    with opened(file, os.O_RDONLY) as fd:
        os.fsync(fd)
        assert os.fstat(fd).st_mtime_ns == stamp_ns
    assert file.stat().st_mtime_ns == stamp_ns


@case
def times_of_a_symlink_are_its_own(root: Path) -> None:
    stamps = Stamps(root)
    file = write_file(stamps.work / "file")
    before_ns = file.stat().st_mtime_ns
    (stamps.work / "link").symlink_to("file")
    os.utime(stamps.work / "link", ns=(10**18, 10**18), follow_symlinks=False)
    assert (stamps.work / "link").lstat().st_mtime_ns == 10**18
    assert file.stat().st_mtime_ns == before_ns
