"""getattr and setattr: modes, owners, sizes, and what the kernel clears on the way."""

from __future__ import annotations

import errno
import os
import stat
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
    pattern,
    require_root,
    statx_mask_mode_size,
    write_file,
)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@case
def chmod_sets_every_permission_bit(root: Path) -> None:
    file = write_file(root / "file")
    (root / "dir").mkdir()
    for mode in (0, 0o777, 0o4755, 0o2755, 0o1777, 0o7777, 0o421):
        for path in (file, root / "dir"):
            path.chmod(mode)
            assert mode_of(path) == mode, (path.name, oct(mode))


@case
def chmod_follows_symlinks(root: Path) -> None:
    write_file(root / "file")
    (root / "link").symlink_to("file")
    (root / "link").chmod(0o604)
    assert mode_of(root / "file") == 0o604


@case
def fchmod_and_fchown_reach_an_unlinked_file(root: Path) -> None:
    require_root()
    file = write_file(root / "file")
    with opened(file, os.O_RDWR) as fd:
        file.unlink()
        os.fchmod(fd, 0o600)
        os.fchown(fd, USER, GROUP)
        found = os.fstat(fd)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert (found.st_uid, found.st_gid) == (USER, GROUP)


@case
def chown_changes_what_it_is_given(root: Path) -> None:
    require_root()
    file = write_file(root / "file")
    for uid, gid, wanted in (
        (USER, GROUP, (USER, GROUP)), (-1, OTHER_GROUP, (USER, OTHER_GROUP)),
        (OTHER_USER, -1, (OTHER_USER, OTHER_GROUP)), (-1, -1, (OTHER_USER, OTHER_GROUP)),
        (2**32 - 2, 2**32 - 2, (2**32 - 2, 2**32 - 2)),
    ):
        os.chown(file, uid, gid)
        found = file.stat()
        assert (found.st_uid, found.st_gid) == wanted


@case
def lchown_changes_the_link_and_not_its_target(root: Path) -> None:
    require_root()
    before = write_file(root / "file").stat()
    (root / "link").symlink_to("file")
    os.lchown(root / "link", USER, GROUP)
    assert ((root / "link").lstat().st_uid, (root / "link").lstat().st_gid) == (USER, GROUP)
    assert (root / "file").stat().st_uid == before.st_uid


@case
def chown_clears_setuid_and_setgid_of_an_executable(root: Path) -> None:
    require_root()
    file = write_file(root / "file")
    file.chmod(0o6755)
    os.chown(file, USER, GROUP)
    assert mode_of(file) == 0o755


@case
def chown_leaves_setgid_of_a_directory(root: Path) -> None:
    require_root()
    (root / "dir").mkdir()
    (root / "dir").chmod(0o2755)
    os.chown(root / "dir", USER, GROUP)
    assert mode_of(root / "dir") == 0o2755


@case
def a_write_by_an_ordinary_user_clears_setuid(root: Path) -> None:
    open_to_all(root)
    file = write_file(root / "file", b"program")
    file.chmod(0o6777)

    def write() -> None:
        with opened(file, os.O_WRONLY) as fd:
            os.write(fd, b"changed")

    as_user(USER, write)
    assert mode_of(file) == 0o777


@case
def a_truncation_by_an_ordinary_user_clears_setuid(root: Path) -> None:
    open_to_all(root)
    file = write_file(root / "file", b"program")
    file.chmod(0o6777)
    as_user(USER, lambda: os.truncate(file, 3))
    assert mode_of(file) == 0o777


@case
def chmod_by_an_owner_outside_the_group_clears_setgid(root: Path) -> None:
    open_to_all(root)
    file = write_file(root / "file")
    os.chown(file, USER, OTHER_GROUP)
    as_user(USER, lambda: file.chmod(0o2755), gid=GROUP)
    assert mode_of(file) == 0o755
    as_user(USER, lambda: file.chmod(0o2755), gid=GROUP, groups=(OTHER_GROUP,))
    assert mode_of(file) == 0o2755


@case
def truncate_discards_and_extends_with_zeros(root: Path) -> None:
    data = pattern(10_000)
    file = write_file(root / "file", data)
    for size in (9_999, 4096, 4095, 1, 0):
        os.truncate(file, size)
        assert file.stat().st_size == size
        assert file.read_bytes() == data[:size]
    os.truncate(file, 8193)
    assert file.read_bytes() == bytes(8193)


