"""Hard links and symbolic links."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from tests.posix.registry import case
from tests.posix.tools import fails_with, opened, write_file


@case
def a_link_is_another_name_of_the_same_file(root: Path) -> None:
    file = write_file(root / "file", b"content")
    os.link(file, root / "link")
    assert file.stat().st_ino == (root / "link").stat().st_ino
    assert file.stat().st_nlink == (root / "link").stat().st_nlink == 2
    (root / "link").write_bytes(b"changed")
    assert file.read_bytes() == b"changed"
    file.chmod(0o600)
    assert stat.S_IMODE((root / "link").stat().st_mode) == 0o600
    os.truncate(file, 3)
    assert (root / "link").stat().st_size == 3


@case
def removing_one_of_two_links_keeps_the_file(root: Path) -> None:
    file = write_file(root / "file", b"content")
    os.link(file, root / "link")
    file.unlink()
    assert (root / "link").read_bytes() == b"content"
    assert (root / "link").stat().st_nlink == 1


@case
def a_file_takes_many_links_in_several_directories(root: Path) -> None:
    file = write_file(root / "file")
    for number in range(150):
        directory = root / f"dir-{number % 5}"
        directory.mkdir(exist_ok=True)
        os.link(file, directory / str(number))
        assert file.stat().st_nlink == number + 2
    for number in range(150):
        (root / f"dir-{number % 5}" / str(number)).unlink()
        assert file.stat().st_nlink == 150 - number


@case
def link_refuses_existing_names_directories_and_missing_files(root: Path) -> None:
    file = write_file(root / "file")
    (root / "dir").mkdir()
    with fails_with(errno.EEXIST):
        os.link(file, root / "dir")
    with fails_with(errno.EEXIST):
        os.link(file, file)
    with fails_with(errno.EPERM):
        os.link(root / "dir", root / "new")
    with fails_with(errno.ENOENT):
        os.link(root / "missing", root / "new")
    with fails_with(errno.ENOENT):
        os.link(file, root / "missing" / "new")
    assert file.stat().st_nlink == 1


@case
def a_symlink_itself_can_have_two_names(root: Path) -> None:
    (root / "symlink").symlink_to("nowhere")
    os.link(root / "symlink", root / "other", follow_symlinks=False)
    assert os.readlink(root / "other") == "nowhere"
    assert (root / "symlink").lstat().st_nlink == 2


@case
def a_symlink_keeps_its_target_byte_for_byte(root: Path) -> None:
    base = os.fsencode(root)
    targets = [b"a", b"a//b/../c/", b"/absolute", b"\xff\xfe odd \n bytes", b"..", b" ",
               b"x" * 255, b"long/" * 400]
    for number, target in enumerate(targets):
        name = base + b"/link-%d" % number
        os.symlink(target, name)
        assert os.readlink(name) == target
        assert os.lstat(name).st_size == len(target)
        assert stat.S_ISLNK(os.lstat(name).st_mode)
        assert os.readlink(name) == target


@case
def a_symlinks_target_may_have_4095_bytes(root: Path) -> None:
    (root / "link").symlink_to("y" * 4095)
    assert os.readlink(root / "link") == "y" * 4095
    with fails_with(errno.ENAMETOOLONG):
        os.symlink("y" * 4096, root / "longer")


@case
def a_symlink_is_followed_anywhere_on_the_way(root: Path) -> None:
    (root / "real" / "below").mkdir(parents=True)
    write_file(root / "real" / "below" / "file", b"content")
    (root / "first").symlink_to("real")
    (root / "second").symlink_to(root / "first" / "below")
    assert (root / "first" / "below" / "file").read_bytes() == b"content"
    assert (root / "second" / "file").read_bytes() == b"content"
    assert (root / "second" / "file").resolve() == (root / "real/below/file").resolve()


@case
def a_dangling_symlink_exists_but_leads_nowhere(root: Path) -> None:
    (root / "link").symlink_to("nowhere")
    assert stat.S_ISLNK((root / "link").lstat().st_mode)
    with fails_with(errno.ENOENT):
        os.stat(root / "link")
    with fails_with(errno.ENOENT):
        os.open(root / "link", os.O_RDONLY)
    write_file(root / "nowhere", b"found")
    assert (root / "link").read_bytes() == b"found"


@case
def a_loop_of_symlinks_is_eloop(root: Path) -> None:
    (root / "one").symlink_to("two")
    (root / "two").symlink_to("one")
    for act in (os.stat, os.listdir, lambda p: os.open(p, os.O_RDONLY)):
        with fails_with(errno.ELOOP):
            act(root / "one")
    with fails_with(errno.ELOOP):
        os.stat(root / "one" / "below")


@case
def symlink_refuses_an_existing_name(root: Path) -> None:
    write_file(root / "file", b"kept")
    (root / "link").symlink_to("file")
    for name in ("file", "link"):
        with fails_with(errno.EEXIST):
            os.symlink("other", root / name)
    assert os.readlink(root / "link") == "file"
    with fails_with(errno.ENOENT):
        os.symlink("target", root / "missing" / "link")


@case
def readlink_refuses_what_is_no_symlink(root: Path) -> None:
    write_file(root / "file")
    for name in ("file", "."):
        with fails_with(errno.EINVAL):
            os.readlink(root / name)
    with fails_with(errno.ENOENT):
        os.readlink(root / "missing")


@case
def a_symlink_replaced_by_another_leads_to_the_new_target(root: Path) -> None:
    for number in range(10):
        write_file(root / f"target-{number}", b"%d" % number)
        (root / "new").symlink_to(f"target-{number}")
        os.rename(root / "new", root / "current")
        assert (root / "current").read_bytes() == b"%d" % number


@case
def unlink_removes_the_symlink_and_not_its_target(root: Path) -> None:
    write_file(root / "file")
    (root / "link").symlink_to("file")
    (root / "link").unlink()
    assert os.listdir(root) == ["file"]


@case
def a_link_to_an_open_file_outlives_its_first_name(root: Path) -> None:
    with opened(root / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.link(root / "file", root / "link")
        (root / "file").unlink()
        os.write(fd, b"written after")
    assert (root / "link").read_bytes() == b"written after"
