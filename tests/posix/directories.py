"""Directories: making, removing and, above all, reading them while they change."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections import Counter
from pathlib import Path

from tests.posix.registry import case, slow_case
from tests.posix.tools import (
    LARGE_DIRECTORY_ENTRIES,
    DirectoryStream,
    all_getdents,
    fails_with,
    getdents,
    in_processes,
    opened,
    seeded_random,
    write_file,
)

_TYPES = {stat.S_IFREG: 8, stat.S_IFDIR: 4, stat.S_IFLNK: 10, stat.S_IFIFO: 1, stat.S_IFSOCK: 12}
_DT_UNKNOWN = 0


def fill(directory: Path, count: int) -> set[bytes]:
    names = {b"entry-%06d" % number for number in range(count)}
    with opened(directory, os.O_RDONLY) as fd:
        for name in names:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=fd))
    return names


@case
def mkdir_and_rmdir(root: Path) -> None:
    (root / "dir").mkdir()
    assert (root / "dir").is_dir()
    assert os.listdir(root / "dir") == []
    (root / "dir").rmdir()
    with fails_with(errno.ENOENT):
        os.stat(root / "dir")


@case
def mkdir_refuses_an_existing_name(root: Path) -> None:
    write_file(root / "file")
    (root / "dir").mkdir()
    (root / "dangling").symlink_to("nowhere")
    for name in ("file", "dir", "dangling", "."):
        with fails_with(errno.EEXIST):
            os.mkdir(root / name)
    with fails_with(errno.ENOENT):
        os.mkdir(root / "missing" / "dir")


@case
def rmdir_refuses_what_is_not_an_empty_directory(root: Path) -> None:
    write_file(root / "file")
    (root / "full").mkdir()
    write_file(root / "full" / "file")
    (root / "link").symlink_to("full")
    for name, number in (("file", errno.ENOTDIR), ("full", errno.ENOTEMPTY),
                         ("missing", errno.ENOENT), ("link", errno.ENOTDIR)):
        with fails_with(number):
            os.rmdir(root / name)
    with fails_with(errno.EINVAL):
        os.rmdir(f"{root}/full/.")
    with fails_with(errno.ENOTEMPTY):
        os.rmdir(f"{root}/full/..")
    assert sorted(os.listdir(root)) == ["file", "full", "link"]


@case
def unlink_refuses_a_directory(root: Path) -> None:
    (root / "dir").mkdir()
    with fails_with(errno.EISDIR, errno.EPERM):
        os.unlink(root / "dir")
    assert (root / "dir").is_dir()


@case
def reading_a_directory_as_a_file_is_eisdir(root: Path) -> None:
    with opened(root, os.O_RDONLY) as fd, fails_with(errno.EISDIR):
        os.read(fd, 10)


@case
def link_count_of_a_directory_counts_its_subdirectories(root: Path) -> None:
    before = root.stat().st_nlink
    for name in "abc":
        (root / name).mkdir()
    # Some file systems do not count and answer 1.
    assert root.stat().st_nlink in (before + 3, 1)
    (root / "a").rmdir()
    os.rename(root / "b", root / "c" / "b")
    assert root.stat().st_nlink in (before + 1, 1)
    assert (root / "c").stat().st_nlink in (3, 1)


@case
def a_listing_has_every_name_once_with_its_type_and_inode(root: Path) -> None:
    write_file(root / "file")
    (root / "dir").mkdir()
    (root / "link").symlink_to("file")
    os.mkfifo(root / "fifo")
    os.mknod(root / "socket", stat.S_IFSOCK | 0o600)
    entries = all_getdents(root)
    assert sorted(entry[0] for entry in entries) == [
        b".", b"..", b"dir", b"fifo", b"file", b"link", b"socket"]
    for name, inode, _, kind in entries:
        if name == b"..":
            continue
        found = (root / os.fsdecode(name)).lstat()
        assert inode == found.st_ino, name
        assert kind in (_TYPES[stat.S_IFMT(found.st_mode)], _DT_UNKNOWN), name


@case
def a_directory_emptied_and_filled_again_lists_the_new_names(root: Path) -> None:
    for turn in range(5):
        names = {f"turn-{turn}-{number}" for number in range(20)}
        for name in names:
            write_file(root / name)
        assert set(os.listdir(root)) == names
        for name in names:
            (root / name).unlink()
        assert os.listdir(root) == []


@case
def every_change_shows_in_the_next_listing(root: Path) -> None:
    expected: list[str] = []
    for number in range(60):
        new = f"name-{number}"
        if number % 3 == 2:
            (root / expected.pop()).unlink()
        elif number % 4 == 3:
            os.rename(root / expected.pop(0), root / new)
            expected.append(new)
        else:
            write_file(root / new)
            expected.append(new)
        assert sorted(os.listdir(root)) == sorted(expected)


@case
def long_names_fill_many_buffers(root: Path) -> None:
    names = {f"{number:04d}".ljust(255, "x") for number in range(300)}
    for name in names:
        write_file(root / name)
    for buffer_bytes in (300, 4096, 65536):
        found = [os.fsdecode(entry[0]) for entry in all_getdents(root, buffer_bytes)]
        assert sorted(found) == sorted({*names, ".", ".."}), buffer_bytes


@case
def a_large_directory_lists_every_name_once(root: Path) -> None:
    _check_large_directory(root, LARGE_DIRECTORY_ENTRIES)


@slow_case
def a_directory_of_100000_lists_every_name_once(root: Path) -> None:
    _check_large_directory(root, 100_000)


def _check_large_directory(root: Path, count: int) -> None:
    names = fill(root, count)
    listed = os.listdir(os.fsencode(root))
    assert len(listed) == count
    assert set(listed) == names
    inodes = {entry.inode() for entry in os.scandir(root)}
    assert len(inodes) == count
    assert os.stat(root / "entry-000007").st_size == 0
    with fails_with(errno.ENOENT):
        os.stat(root / f"entry-{count:06d}")
    for name in names:
        os.unlink(os.fsencode(root) + b"/" + name)
    assert os.listdir(root) == []


@case
def names_that_nobody_touches_are_seen_exactly_once_while_others_change(root: Path) -> None:
    rng = seeded_random()
    kept = fill(root, 1500)
    base = os.fsencode(root) + b"/"
    seen: list[bytes] = []
    extra: set[bytes] = set()
    with opened(root, os.O_RDONLY) as fd:
        serial = 0
        while batch := getdents(fd, 1024):
            seen += [entry[0] for entry in batch]
            for _ in range(10):
                if extra and rng.random() < 0.5:
                    victim = extra.pop()
                    os.unlink(base + victim)
                else:
                    serial += 1
                    name = b"%x-extra-%d" % (rng.randrange(1 << 30), serial)
                    write_file(Path(os.fsdecode(base + name)))
                    extra.add(name)
    times_seen = Counter(seen)
    assert {name for name in kept if not times_seen[name]} == set(), "not seen"
    assert {name for name in kept if times_seen[name] > 1} == set(), "seen again"
    assert set(os.listdir(base)) == kept | extra


@case
def a_position_returns_to_the_same_name(root: Path) -> None:
    fill(root, 500)
    with DirectoryStream(root) as stream:
        positions = []
        while True:
            position = stream.tell()
            name = stream.read()
            if name is None:
                break
            positions.append((position, name))
        assert len(positions) == 502
        rng = seeded_random()
        for position, name in rng.sample(positions, 60):
            stream.seek(position)
            assert stream.read() == name


@case
def a_position_stays_valid_while_other_names_come_and_go(root: Path) -> None:
    kept = fill(root, 800)
    with DirectoryStream(root) as stream:
        first_half = [stream.read() for _ in range(400)]
        position = stream.tell()
        for number in range(200):
            write_file(root / f"new-{number}")
        for name in first_half[:100]:
            if name not in (b".", b".."):
                os.unlink(os.fsencode(root) + b"/" + name)  # type: ignore[operator]
        stream.seek(position)
        second_half = stream.rest()
    untouched = kept - set(first_half)
    assert [second_half.count(name) for name in untouched] == [1] * len(untouched)
    assert not set(second_half) & {n for n in first_half if n in kept}


@case
def rewinding_shows_new_names(root: Path) -> None:
    write_file(root / "first")
    with DirectoryStream(root) as stream:
        assert sorted(stream.rest()) == [b".", b"..", b"first"]  # type: ignore[type-var]
        write_file(root / "second")
        (root / "first").unlink()
        stream.rewind()
        assert sorted(stream.rest()) == [b".", b"..", b"second"]  # type: ignore[type-var]


@case
def entries_removed_while_reading_leave_nothing_behind(root: Path) -> None:
    """What rm -r does: read some names, remove them, read on from there."""
    count = 2000
    fill(root, count)
    removed = 0
    with opened(root, os.O_RDONLY) as fd:
        while batch := getdents(fd, 2048):
            for name, *_ in batch:
                if name not in (b".", b".."):
                    os.unlink(name, dir_fd=fd)
                    removed += 1
    assert removed == count
    assert os.listdir(root) == []


@case
def a_removed_directory_that_is_still_open_is_empty(root: Path) -> None:
    (root / "dir").mkdir()
    with opened(root / "dir", os.O_RDONLY) as fd:
        (root / "dir").rmdir()
        with fails_with(errno.ENOENT):
            os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        with fails_with(errno.ENOENT):
            os.mkdir("below", dir_fd=fd)
        try:
            names = os.listdir(fd)
        except FileNotFoundError:
            names = []
        assert names == []


@case
def only_one_of_several_makers_of_a_directory_wins(root: Path) -> None:
    def contend() -> int:
        won = 0
        for number in range(40):
            try:
                (root / str(number)).mkdir()
                won += 1
            except FileExistsError:
                pass
        return won

    assert sum(map(int, in_processes(contend, contend, contend))) == 40  # type: ignore[call-overload]


@case
def several_processes_fill_and_empty_one_directory(root: Path) -> None:
    def work(worker: int) -> None:
        for number in range(100):
            write_file(root / f"{worker}-{number}", b"%d" % number)
            if number % 2:
                (root / f"{worker}-{number}").unlink()

    in_processes(*(lambda worker=worker: work(worker) for worker in range(4)))
    wanted = {f"{worker}-{number}" for worker in range(4) for number in range(0, 100, 2)}
    assert set(os.listdir(root)) == wanted
    for name in wanted:
        assert (root / name).read_text() == name.partition("-")[2]


@case
def a_tree_is_built_walked_and_removed(root: Path) -> None:
    wanted = {}
    for top in range(6):
        for middle in range(5):
            directory = root / f"top-{top}" / f"middle-{middle}"
            directory.mkdir(parents=True)
            for leaf in range(4):
                data = f"{top}.{middle}.{leaf}".encode() * (1 + leaf * 300)
                write_file(directory / f"leaf-{leaf}", data)
                wanted[directory / f"leaf-{leaf}"] = data
    found = {Path(parent) / name for parent, _, names in os.walk(root) for name in names}
    assert found == set(wanted)
    for path, data in wanted.items():
        assert path.read_bytes() == data
    shutil.copytree(root / "top-0", root / "copy")
    assert (root / "copy" / "middle-4" / "leaf-3").read_bytes() == wanted[
        root / "top-0" / "middle-4" / "leaf-3"]
    for entry in os.listdir(root):
        shutil.rmtree(root / entry)
    assert os.listdir(root) == []
