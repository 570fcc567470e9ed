"""Bytes of files: reads, writes, appends, holes, large offsets, durability calls."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import subprocess
from pathlib import Path

from tests.posix.registry import Skipped, case
from tests.posix.tools import (
    fails_with,
    in_processes,
    opened,
    pattern,
    seeded_random,
    write_file,
)

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


@case
def bytes_come_back_as_written(root: Path) -> None:
    for size in (0, 1, 4095, 4096, 4097, 65_536, MIB - 1, MIB, MIB + 1, 4 * MIB + 3):
        data = pattern(size, seed=size)
        assert write_file(root / "file", data).read_bytes() == data, size


@case
def writes_across_page_and_chunk_borders_change_only_their_bytes(root: Path) -> None:
    size = 9 * MIB
    model = bytearray(pattern(size))
    with opened(write_file(root / "file", bytes(model)), os.O_RDWR) as fd:
        for border in (4 * KIB, 64 * KIB, MIB, 4 * MIB, 8 * MIB):
            for start, length in ((border - 1, 1), (border, 1), (border - 1, 2),
                                  (border - 100, 200), (border - 5000, 10_000)):
                data = pattern(length, seed=start)
                os.pwrite(fd, data, max(start, 0))
                model[max(start, 0):max(start, 0) + length] = data
        assert os.pread(fd, size, 0)[:100] == model[:100]
    assert (root / "file").read_bytes() == model


@case
def a_file_of_16_mib_read_in_odd_pieces_is_whole(root: Path) -> None:
    data = pattern(16 * MIB)
    write_file(root / "file", data)
    for piece in (10_007, 128 * KIB, 3 * MIB + 1):
        digest = hashlib.sha256()
        with opened(root / "file", os.O_RDONLY) as fd:
            while got := os.read(fd, piece):
                digest.update(got)
        assert digest.digest() == hashlib.sha256(data).digest(), piece


@case
def reads_end_at_the_end_of_the_file(root: Path) -> None:
    with opened(write_file(root / "file", b"0123456789"), os.O_RDONLY) as fd:
        assert os.pread(fd, 100, 0) == b"0123456789"
        assert os.pread(fd, 100, 7) == b"789"
        assert os.pread(fd, 100, 10) == b""
        assert os.pread(fd, 100, 10**12) == b""


@case
def a_write_of_nothing_changes_nothing(root: Path) -> None:
    with opened(write_file(root / "file", b"kept"), os.O_RDWR) as fd:
        assert os.pwrite(fd, b"", 1000) == 0
        assert os.fstat(fd).st_size == 4


@case
def a_gap_reads_as_zeros(root: Path) -> None:
    with opened(root / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, b"head", 0)
        os.pwrite(fd, b"tail", 5 * MIB + 77)
        assert os.fstat(fd).st_size == 5 * MIB + 81
        data = b""
        while len(data) < 5 * MIB + 81:
            data += os.pread(fd, MIB, len(data))
        assert data == b"head" + bytes(5 * MIB + 73) + b"tail"


@case
def offsets_beyond_4_gib_are_kept_apart(root: Path) -> None:
    places = {0: b"zero", GIB: b"one gib", 2 * GIB - 2: b"2 gib", 4 * GIB - 3: b"4 gib",
              4 * GIB + 5: b"beyond", 5 * GIB: b"5 gib", TIB + 1: b"1 tib"}
    with opened(root / "file", os.O_CREAT | os.O_RDWR) as fd:
        for offset, data in places.items():
            os.pwrite(fd, data, offset)
        assert os.fstat(fd).st_size == TIB + 1 + 5
        os.fsync(fd)
    with opened(root / "file", os.O_RDONLY) as fd:
        for offset, data in places.items():
            assert os.pread(fd, len(data), offset) == data, offset
        assert os.pread(fd, 100, 3 * GIB) == bytes(100)
        assert os.lseek(fd, -5, os.SEEK_END) == TIB + 1
        assert os.read(fd, 100) == b"1 tib"
    os.truncate(root / "file", 4 * GIB + 8)
    assert (root / "file").stat().st_size == 4 * GIB + 8
    with opened(root / "file", os.O_RDONLY) as fd:
        assert os.pread(fd, 100, 4 * GIB) == b"ib" + bytes(3) + b"bey"


@case
def two_descriptors_of_one_file_see_each_others_writes(root: Path) -> None:
    file = write_file(root / "file", bytes(100_000))
    with opened(file, os.O_RDWR) as one, opened(file, os.O_RDWR) as two:
        for number in range(50):
            offset = number * 1999
            os.pwrite(one if number % 2 else two, b"%05d" % number, offset)
            assert os.pread(two if number % 2 else one, 5, offset) == b"%05d" % number


@case
def another_process_sees_a_write_at_once(root: Path) -> None:
    file = write_file(root / "file", bytes(1000))
    with opened(file, os.O_RDWR) as fd:
        for number in range(10):
            os.pwrite(fd, b"%05d" % number, 500)
            found = in_processes(lambda: file.read_bytes()[500:505])
            assert found == [b"%05d" % number]


@case
def appends_of_several_processes_are_all_there_and_whole(root: Path) -> None:
    records, size = 150, 300

    def append(worker: int) -> None:
        with opened(root / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT) as fd:
            for number in range(records):
                record = b"%d:%d:" % (worker, number)
                assert os.write(fd, record.ljust(size - 1, b".") + b"\n") == size

    in_processes(*(lambda worker=worker: append(worker) for worker in range(4)))
    lines = (root / "log").read_bytes().splitlines()
    assert len(lines) == 4 * records
    assert {len(line) for line in lines} == {size - 1}
    found = [tuple(map(int, line.split(b":")[:2])) for line in lines]
    assert sorted(found) == [(w, n) for w in range(4) for n in range(records)]
    for worker in range(4):
        assert [n for w, n in found if w == worker] == list(range(records))


@case
def an_append_goes_to_the_end_wherever_the_position_is(root: Path) -> None:
    with opened(write_file(root / "file", b"start"), os.O_RDWR | os.O_APPEND) as fd:
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b" one")
        os.truncate(root / "file", 3)
        os.write(fd, b" two")
    assert (root / "file").read_bytes() == b"sta two"


@case
def the_end_moves_with_another_descriptors_writes(root: Path) -> None:
    file = write_file(root / "file")
    with opened(file, os.O_RDONLY) as reader, opened(file, os.O_WRONLY) as writer:
        for size in (10, 5000, 100_000):
            os.pwrite(writer, b"x", size - 1)
            assert os.lseek(reader, 0, os.SEEK_END) == size


@case
def data_and_holes_are_found_in_order(root: Path) -> None:
    with opened(root / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, b"x" * 4096, 8 * MIB)
        os.ftruncate(fd, 16 * MIB)
        data = os.lseek(fd, 0, os.SEEK_DATA)
        # A file system may call everything data, but must not call data a hole.
        assert 0 <= data <= 8 * MIB
        hole = os.lseek(fd, 8 * MIB, os.SEEK_HOLE)
        assert 8 * MIB + 4096 <= hole <= 16 * MIB
        with fails_with(errno.ENXIO):
            os.lseek(fd, 16 * MIB, os.SEEK_DATA)


@case
def vectored_calls_keep_their_order(root: Path) -> None:
    with opened(root / "file", os.O_CREAT | os.O_RDWR) as fd:
        assert os.writev(fd, [b"one", b"", b"two", b"x" * 10_000]) == 10_006
        assert os.pwritev(fd, [b"A", b"B"], 1) == 2
        first, second = bytearray(4), bytearray(4)
        assert os.preadv(fd, [first, second], 0) == 8
        assert bytes(first + second) == b"oABtwoxx"


@case
def a_descriptor_does_only_what_it_was_opened_for(root: Path) -> None:
    file = write_file(root / "file", b"kept")
    with opened(file, os.O_RDONLY) as fd, fails_with(errno.EBADF):
        os.write(fd, b"x")
    with opened(file, os.O_WRONLY) as fd, fails_with(errno.EBADF):
        os.read(fd, 1)
    assert file.read_bytes() == b"kept"


@case
def fsync_and_its_relatives_succeed(root: Path) -> None:
    data = pattern(300_000)
    with opened(root / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, data)
        os.fsync(fd)
        os.pwrite(fd, b"more", 300_000)
        os.fdatasync(fd)
        os.fsync(fd)
        assert os.pread(fd, 400_000, 0) == data + b"more"
    with opened(root, os.O_RDONLY) as directory:
        os.fsync(directory)


@case
def synchronous_writes_come_back_as_written(root: Path) -> None:
    for flag in (os.O_SYNC, os.O_DSYNC):
        with opened(root / f"file-{flag}", os.O_CREAT | os.O_RDWR | flag) as fd:
            for number in range(5):
                os.pwrite(fd, b"%d" % number * 5000, number * 5000)
            assert os.pread(fd, 25_000, 0) == b"".join(b"%d" % n * 5000 for n in range(5))


@case
def direct_io_agrees_with_cached_io(root: Path) -> None:
    data = pattern(64 * KIB)
    file = write_file(root / "file", data)
    try:
        fd = os.open(file, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        raise Skipped(f"O_DIRECT: {error}") from error
    try:
        with mmap.mmap(-1, 64 * KIB) as aligned:
            assert os.preadv(fd, [aligned], 0) == 64 * KIB
            assert aligned[:] == data
            aligned[:] = data[::-1]
            assert os.pwritev(fd, [aligned], 64 * KIB) == 64 * KIB
    finally:
        os.close(fd)
    assert file.read_bytes() == data + data[::-1]


@case
def kernel_copies_are_true(root: Path) -> None:
    data = pattern(1_300_000)
    source = write_file(root / "source", data)
    with opened(source, os.O_RDONLY) as fd, opened(root / "sent", os.O_CREAT | os.O_WRONLY) as to:
        sent = 0
        while count := os.sendfile(to, fd, sent, len(data)):
            sent += count
    assert (root / "sent").read_bytes() == data
    with opened(source, os.O_RDONLY) as fd, \
            opened(root / "copied", os.O_CREAT | os.O_WRONLY) as to:
        while os.copy_file_range(fd, to, MIB):
            pass
    assert (root / "copied").read_bytes() == data


@case
def posix_fallocate_extends_the_file_with_zeros(root: Path) -> None:
    with opened(write_file(root / "file", b"head"), os.O_RDWR) as fd:
        os.posix_fallocate(fd, 0, 100_000)
        assert os.fstat(fd).st_size == 100_000
        assert os.pread(fd, 100_000, 0) == b"head" + bytes(99_996)


@case
def a_descriptor_opened_before_chmod_still_writes(root: Path) -> None:
    with opened(root / "file", os.O_CREAT | os.O_WRONLY, 0o600) as fd:
        os.fchmod(fd, 0o400)
        os.write(fd, b"written")
        os.fsync(fd)
    assert (root / "file").read_bytes() == b"written"


@case
def a_program_can_be_run(root: Path) -> None:
    program = write_file(root / "program", b"#!/bin/sh\necho it runs with $1\n")
    program.chmod(0o755)
    done = subprocess.run([program, "this"], capture_output=True, check=True)
    assert done.stdout == b"it runs with this\n"


@case
def several_processes_write_their_own_parts_of_one_file(root: Path) -> None:
    file = write_file(root / "file", bytes(4 * 100_000))

    def work(worker: int) -> None:
        # Interleaved: neighbours share every page.
        with opened(file, os.O_RDWR) as fd:
            for number in range(250):
                offset = (number * 4 + worker) * 400
                os.pwrite(fd, bytes([65 + worker]) * 400, offset)

    in_processes(*(lambda worker=worker: work(worker) for worker in range(4)))
    assert file.read_bytes() == b"".join(
        bytes([65 + worker]) * 400 for _ in range(250) for worker in range(4))


@case
def small_writes_in_random_order_make_the_whole_file(root: Path) -> None:
    rng = seeded_random()
    data = pattern(700_000)
    pieces = list(range(0, len(data), 3777))
    rng.shuffle(pieces)
    with opened(root / "file", os.O_CREAT | os.O_WRONLY) as fd:
        for start in pieces:
            os.pwrite(fd, data[start:start + 3777], start)
    assert (root / "file").read_bytes() == data
