"""Files that are removed while someone still has them open."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

from tests.posix.registry import case
from tests.posix.tools import fails_with, in_processes, opened, pattern, write_file


@case
def unlink_removes_a_name(root: Path) -> None:
    write_file(root / "file")
    (root / "file").unlink()
    with fails_with(errno.ENOENT):
        os.stat(root / "file")
    with fails_with(errno.ENOENT):
        os.unlink(root / "file")
    assert os.listdir(root) == []


@case
def an_unlinked_open_file_can_be_read_and_written(root: Path) -> None:
    data = pattern(200_000)
    with opened(write_file(root / "file", data), os.O_RDWR) as fd:
        (root / "file").unlink()
        assert os.pread(fd, 200_000, 0) == data
        os.pwrite(fd, b"changed", 100_000)
        os.pwrite(fd, b"beyond", 300_000)
        assert os.pread(fd, 7, 100_000) == b"changed"
        assert os.pread(fd, 6, 300_000) == b"beyond"
        assert os.pread(fd, 10, 250_000) == bytes(10)
        os.ftruncate(fd, 10)
        assert os.fstat(fd).st_size == 10
        os.fsync(fd)
        assert os.pread(fd, 100, 0) == data[:10]


@case
def an_unlinked_open_file_has_no_links(root: Path) -> None:
    with opened(write_file(root / "file"), os.O_RDWR) as fd:
        (root / "file").unlink()
        assert os.fstat(fd).st_nlink == 0


@case
def a_file_made_and_unlinked_at_once_is_scratch_space(root: Path) -> None:
    data = pattern(2_500_000)
    with opened(root / "scratch", os.O_CREAT | os.O_EXCL | os.O_RDWR) as fd:
        (root / "scratch").unlink()
        assert os.write(fd, data) == len(data)
        assert os.pread(fd, len(data), 0) == data


@case
def a_name_used_again_is_another_file(root: Path) -> None:
    descriptors = []
    try:
        for number in range(10):
            fd = os.open(root / "name", os.O_CREAT | os.O_EXCL | os.O_RDWR)
            descriptors.append(fd)
            os.write(fd, b"file %d" % number)
            (root / "name").unlink()
        for number, fd in enumerate(descriptors):
            assert os.pread(fd, 100, 0) == b"file %d" % number
        assert len({os.fstat(fd).st_ino for fd in descriptors}) == 10
    finally:
        for fd in descriptors:
            os.close(fd)


@case
def a_file_replaced_by_rename_stays_readable_and_writable_while_open(root: Path) -> None:
    with opened(write_file(root / "file", b"old content"), os.O_RDWR) as fd:
        os.rename(write_file(root / "new", b"new"), root / "file")
        os.pwrite(fd, b"OLD", 0)
        assert os.pread(fd, 100, 0) == b"OLD content"
        assert (root / "file").read_bytes() == b"new"


@case
def a_mapping_outlives_the_name_and_the_descriptor(root: Path) -> None:
    data = pattern(20_000)
    with opened(write_file(root / "file", data), os.O_RDWR) as fd:
        mapping = mmap.mmap(fd, 20_000)
    (root / "file").unlink()
    with mapping:
        assert mapping[:] == data
        mapping[100:103] = b"new"
        mapping.flush()
        assert mapping[99:104] == data[99:100] + b"new" + data[103:104]


@case
def another_process_keeps_a_file_open_that_this_one_removes(root: Path) -> None:
    write_file(root / "file", b"content")
    os.mkfifo(root / "opened")
    os.mkfifo(root / "removed")

    def hold() -> bytes:
        with opened(root / "file", os.O_RDONLY) as fd:
            (root / "opened").write_bytes(b"")
            (root / "removed").read_bytes()
            return os.read(fd, 100)

    def remove() -> None:
        (root / "opened").read_bytes()
        (root / "file").unlink()
        assert not (root / "file").exists()
        (root / "removed").write_bytes(b"")

    assert in_processes(hold, remove)[0] == b"content"


@case
def a_directory_can_go_once_its_open_files_are_unlinked(root: Path) -> None:
    (root / "dir").mkdir()
    with opened(root / "dir" / "file", os.O_CREAT | os.O_RDWR) as fd:
        (root / "dir" / "file").unlink()
        (root / "dir").rmdir()
        os.write(fd, b"still here")
        assert os.pread(fd, 100, 0) == b"still here"
    assert os.listdir(root) == []
