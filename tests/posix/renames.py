"""rename(2) and renameat2(2), alone and in storms."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

from tests.posix.registry import Skipped, case
from tests.posix.tools import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    Child,
    fails_with,
    in_processes,
    opened,
    renameat2,
    seeded_random,
    write_file,
)


@case
def a_renamed_file_keeps_its_inode_and_bytes(root: Path) -> None:
    file = write_file(root / "old", b"content")
    before = file.stat()
    os.rename(file, root / "new")
    after = (root / "new").stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns, after.st_mode) == (
        before.st_ino, before.st_size, before.st_mtime_ns, before.st_mode)
    assert (root / "new").read_bytes() == b"content"
    assert os.listdir(root) == ["new"]


@case
def rename_replaces_an_existing_file(root: Path) -> None:
    write_file(root / "new-content", b"new")
    write_file(root / "target", b"old")
    with opened(root / "target", os.O_RDONLY) as fd:
        os.rename(root / "new-content", root / "target")
        assert os.read(fd, 10) == b"old"
        assert os.stat(root / "target").st_ino != os.fstat(fd).st_ino
    assert (root / "target").read_bytes() == b"new"
    assert os.listdir(root) == ["target"]


@case
def rename_replaces_one_of_two_links(root: Path) -> None:
    write_file(root / "file", b"old")
    os.link(root / "file", root / "link")
    os.rename(write_file(root / "new", b"new"), root / "file")
    assert (root / "link").read_bytes() == b"old"
    assert (root / "link").stat().st_nlink == 1
    assert (root / "file").read_bytes() == b"new"


@case
def a_directory_replaces_only_an_empty_directory(root: Path) -> None:
    for name in ("source", "empty", "full"):
        (root / name).mkdir()
    write_file(root / "source" / "file")
    write_file(root / "full" / "file")
    with fails_with(errno.ENOTEMPTY, errno.EEXIST):
        os.rename(root / "source", root / "full")
    os.rename(root / "source", root / "empty")
    assert sorted(os.listdir(root)) == ["empty", "full"]
    assert os.listdir(root / "empty") == ["file"]


@case
def files_and_directories_do_not_replace_each_other(root: Path) -> None:
    write_file(root / "file")
    (root / "dir").mkdir()
    with fails_with(errno.EISDIR):
        os.rename(root / "file", root / "dir")
    with fails_with(errno.ENOTDIR):
        os.rename(root / "dir", root / "file")
    with fails_with(errno.ENOTDIR):
        os.rename(root / "file", root / "file" / "below")
    assert sorted(os.listdir(root)) == ["dir", "file"]


@case
def a_directory_cannot_move_below_itself(root: Path) -> None:
    (root / "dir" / "below" / "deep").mkdir(parents=True)
    for target in ("dir/new", "dir/below/new", "dir/below/deep/new"):
        with fails_with(errno.EINVAL):
            os.rename(root / "dir", root / target)
    with fails_with(errno.ENOTEMPTY, errno.EEXIST, errno.EINVAL):
        os.rename(root / "dir" / "below", root / "dir")
    assert (root / "dir" / "below" / "deep").is_dir()


@case
def rename_refuses_missing_names_and_dots(root: Path) -> None:
    (root / "dir").mkdir()
    with fails_with(errno.ENOENT):
        os.rename(root / "missing", root / "new")
    with fails_with(errno.ENOENT):
        os.rename(root / "dir", root / "missing" / "new")
    for dots in (".", ".."):
        with fails_with(errno.EBUSY, errno.EINVAL):
            os.rename(f"{root}/dir/{dots}", root / "new")
        with fails_with(errno.EBUSY, errno.EINVAL, errno.EEXIST, errno.ENOTEMPTY):
            os.rename(root / "dir", f"{root}/dir/{dots}")


@case
def renaming_a_file_to_itself_does_nothing(root: Path) -> None:
    write_file(root / "file", b"kept")
    os.rename(root / "file", root / "file")
    os.link(root / "file", root / "link")
    os.rename(root / "file", root / "link")
    assert sorted(os.listdir(root)) == ["file", "link"]
    assert (root / "file").stat().st_nlink == 2


@case
def a_directory_moves_between_parents_with_all_below_it(root: Path) -> None:
    (root / "from" / "tree" / "deep").mkdir(parents=True)
    (root / "to").mkdir()
    write_file(root / "from" / "tree" / "deep" / "file", b"content")
    os.rename(root / "from" / "tree", root / "to" / "moved")
    assert (root / "to" / "moved" / "deep" / "file").read_bytes() == b"content"
    assert os.listdir(root / "from") == []
    with fails_with(errno.ENOENT):
        os.stat(root / "from" / "tree" / "deep" / "file")


@case
def a_working_directory_can_be_moved(root: Path) -> None:
    (root / "from").mkdir()
    (root / "to").mkdir()

    def work() -> str:
        os.chdir(root / "from")
        os.rename(root / "from", root / "to" / "moved")
        write_file(Path("made-here"))
        return os.getcwd()

    child = Child(work)
    assert child.result() == str(root / "to" / "moved")
    assert os.listdir(root / "to" / "moved") == ["made-here"]


@case
def an_open_file_follows_its_new_name(root: Path) -> None:
    with opened(root / "old", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"before ")
        os.rename(root / "old", root / "new")
        os.write(fd, b"after")
        assert os.pread(fd, 100, 0) == b"before after"
        assert os.fstat(fd).st_ino == (root / "new").stat().st_ino
    assert (root / "new").read_bytes() == b"before after"


@case
def rename_moves_a_symlink_and_not_its_target(root: Path) -> None:
    write_file(root / "file", b"content")
    (root / "link").symlink_to("file")
    os.rename(root / "link", root / "moved")
    assert os.readlink(root / "moved") == "file"
    os.rename(root / "file", root / "moved")
    assert (root / "moved").read_bytes() == b"content"
    assert not (root / "moved").is_symlink()


@case
def noreplace_refuses_an_existing_name(root: Path) -> None:
    write_file(root / "source", b"source")
    write_file(root / "target", b"target")
    (root / "dir").mkdir()
    for name in ("target", "dir"):
        with fails_with(errno.EEXIST):
            _rename_with(root / "source", root / name, RENAME_NOREPLACE)
    assert (root / "target").read_bytes() == b"target"
    _rename_with(root / "source", root / "new", RENAME_NOREPLACE)
    assert (root / "new").read_bytes() == b"source"
    assert sorted(os.listdir(root)) == ["dir", "new", "target"]


@case
def exchange_swaps_two_names(root: Path) -> None:
    write_file(root / "a", b"a")
    write_file(root / "b", b"b")
    (root / "dir").mkdir()
    write_file(root / "dir" / "below", b"below")
    inodes = {name: (root / name).stat().st_ino for name in ("a", "b", "dir")}
    _rename_with(root / "a", root / "b", RENAME_EXCHANGE)
    assert (root / "a").read_bytes() == b"b"
    assert (root / "b").read_bytes() == b"a"
    _rename_with(root / "a", root / "dir", RENAME_EXCHANGE)
    assert (root / "a" / "below").read_bytes() == b"below"
    assert (root / "dir").read_bytes() == b"b"
    assert {name: (root / name).stat().st_ino for name in ("a", "b", "dir")} == {
        "a": inodes["dir"], "b": inodes["a"], "dir": inodes["b"]}


@case
def exchange_needs_both_names(root: Path) -> None:
    write_file(root / "a")
    for old, new in (("a", "missing"), ("missing", "a")):
        with fails_with(errno.ENOENT):
            _rename_with(root / old, root / new, RENAME_EXCHANGE)
    (root / "dir").mkdir()
    write_file(root / "dir" / "file")
    with fails_with(errno.EINVAL):
        _rename_with(root / "dir", root / "dir" / "file", RENAME_EXCHANGE)


@case
def unknown_rename_flags_are_refused(root: Path) -> None:
    write_file(root / "a")
    write_file(root / "b")
    with fails_with(errno.EINVAL):
        renameat2(root / "a", root / "b", RENAME_EXCHANGE | RENAME_NOREPLACE)
    with fails_with(errno.EINVAL):
        renameat2(root / "a", root / "b", 1 << 10)


def _rename_with(old: Path, new: Path, flags: int) -> None:
    try:
        renameat2(old, new, flags)
    except OSError as error:
        if error.errno == errno.EINVAL and not str(new).startswith(f"{old}/"):
            raise Skipped("the file system has no such rename flag") from error
        raise


@case
def a_name_that_is_replaced_over_and_over_never_is_missing_or_torn(root: Path) -> None:
    """How render jobs publish: write aside, rename over."""
    write_file(root / "current", b"0" * 1000)
    stop = root / "stop"

    def publish() -> None:
        for number in range(150):
            write_file(root / "next", b"%d" % (number % 10) * 1000)
            os.rename(root / "next", root / "current")
        write_file(stop)

    def read() -> int:
        reads = 0
        while not stop.exists():
            data = (root / "current").read_bytes()
            assert len(data) == 1000
            assert len(set(data)) == 1
            reads += 1
        return reads

    in_processes(publish, read, read)
    assert (root / "current").read_bytes() == b"9" * 1000


@case
def a_storm_of_renames_loses_and_doubles_nothing(root: Path) -> None:
    """Several processes move the same files between directories; one of them wins each."""
    rng = seeded_random()
    seeds = [rng.randrange(1 << 32) for _ in range(3)]
    directories = [root / f"dir-{number}" for number in range(4)]
    for directory in directories:
        directory.mkdir()
    files = {f"file-{number}" for number in range(30)}
    for name in files:
        write_file(directories[0] / name, name.encode())

    def storm(seed: int) -> int:
        mine = random.Random(seed)
        moved = 0
        for _ in range(200):
            source, target = mine.sample(directories, 2)
            name = mine.choice(sorted(files))
            try:
                os.rename(source / name, target / name)
                moved += 1
            except FileNotFoundError:
                pass
        return moved

    moved = in_processes(*(lambda seed=seed: storm(seed) for seed in seeds))
    assert all(moved)
    found = [name for directory in directories for name in os.listdir(directory)]
    assert sorted(found) == sorted(files)
    for directory in directories:
        for name in os.listdir(directory):
            assert (directory / name).read_bytes() == name.encode()


@case
def a_storm_of_directory_renames_keeps_the_tree_a_tree(root: Path) -> None:
    rng = seeded_random()
    seeds = [rng.randrange(1 << 32) for _ in range(3)]
    names = [f"dir-{number}" for number in range(6)]
    for name in names:
        (root / name).mkdir()
        write_file(root / name / f"file-of-{name}")

    def storm(seed: int) -> None:
        mine = random.Random(seed)
        for _ in range(120):
            paths = [Path(parent) / name for parent, below, _ in os.walk(root) for name in below]
            if len(paths) < 2:
                continue
            source, target = mine.sample(paths, 2)
            try:
                os.rename(source, mine.choice((target, root)) / source.name)
            except OSError as error:
                allowed = (errno.ENOENT, errno.EINVAL, errno.ENOTEMPTY, errno.EEXIST)
                if error.errno not in allowed:
                    raise

    in_processes(*(lambda seed=seed: storm(seed) for seed in seeds))
    found = {}
    for parent, below, files in os.walk(root):
        for name in below:
            assert name not in found, f"{name} is in two places"
            found[name] = Path(parent) / name
        for file in files:
            assert file == f"file-of-{Path(parent).name}"
    assert sorted(found) == names
    for path in found.values():
        assert os.stat(f"{path}/..").st_ino == path.parent.stat().st_ino
