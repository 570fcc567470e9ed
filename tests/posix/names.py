"""Looking names up: which names exist, what the errors are, what `.` and `..` mean."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from tests.posix.registry import case
from tests.posix.tools import fails_with, opened, write_file


@case
def a_missing_name_is_enoent(root: Path) -> None:
    with fails_with(errno.ENOENT):
        os.stat(root / "missing")
    with fails_with(errno.ENOENT):
        os.stat(root / "missing" / "below")
    with fails_with(errno.ENOENT):
        os.open(root / "missing", os.O_RDWR)


@case
def the_empty_path_is_enoent(root: Path) -> None:
    with fails_with(errno.ENOENT):
        os.stat("")


@case
def a_file_is_not_a_directory_on_the_way(root: Path) -> None:
    file = write_file(root / "file")
    for act in (os.stat, os.unlink, os.rmdir, os.mkdir, os.readlink, os.listdir):
        with fails_with(errno.ENOTDIR):
            act(file / "below")
    with fails_with(errno.ENOTDIR):
        os.open(file / "below", os.O_CREAT | os.O_WRONLY)


@case
def a_trailing_slash_asks_for_a_directory(root: Path) -> None:
    write_file(root / "file")
    with fails_with(errno.ENOTDIR):
        os.stat(f"{root}/file/")
    (root / "dir").mkdir()
    assert os.stat(f"{root}/dir/").st_ino == os.stat(root / "dir").st_ino


@case
def dot_and_dotdot_name_the_directory_and_its_parent(root: Path) -> None:
    (root / "a" / "b").mkdir(parents=True)
    here = (root / "a").stat().st_ino
    assert os.stat(f"{root}/a/.").st_ino == here
    assert os.stat(f"{root}/a/b/..").st_ino == here
    assert os.stat(f"{root}/a/b/../b/./..").st_ino == here


@case
def dotdot_of_a_moved_directory_is_its_new_parent(root: Path) -> None:
    for name in ("old", "new", "old/moved"):
        (root / name).mkdir()
    with opened(root / "old" / "moved", os.O_RDONLY) as fd:
        assert os.stat("..", dir_fd=fd).st_ino == (root / "old").stat().st_ino
        os.rename(root / "old" / "moved", root / "new" / "moved")
        assert os.stat("..", dir_fd=fd).st_ino == (root / "new").stat().st_ino
    assert os.stat(f"{root}/new/moved/..").st_ino == (root / "new").stat().st_ino


@case
def names_relative_to_an_open_directory_follow_it_when_it_moves(root: Path) -> None:
    (root / "before").mkdir()
    write_file(root / "before" / "file", b"content")
    with opened(root / "before", os.O_RDONLY) as fd:
        os.rename(root / "before", root / "after")
        with opened_at("file", fd) as file:
            assert os.read(file, 100) == b"content"
        os.mkdir("made", dir_fd=fd)
    assert (root / "after" / "made").is_dir()


def opened_at(name: str, directory_fd: int):  # type: ignore[no-untyped-def]
    return opened(f"/proc/self/fd/{directory_fd}/{name}", os.O_RDONLY)


@case
def a_name_may_have_255_bytes(root: Path) -> None:
    name = "n" * 255
    write_file(root / name, b"x")
    assert os.listdir(root) == [name]
    os.rename(root / name, root / ("m" * 255))
    os.mkdir(root / ("d" * 255))
    os.symlink("target", root / ("s" * 255))
    os.link(root / ("m" * 255), root / ("l" * 255))
    assert sorted(os.listdir(root)) == [letter * 255 for letter in "dlms"]


@case
def a_name_of_256_bytes_is_too_long(root: Path) -> None:
    name, file = root / ("n" * 256), write_file(root / "file")
    for act in (os.stat, os.unlink, os.rmdir, os.mkdir, os.mkfifo):
        with fails_with(errno.ENAMETOOLONG):
            act(name)
    with fails_with(errno.ENAMETOOLONG):
        os.open(name, os.O_CREAT | os.O_WRONLY)
    for act2 in (os.rename, os.link, os.symlink):
        with fails_with(errno.ENAMETOOLONG):
            act2(file, name)
    assert os.listdir(root) == ["file"]


@case
def names_are_any_bytes_but_slash_and_nul(root: Path) -> None:
    base = os.fsencode(root)
    names = [bytes([byte]) + b"x" for byte in range(1, 256) if byte != ord("/")]
    names += [b"\xff" * 255, b"\xc3(", b" ", b"...", b"-rf", b"a\nb", b"\xed\xa0\x80"]
    for number, name in enumerate(names):
        with opened(base + b"/" + name, os.O_CREAT | os.O_EXCL | os.O_WRONLY) as fd:
            os.write(fd, b"%d" % number)
    assert sorted(os.listdir(base)) == sorted(names)
    for number, name in enumerate(names):
        with opened(base + b"/" + name, os.O_RDONLY) as fd:
            assert os.read(fd, 10) == b"%d" % number, name


@case
def names_that_differ_in_case_or_normal_form_are_different(root: Path) -> None:
    names = ["Name", "name", "NAME", "caf\u00e9", "cafe\u0301"]
    for name in names:
        write_file(root / name, name.encode())
    assert sorted(os.listdir(root)) == sorted(names)
    for name in names:
        assert (root / name).read_bytes() == name.encode()


@case
def a_name_found_missing_is_found_once_it_is_made(root: Path) -> None:
    for number, make in enumerate((
        lambda p: write_file(p), os.mkdir, os.mkfifo, lambda p: os.symlink("target", p),
        lambda p: os.link(write_file(root / "for-link"), p),
        lambda p: os.rename(write_file(root / "for-rename"), p),
    )):
        path = root / f"name-{number}"
        for _ in range(2):
            with fails_with(errno.ENOENT):
                os.lstat(path)
        make(path)
        os.lstat(path)


@case
def a_name_that_becomes_another_kind_of_file_is_seen_as_that(root: Path) -> None:
    path = root / "name"
    for _ in range(5):
        write_file(path, b"x")
        assert path.is_file()
        path.unlink()
        path.mkdir()
        assert path.is_dir()
        path.rmdir()
        path.symlink_to("nowhere")
        assert path.is_symlink()
        path.unlink()


@case
def inode_numbers_are_unique_and_survive_a_rename(root: Path) -> None:
    inodes = {}
    for number in range(50):
        write_file(root / str(number))
        inodes[number] = (root / str(number)).stat().st_ino
    assert len(set(inodes.values())) == 50
    for number in range(50):
        os.rename(root / str(number), root / f"renamed-{number}")
    assert {n: (root / f"renamed-{n}").stat().st_ino for n in range(50)} == inodes


@case
def directories_nest_deeply(root: Path) -> None:
    path = root
    for level in range(100):
        path = path / f"level-{level}"
        path.mkdir()
    write_file(path / "leaf", b"deep")
    assert (path / "leaf").read_bytes() == b"deep"
    os.rename(root / "level-0", root / "moved")
    moved = root / "moved" / path.relative_to(root / "level-0") / "leaf"
    assert moved.read_bytes() == b"deep"


@case
def a_path_of_more_than_4095_bytes_is_too_long(root: Path) -> None:
    with fails_with(errno.ENAMETOOLONG):
        os.stat(f"{root}/" + "d/" * 2100)
