"""Making files: open(2) with O_CREAT and friends, mknod(2), modes, owners."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from tests.posix.registry import Skipped, case
from tests.posix.tools import (
    GROUP,
    OTHER_GROUP,
    USER,
    as_user,
    fails_with,
    in_processes,
    open_to_all,
    opened,
    require_root,
    umasked,
    write_file,
)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@case
def a_new_files_mode_is_reduced_by_the_umask(root: Path) -> None:
    for mask in (0, 0o022, 0o027, 0o777):
        def make(mask: int = mask) -> None:
            os.close(os.open(root / f"file-{mask:o}", os.O_CREAT | os.O_WRONLY, 0o777))
            os.mkdir(root / f"dir-{mask:o}", 0o777)
            os.mkfifo(root / f"fifo-{mask:o}", 0o777)
        umasked(mask, make)
        for kind in ("file", "dir", "fifo"):
            assert mode_of(root / f"{kind}-{mask:o}") == 0o777 & ~mask, (kind, mask)


@case
def every_permission_bit_can_be_given_at_creation(root: Path) -> None:
    def make() -> None:
        for mode in (0, 0o400, 0o644, 0o755, 0o666, 0o4755, 0o1777):
            os.close(os.open(root / f"{mode:o}", os.O_CREAT | os.O_WRONLY, mode))
            assert mode_of(root / f"{mode:o}") == mode, oct(mode)
    umasked(0, make)


@case
def a_file_made_without_permissions_is_still_open_for_writing(root: Path) -> None:
    open_to_all(root)

    def make() -> None:
        with opened(root / "file", os.O_CREAT | os.O_RDWR, 0o000) as fd:
            assert os.write(fd, b"written") == 7
            assert os.pread(fd, 10, 0) == b"written"
        with fails_with(errno.EACCES):
            os.open(root / "file", os.O_RDONLY)

    as_user(USER, make)
    assert (root / "file").read_bytes() == b"written"


@case
def exclusive_creation_refuses_whatever_exists(root: Path) -> None:
    write_file(root / "file")
    (root / "dir").mkdir()
    (root / "link").symlink_to("file")
    (root / "dangling").symlink_to("nowhere")
    os.mkfifo(root / "fifo")
    for name in ("file", "dir", "link", "dangling", "fifo"):
        with fails_with(errno.EEXIST):
            os.open(root / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    assert not (root / "nowhere").exists()


@case
def creation_through_a_dangling_link_makes_its_target(root: Path) -> None:
    (root / "link").symlink_to("target")
    with opened(root / "link", os.O_CREAT | os.O_WRONLY) as fd:
        os.write(fd, b"x")
    assert (root / "target").read_bytes() == b"x"
    assert (root / "link").is_symlink()


@case
def creation_in_a_missing_directory_is_enoent(root: Path) -> None:
    with fails_with(errno.ENOENT):
        os.open(root / "missing" / "file", os.O_CREAT | os.O_WRONLY)


@case
def opening_an_existing_file_for_creation_keeps_mode_and_bytes(root: Path) -> None:
    write_file(root / "file", b"kept", mode=0o640)
    with opened(root / "file", os.O_CREAT | os.O_RDWR, 0o777) as fd:
        assert os.read(fd, 10) == b"kept"
    assert mode_of(root / "file") == 0o640


@case
def a_directory_cannot_be_opened_for_writing(root: Path) -> None:
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_CREAT | os.O_WRONLY, os.O_RDONLY | os.O_CREAT):
        with fails_with(errno.EISDIR):
            os.open(root, flags)


@case
def o_directory_refuses_a_file(root: Path) -> None:
    write_file(root / "file")
    with fails_with(errno.ENOTDIR):
        os.open(root / "file", os.O_RDONLY | os.O_DIRECTORY)


@case
def o_nofollow_refuses_a_symlink(root: Path) -> None:
    write_file(root / "file")
    (root / "link").symlink_to("file")
    with fails_with(errno.ELOOP):
        os.open(root / "link", os.O_RDONLY | os.O_NOFOLLOW)


@case
def o_trunc_empties_an_existing_file(root: Path) -> None:
    file = write_file(root / "file", b"some content" * 1000)
    with opened(file, os.O_RDONLY) as reader:
        assert len(os.read(reader, 5)) == 5
        with opened(file, os.O_WRONLY | os.O_TRUNC):
            assert os.fstat(reader).st_size == 0
            assert os.pread(reader, 10, 0) == b""
    assert file.stat().st_size == 0


@case
def o_trunc_followed_by_a_shorter_write_leaves_no_old_tail(root: Path) -> None:
    file = write_file(root / "file", b"a" * 3_000_000)
    for size in (2_000_000, 100, 5000, 0, 1):
        write_file(file, b"b" * size)
        assert file.read_bytes() == b"b" * size, size


@case
def only_one_of_several_exclusive_creators_wins(root: Path) -> None:
    def contend() -> int:
        won = 0
        for number in range(40):
            try:
                os.close(os.open(root / str(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                won += 1
            except FileExistsError:
                pass
        return won

    assert sum(map(int, in_processes(contend, contend, contend))) == 40  # type: ignore[call-overload]


@case
def a_fifo_joins_two_processes(root: Path) -> None:
    os.mkfifo(root / "fifo", 0o600)
    assert stat.S_ISFIFO((root / "fifo").stat().st_mode)
    received, _ = in_processes(
        lambda: (root / "fifo").read_bytes(), lambda: (root / "fifo").write_bytes(b"through"))
    assert received == b"through"
    assert (root / "fifo").stat().st_size == 0


@case
def a_socket_can_be_bound_and_connected(root: Path) -> None:
    # sun_path has 108 bytes; the path through /proc is always short.
    with opened(root, os.O_RDONLY) as fd, socket.socket(socket.AF_UNIX) as listener:
        name = f"/proc/self/fd/{fd}/socket"
        listener.bind(name)
        listener.listen()
        assert stat.S_ISSOCK((root / "socket").stat().st_mode)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(name)
            server, _ = listener.accept()
            with server:
                client.sendall(b"hello")
                assert server.recv(10) == b"hello"


@case
def a_device_node_keeps_its_numbers(root: Path) -> None:
    require_root()
    for kind, name in ((stat.S_IFCHR, "char"), (stat.S_IFBLK, "block")):
        device = os.makedev(7, 200)
        try:
            os.mknod(root / name, kind | 0o600, device)
        except PermissionError as error:
            raise Skipped("device nodes are not allowed here") from error
        found = (root / name).stat()
        assert stat.S_IFMT(found.st_mode) == kind
        assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == (7, 200)


@case
def device_nodes_are_refused_to_ordinary_users(root: Path) -> None:
    open_to_all(root)

    def make() -> None:
        with fails_with(errno.EPERM):
            os.mknod(root / "char", stat.S_IFCHR | 0o600, os.makedev(1, 3))

    as_user(USER, make)


@case
def mknod_makes_a_regular_file(root: Path) -> None:
    umasked(0o022, lambda: os.mknod(root / "file", stat.S_IFREG | 0o666))
    assert stat.S_ISREG((root / "file").stat().st_mode)
    assert mode_of(root / "file") == 0o644
    (root / "file").write_bytes(b"usable")
    assert (root / "file").read_bytes() == b"usable"


@case
def mknod_refuses_an_existing_name(root: Path) -> None:
    write_file(root / "name", b"kept")
    for kind in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
        with fails_with(errno.EEXIST):
            os.mknod(root / "name", kind | 0o600)
    assert (root / "name").read_bytes() == b"kept"


@case
def a_special_file_can_be_renamed_linked_and_removed(root: Path) -> None:
    os.mkfifo(root / "fifo")
    os.mknod(root / "socket", stat.S_IFSOCK | 0o600)
    for name, kind in (("fifo", stat.S_IFIFO), ("socket", stat.S_IFSOCK)):
        os.rename(root / name, root / f"{name}-renamed")
        os.link(root / f"{name}-renamed", root / f"{name}-linked")
        for links, other in ((2, "renamed"), (1, "linked")):
            found = (root / f"{name}-{other}").lstat()
            assert stat.S_IFMT(found.st_mode) == kind
            assert found.st_nlink == links
            (root / f"{name}-{other}").chmod(0o640)
            (root / f"{name}-{other}").unlink()
    assert os.listdir(root) == []


@case
def new_files_belong_to_the_calling_user_and_group(root: Path) -> None:
    open_to_all(root)

    def make() -> None:
        write_file(root / "file")
        os.mkdir(root / "dir")
        os.symlink("target", root / "symlink")
        os.mkfifo(root / "fifo")
        os.mknod(root / "socket", stat.S_IFSOCK | 0o600)

    as_user(USER, make, gid=GROUP)
    for name in ("file", "dir", "symlink", "fifo", "socket"):
        found = (root / name).lstat()
        assert (found.st_uid, found.st_gid) == (USER, GROUP), name


@case
def a_setgid_directory_passes_on_its_group(root: Path) -> None:
    open_to_all(root)
    os.chown(root, 0, OTHER_GROUP)
    root.chmod(0o2777)

    def make() -> None:
        write_file(root / "file")
        os.mkdir(root / "dir")
        os.symlink("target", root / "symlink")
        write_file(root / "dir" / "below")

    as_user(USER, make, gid=GROUP)
    for name in ("file", "dir", "symlink", "dir/below"):
        found = (root / name).lstat()
        assert (found.st_uid, found.st_gid) == (USER, OTHER_GROUP), name
    assert mode_of(root / "dir") & stat.S_ISGID
    assert not mode_of(root / "file") & stat.S_ISGID


@case
def a_new_file_is_empty_even_where_another_was_removed(root: Path) -> None:
    for _ in range(20):
        write_file(root / "file", b"old" * 5000)
        (root / "file").unlink()
        with opened(root / "file", os.O_CREAT | os.O_EXCL | os.O_RDWR) as fd:
            assert os.fstat(fd).st_size == 0
            os.ftruncate(fd, 15000)
            assert os.pread(fd, 15000, 0) == bytes(15000)
        (root / "file").unlink()