@case
def bytes_cut_off_never_come_back(root: Path) -> None:
    for cut, size in ((5000, 20_000), (4096, 8192), (1, 3_000_000), (1_048_577, 4_500_000)):
        data = pattern(size)
        file = write_file(root / "file", data)
        os.truncate(file, cut)
        os.truncate(file, size)
        assert file.read_bytes() == data[:cut] + bytes(size - cut), (cut, size)


@case
def bytes_cut_off_never_come_back_through_an_open_file(root: Path) -> None:
    data = pattern(300_000)
    with opened(write_file(root / "file", data), os.O_RDWR) as fd:
        assert os.pread(fd, 300_000, 0) == data
        os.ftruncate(fd, 100_001)
        os.pwrite(fd, b"end", 299_997)
        assert os.pread(fd, 300_001, 0) == data[:100_001] + bytes(199_996) + b"end"


@case
def truncate_to_the_same_size_changes_no_byte(root: Path) -> None:
    data = pattern(5000)
    file = write_file(root / "file", data)
    os.truncate(file, 5000)
    assert file.read_bytes() == data


@case
def truncate_refuses_what_is_not_a_writable_file(root: Path) -> None:
    file = write_file(root / "file", b"kept")
    with fails_with(errno.EISDIR):
        os.truncate(root, 0)
    with opened(file, os.O_RDONLY) as fd, fails_with(errno.EINVAL, errno.EBADF):
        os.ftruncate(fd, 0)
    with fails_with(errno.EINVAL):
        os.truncate(file, -1)
    with fails_with(errno.ENOENT):
        os.truncate(root / "missing", 0)
    assert file.read_bytes() == b"kept"


@case
def truncate_follows_symlinks(root: Path) -> None:
    write_file(root / "file", b"0123456789")
    (root / "link").symlink_to("file")
    os.truncate(root / "link", 4)
    assert (root / "file").read_bytes() == b"0123"


@case
def size_follows_every_write_at_once(root: Path) -> None:
    file = root / "file"
    with opened(file, os.O_CREAT | os.O_RDWR) as fd:
        for size in (1, 100, 4096, 4097, 1_000_000, 1_048_577):
            os.pwrite(fd, b"x", size - 1)
            assert os.fstat(fd).st_size == size
            assert file.stat().st_size == size


@case
def an_open_file_and_its_path_have_the_same_attributes(root: Path) -> None:
    file = write_file(root / "file", b"content")
    with opened(file, os.O_RDONLY) as fd:
        for change in (lambda: file.chmod(0o600), lambda: os.truncate(file, 3),
                       lambda: os.utime(file, ns=(10**18, 10**18 + 1))):
            change()
            assert os.fstat(fd)[:9] == file.stat()[:9]


@case
def a_sparse_file_takes_less_space_than_its_size(root: Path) -> None:
    file = root / "file"
    with opened(file, os.O_CREAT | os.O_WRONLY) as fd:
        os.pwrite(fd, b"x" * 4096, 1 << 30)
        os.fsync(fd)
    found = file.stat()
    assert found.st_size == (1 << 30) + 4096
    assert found.st_blocks * 512 < 1 << 29


@case
def statx_agrees_with_stat(root: Path) -> None:
    file = write_file(root / "file", b"content", mode=0o640)
    mask, mode, size = statx_mask_mode_size(file)
    assert mask & 0x7FF == 0x7FF
    assert mode == file.stat().st_mode
    assert size == 7


@case
def statfs_describes_the_file_system(root: Path) -> None:
    found = os.statvfs(root)
    assert found.f_namemax == 255
    assert found.f_bsize >= 512
    assert found.f_frsize >= 512
    assert 0 <= found.f_bavail <= found.f_bfree <= found.f_blocks
    assert found.f_blocks > 0
    assert 0 <= found.f_ffree <= found.f_files


@case
def attributes_of_every_kind_of_file_have_its_type(root: Path) -> None:
    write_file(root / "file")
    (root / "dir").mkdir()
    (root / "link").symlink_to("file")
    os.mkfifo(root / "fifo")
    os.mknod(root / "socket", stat.S_IFSOCK | 0o600)
    kinds = {name: stat.S_IFMT((root / name).lstat().st_mode) for name in os.listdir(root)}
    assert kinds == {"file": stat.S_IFREG, "dir": stat.S_IFDIR, "link": stat.S_IFLNK,
                     "fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK}
