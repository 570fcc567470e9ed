"""Memory-mapped files."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from tests.posix.registry import case
from tests.posix.tools import in_processes, opened, pattern, write_file


@case
def a_shared_mapping_writes_the_file(root: Path) -> None:
    data = pattern(300_000)
    file = write_file(root / "file", data)
    with opened(file, os.O_RDWR) as fd, mmap.mmap(fd, len(data)) as mapping:
        assert mapping[:] == data
        mapping[4090:4100] = b"0123456789"
        mapping.flush()
        assert os.pread(fd, 10, 4090) == b"0123456789"
    assert file.read_bytes() == data[:4090] + b"0123456789" + data[4100:]


@case
def what_a_mapping_wrote_is_kept_after_it_is_gone(root: Path) -> None:
    file = write_file(root / "file", bytes(2_000_000))
    with opened(file, os.O_RDWR) as fd, mmap.mmap(fd, 2_000_000) as mapping:
        for offset in range(0, 2_000_000, 99_991):
            mapping[offset:offset + 3] = b"abc"
    wanted = bytearray(2_000_000)
    for offset in range(0, 2_000_000, 99_991):
        wanted[offset:offset + 3] = b"abc"
    assert file.read_bytes() == wanted


@case
def a_private_mapping_leaves_the_file_alone(root: Path) -> None:
    file = write_file(root / "file", b"x" * 10_000)
    with opened(file, os.O_RDWR) as fd, mmap.mmap(fd, 10_000, mmap.MAP_PRIVATE) as mapping:
        mapping[0:3] = b"abc"
        mapping.flush()
        assert mapping[0:4] == b"abcx"
    assert file.read_bytes() == b"x" * 10_000


@case
def a_mapping_sees_later_writes(root: Path) -> None:
    with opened(write_file(root / "file", bytes(20_000)), os.O_RDWR) as fd, \
            mmap.mmap(fd, 20_000, prot=mmap.PROT_READ) as mapping:
        for number in range(10):
            os.pwrite(fd, b"%03d" % number, number * 1500)
            assert mapping[number * 1500:number * 1500 + 3] == b"%03d" % number


@case
def two_processes_share_a_mapping(root: Path) -> None:
    file = write_file(root / "file", bytes(8192))

    def write() -> None:
        with opened(file, os.O_RDWR) as fd, mmap.mmap(fd, 8192) as mapping:
            mapping[5000:5005] = b"hello"
            mapping.flush()

    with opened(file, os.O_RDWR) as fd, mmap.mmap(fd, 8192) as mapping:
        in_processes(write)
        assert mapping[5000:5005] == b"hello"


@case
def the_tail_of_the_last_page_reads_as_zeros_and_is_not_written(root: Path) -> None:
    file = write_file(root / "file", b"x" * 100)
    with opened(file, os.O_RDWR) as fd, mmap.mmap(fd, 100) as mapping:
        mapping[99:100] = b"y"
        mapping.flush()
    assert file.stat().st_size == 100
    os.truncate(file, 5000)
    assert file.read_bytes() == b"x" * 99 + b"y" + bytes(4900)


@case
def a_file_that_grew_can_be_mapped_in_its_new_size(root: Path) -> None:
    with opened(write_file(root / "file", b"a" * 4096), os.O_RDWR) as fd:
        with mmap.mmap(fd, 4096) as mapping:
            assert mapping[4095:4096] == b"a"
        os.pwrite(fd, b"b" * 4096, 4096)
        with mmap.mmap(fd, 8192) as mapping:
            assert mapping[4090:4100] == b"a" * 6 + b"b" * 4
            mapping[8191:8192] = b"c"
    assert (root / "file").read_bytes() == b"a" * 4096 + b"b" * 4095 + b"c"
