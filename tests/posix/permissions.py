"""Who may do what: permission bits, owners, groups, sticky directories."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

from tests.posix.registry import case
from tests.posix.tools import (
    GROUP,
    OTHER_GROUP,
    OTHER_USER,
    USER,
    as_user,
    fails_with,
    open_to_all,
    opened,
    write_file,
)


def owned(path: Path, mode: int, uid: int = OTHER_USER, gid: int = OTHER_GROUP) -> Path:
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


def may(path: Path, flags: int) -> bool:
    try:
        os.close(os.open(path, flags))
    except PermissionError:
        return False
    return True


@case
def the_first_class_that_fits_decides(root: Path) -> None:
    open_to_all(root)
    file = write_file(root / "file", b"content")
    for uid, gid, groups, mode, may_read, may_write in (
        (USER, GROUP, (), 0o004, True, False),
        (USER, GROUP, (), 0o002, False, True),
        (USER, GROUP, (), 0o770, False, False),
        (USER, OTHER_GROUP, (), 0o040, True, False),
        (USER, OTHER_GROUP, (), 0o006, False, False),
        (USER, GROUP, (OTHER_GROUP,), 0o060, True, True),
        (OTHER_USER, GROUP, (), 0o400, True, False),
        (OTHER_USER, GROUP, (), 0o066, False, False),
        (OTHER_USER, OTHER_GROUP, (), 0o200, False, True),
    ):
        owned(file, mode)
        found = as_user(uid, lambda: (may(file, os.O_RDONLY), may(file, os.O_WRONLY)),
                        gid=gid, groups=groups)
        assert found == (may_read, may_write), (uid, gid, groups, oct(mode))


@case
def root_may_read_and_write_anything(root: Path) -> None:
    open_to_all(root)
    file = owned(write_file(root / "file", b"content"), 0)
    assert file.read_bytes() == b"content"
    file.write_bytes(b"changed")
    assert file.read_bytes() == b"changed"


@case
def a_directory_without_search_permission_hides_its_files(root: Path) -> None:
    open_to_all(root)
    (root / "dir").mkdir()
    write_file(root / "dir" / "file")
    owned(root / "dir", 0o744)

    def look() -> None:
        assert os.listdir(root / "dir") == ["file"]
        for act in (os.stat, os.unlink, lambda p: os.open(p, os.O_RDONLY),
                    lambda p: os.open(p, os.O_CREAT | os.O_WRONLY)):
            with fails_with(errno.EACCES):
                act(root / "dir" / "file")

    as_user(USER, look)


@case
def a_directory_without_read_permission_lists_nothing_but_opens_files(root: Path) -> None:
    open_to_all(root)
    (root / "dir").mkdir()
    write_file(root / "dir" / "file", b"content", mode=0o644)
    owned(root / "dir", 0o711)

    def look() -> None:
        with fails_with(errno.EACCES):
            os.listdir(root / "dir")
        assert (root / "dir" / "file").read_bytes() == b"content"

    as_user(USER, look)


@case
def a_directory_without_write_permission_keeps_its_names(root: Path) -> None:
    open_to_all(root)
    (root / "dir" / "below").mkdir(parents=True)
    write_file(root / "dir" / "file")
    write_file(root / "mine")
    os.chown(root / "mine", USER, GROUP)
    owned(root / "dir", 0o755)

    def change() -> None:
        inside = root / "dir"
        for act in (
            lambda: os.open(inside / "new", os.O_CREAT | os.O_WRONLY),
            lambda: os.mkdir(inside / "new"), lambda: os.mkfifo(inside / "new"),
            lambda: os.symlink("x", inside / "new"),
            lambda: os.link(root / "mine", inside / "new"),
            lambda: os.unlink(inside / "file"), lambda: os.rmdir(inside / "below"),
            lambda: os.rename(inside / "file", inside / "new"),
            lambda: os.rename(inside / "file", root / "new"),
            lambda: os.rename(root / "mine", inside / "new"),
        ):
            with fails_with(errno.EACCES):
                act()

    as_user(USER, change)
    assert sorted(os.listdir(root / "dir")) == ["below", "file"]


@case
def only_the_owner_changes_the_mode(root: Path) -> None:
    open_to_all(root)
    file = owned(write_file(root / "file"), 0o666)

    def change() -> None:
        with fails_with(errno.EPERM):
            file.chmod(0o777)

    as_user(USER, change)
    as_user(OTHER_USER, lambda: file.chmod(0o600), gid=OTHER_GROUP)
    assert file.stat().st_mode & 0o7777 == 0o600


@case
def an_owner_gives_a_file_to_its_own_groups_only(root: Path) -> None:
    open_to_all(root)
    file = owned(write_file(root / "file"), 0o644, USER, GROUP)

    def change() -> None:
        with fails_with(errno.EPERM):
            os.chown(file, OTHER_USER, -1)
        with fails_with(errno.EPERM):
            os.chown(file, -1, 13999)
        os.chown(file, -1, OTHER_GROUP)

    as_user(USER, change, groups=(OTHER_GROUP,))
    assert file.stat().st_gid == OTHER_GROUP


@case
def explicit_times_are_for_the_owner_and_the_present_for_writers(root: Path) -> None:
    open_to_all(root)
    file = owned(write_file(root / "file"), 0o666)

    def change() -> None:
        with fails_with(errno.EPERM):
            os.utime(file, ns=(1, 1))
        os.utime(file)

    as_user(USER, change)
    file.chmod(0o644)

    def change_read_only() -> None:
        with fails_with(errno.EACCES):
            os.utime(file)

    as_user(USER, change_read_only)
    as_user(OTHER_USER, lambda: os.utime(file, ns=(10**18, 10**18)), gid=OTHER_GROUP)
    assert file.stat().st_mtime_ns == 10**18


@case
def truncation_needs_write_permission(root: Path) -> None:
    open_to_all(root)
    file = owned(write_file(root / "file", b"kept"), 0o644)

    def change() -> None:
        with fails_with(errno.EACCES):
            os.truncate(file, 0)
        with fails_with(errno.EACCES):
            os.open(file, os.O_RDONLY | os.O_TRUNC)

    as_user(USER, change)
    assert file.read_bytes() == b"kept"


@case
def in_a_sticky_directory_only_owners_remove_and_rename(root: Path) -> None:
    open_to_all(root)
    (root / "sticky").mkdir()
    for name in ("theirs", "mine", "other"):
        write_file(root / "sticky" / name)
    (root / "sticky" / "their-dir").mkdir()
    for name, uid in (("theirs", OTHER_USER), ("mine", USER), ("their-dir", OTHER_USER),
                      ("other", OTHER_USER)):
        os.chown(root / "sticky" / name, uid, GROUP)
    owned(root / "sticky", 0o1777, 0, 0)

    def change() -> None:
        sticky = root / "sticky"
        for act in (lambda: os.unlink(sticky / "theirs"),
                    lambda: os.rmdir(sticky / "their-dir"),
                    lambda: os.rename(sticky / "theirs", sticky / "new"),
                    lambda: os.rename(sticky / "theirs", root / "new"),
                    lambda: os.rename(sticky / "mine", sticky / "theirs")):
            with fails_with(errno.EPERM, errno.EACCES):
                act()
        os.rename(sticky / "mine", sticky / "renamed")
        os.unlink(sticky / "renamed")

    as_user(USER, change)
    os.chown(root / "sticky", USER, GROUP)
    as_user(USER, lambda: os.unlink(root / "sticky" / "other"))
    assert sorted(os.listdir(root / "sticky")) == ["their-dir", "theirs"]


@case
def access_agrees_with_what_is_allowed(root: Path) -> None:
    open_to_all(root)
    for mode in (0, 0o444, 0o222, 0o111, 0o754, 0o666):
        owned(write_file(root / f"{mode:o}"), mode)

    def ask() -> None:
        for mode in (0, 0o444, 0o222, 0o111, 0o754, 0o666):
            path = root / f"{mode:o}"
            assert os.access(path, os.R_OK) == bool(mode & 4)
            assert os.access(path, os.W_OK) == bool(mode & 2)
            assert os.access(path, os.X_OK) == bool(mode & 1)
            assert os.access(path, os.F_OK)

    as_user(USER, ask)
    assert os.access(root / "0", os.R_OK | os.W_OK)
    assert not os.access(root / "0", os.X_OK)
    assert os.access(root / "111", os.X_OK)


@case
def running_a_program_needs_execute_permission(root: Path) -> None:
    open_to_all(root)
    program = write_file(root / "program", b"#!/bin/sh\nexit 7\n")

    def run() -> int:
        return subprocess.run([program]).returncode

    program.chmod(0o666)
    for act in (run, lambda: as_user(USER, run)):
        with fails_with(errno.EACCES):
            act()
    program.chmod(0o755)
    assert as_user(USER, run) == 7
    program.chmod(0o700)
    with fails_with(errno.EACCES):
        as_user(USER, run)


@case
def an_ordinary_user_works_in_a_directory_of_its_own(root: Path) -> None:
    open_to_all(root)
    (root / "home").mkdir()
    owned(root / "home", 0o700, USER, GROUP)

    def work() -> None:
        home = root / "home"
        (home / "a" / "b").mkdir(parents=True)
        write_file(home / "a" / "file", b"x" * 5000, mode=0o600)
        os.rename(home / "a" / "file", home / "a" / "b" / "file")
        (home / "a" / "b" / "file").chmod(0o400)
        assert (home / "a" / "b" / "file").read_bytes() == b"x" * 5000
        with fails_with(errno.EACCES):
            os.open(home / "a" / "b" / "file", os.O_WRONLY)
        (home / "a" / "b" / "file").unlink()

    as_user(USER, work)

    def intrude() -> None:
        for act in (os.listdir, lambda p: os.stat(p / "a"), lambda p: os.mkdir(p / "x")):
            with fails_with(errno.EACCES):
                act(root / "home")

    as_user(OTHER_USER, intrude, gid=OTHER_GROUP)


@case
def permission_taken_away_is_missed_at_the_next_open(root: Path) -> None:
    open_to_all(root)
    file = owned(write_file(root / "file", b"secret"), 0o644)
    assert as_user(USER, lambda: file.read_bytes()) == b"secret"
    file.chmod(0o640)
    assert as_user(USER, lambda: may(file, os.O_RDONLY)) is False
    assert as_user(USER, lambda: may(file, os.O_RDONLY), groups=(OTHER_GROUP,)) is True
    with opened(file, os.O_RDONLY) as fd:
        assert os.read(fd, 10) == b"secret"
