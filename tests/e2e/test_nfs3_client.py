"""The test client itself, against a plain Ganesha: what it says is what the directory has."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import nfs3
from tests.support.nas import Nas, running_nas
from tests.support.nfs3 import (
    SERVER_TIME,
    Access,
    Create,
    Credentials,
    FileType,
    Nfs3,
    NfsError,
    SetAttributes,
    Stable,
    Status,
)

pytestmark = pytest.mark.nfs


@pytest.fixture(scope="module")
def nas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nas]:
    work_dir = tmp_path_factory.mktemp("nas")
    (work_dir / "shows").mkdir()
    with running_nas(work_dir, {"/shows": work_dir / "shows"}) as nas:
        yield nas


@pytest.fixture
def client(nas: Nas) -> Iterator[Nfs3]:
    with Nfs3("127.0.0.1", nas.port) as client:
        yield client


@pytest.fixture
def directory(nas: Nas, request: pytest.FixtureRequest) -> Path:
    """A directory of the test's own, on the NAS."""
    path = nas.exports["/shows"] / request.node.name
    path.mkdir()
    return path


@pytest.fixture
def handle(nas: Nas, client: Nfs3, directory: Path) -> bytes:
    root = nfs3.mount("127.0.0.1", nas.mount_port, "/shows")
    return client.lookup(root, directory.name).handle


def refused(status: Status):
    return pytest.raises(NfsError, match=status.name)


def test_exports_and_mount_errors(nas: Nas):
    assert nfs3.exports("127.0.0.1", nas.mount_port)
    with pytest.raises(NfsError, match="MNT"):
        nfs3.mount("127.0.0.1", nas.mount_port, "/nothing-here")


def test_getattr_shows_what_stat_shows(client: Nfs3, directory: Path, handle: bytes):
    (directory / "file").write_bytes(b"0123456789")
    os.chown(directory / "file", 1234, 5678)
    os.chmod(directory / "file", 0o4751)
    os.utime(directory / "file", ns=(1_600_000_000_000_000_001, 1_700_000_000_123_456_789))
    wanted = os.stat(directory / "file")

    found = client.lookup(handle, "file")

    attributes = client.getattr(found.handle)
    assert attributes == found.attributes
    assert (attributes.type, attributes.mode) == (FileType.REGULAR, 0o4751)
    assert (attributes.uid, attributes.gid, attributes.nlink) == (1234, 5678, 1)
    assert (attributes.size, attributes.fileid) == (10, wanted.st_ino)
    assert (attributes.atime_ns, attributes.mtime_ns, attributes.ctime_ns) == (
        wanted.st_atime_ns, wanted.st_mtime_ns, wanted.st_ctime_ns)


def test_setattr_sets_each_attribute_alone(client: Nfs3, directory: Path, handle: bytes):
    file = directory / "file"
    file.write_bytes(b"0123456789")
    target = client.lookup(handle, "file").handle

    client.setattr(target, SetAttributes(mode=0o600))
    client.setattr(target, SetAttributes(uid=7, gid=8))
    client.setattr(target, SetAttributes(size=4))
    client.setattr(target, SetAttributes(atime_ns=5_000_000_001, mtime_ns=6_000_000_002))

    found = file.stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert (found.st_uid, found.st_gid) == (7, 8)
    assert file.read_bytes() == b"0123"
    assert found.st_mtime_ns == 6_000_000_002
    client.setattr(target, SetAttributes(mtime_ns=SERVER_TIME))
    assert file.stat().st_mtime_ns > found.st_ctime_ns - 1


def test_a_guarded_setattr_is_refused_once_the_file_changed(
    client: Nfs3, directory: Path, handle: bytes,
):
    (directory / "file").write_bytes(b"")
    target = client.lookup(handle, "file").handle
    ctime_ns = client.getattr(target).ctime_ns

    with refused(Status.NOT_SYNC):
        client.setattr(target, SetAttributes(mode=0o600), guard_ctime_ns=ctime_ns - 1)


def test_bytes_written_are_read_and_committed(client: Nfs3, directory: Path, handle: bytes):
    data = os.urandom(100_003)
    file = client.create(handle, "file").handle

    written = client.write(file, 5, data)
    verifier = client.commit(file)

    assert written.count == len(data)
    assert written.verifier == verifier
    assert (directory / "file").read_bytes() == bytes(5) + data
    got = client.read(file, 3, 200_000)
    assert (got.data, got.is_end) == (bytes(2) + data, True)
    assert client.read(file, 0, 10).is_end is False
    assert client.write(file, 0, b"stable", Stable.FILE_SYNC).committed is Stable.FILE_SYNC


def test_each_way_to_create(client: Nfs3, directory: Path, handle: bytes):
    client.create(handle, "file", SetAttributes(mode=0o640, size=3), how=Create.GUARDED)
    with refused(Status.EXIST):
        client.create(handle, "file", how=Create.GUARDED)
    client.create(handle, "file")
    assert (directory / "file").stat().st_size == 3

    first = client.create(handle, "once", how=Create.EXCLUSIVE, verifier=b"verifier")
    again = client.create(handle, "once", how=Create.EXCLUSIVE, verifier=b"verifier")
    assert first.handle == again.handle
    with refused(Status.EXIST):
        client.create(handle, "once", how=Create.EXCLUSIVE, verifier=b"another!")


def test_every_kind_of_object(client: Nfs3, directory: Path, handle: bytes):
    client.mkdir(handle, "dir", SetAttributes(mode=0o711))
    client.symlink(handle, "symlink", b"\xff target")
    client.mknod(handle, "fifo", FileType.FIFO)
    client.mknod(handle, "socket", FileType.SOCKET)
    client.mknod(handle, "char", FileType.CHARACTER, rdev=(1, 3))
    client.link(client.create(handle, "file").handle, handle, "link")

    kinds = {os.fsdecode(e.name): e.attributes.type
             for e in client.list_entries(handle) if e.attributes}
    assert kinds == {
        "dir": FileType.DIRECTORY, "symlink": FileType.SYMLINK, "fifo": FileType.FIFO,
        "socket": FileType.SOCKET, "char": FileType.CHARACTER, "file": FileType.REGULAR,
        "link": FileType.REGULAR}
    for name, kind in kinds.items():
        assert nfs3.file_type_of_mode((directory / name).lstat().st_mode) is kind
    assert client.readlink(client.lookup(handle, "symlink").handle) == b"\xff target"
    assert client.getattr(client.lookup(handle, "char").handle).rdev == (1, 3)


def test_renames_and_removals(client: Nfs3, directory: Path, handle: bytes):
    below = client.mkdir(handle, "below").handle
    client.create(handle, "file")
    client.rename(handle, "file", below, "moved")
    assert os.listdir(directory / "below") == ["moved"]
    with refused(Status.NOTEMPTY):
        client.rmdir(handle, "below")
    client.remove(below, "moved")
    client.rmdir(handle, "below")
    with refused(Status.NOENT):
        client.lookup(handle, "below")
    with refused(Status.STALE):
        client.getattr(below)


def test_listings_of_many_names_in_small_replies(client: Nfs3, directory: Path, handle: bytes):
    names = {b"name-%04d" % number for number in range(700)}
    for name in names:
        (directory / os.fsdecode(name)).touch()
    assert sorted(client.list_names(handle, count=4096)) == sorted(names)
    entries = client.list_entries(handle, reply_bytes_max=16_384)
    assert sorted(entry.name for entry in entries) == sorted(names)
    for entry in entries[:5]:
        assert entry.handle == client.lookup(handle, entry.name).handle


def test_access_depends_on_the_credentials(nas: Nas, client: Nfs3, directory: Path, handle: bytes):
    (directory / "file").write_bytes(b"")
    os.chmod(directory / "file", 0o640)
    os.chown(directory / "file", 10, 20)
    target = client.lookup(handle, "file").handle

    for credentials, wanted in (
        (Credentials(10, 1), Access.READ | Access.MODIFY | Access.EXTEND),
        (Credentials(11, 1, (20,)), Access.READ), (Credentials(11, 1), Access(0)),
    ):
        with Nfs3("127.0.0.1", nas.port, credentials) as other:
            granted = other.access(target) & ~Access.DELETE
            assert granted == wanted, credentials


def test_the_file_system_describes_itself(client: Nfs3, handle: bytes):
    assert client.fsinfo(handle).read_max >= 65_536
    assert client.fsstat(handle).total_bytes > 0
    assert client.pathconf(handle).name_max >= 255


def test_a_hard_client_waits_for_a_server_that_restarts(
    nas: Nas, directory: Path, handle: bytes,
):
    with Nfs3("127.0.0.1", nas.port, is_hard=True) as client:
        file = client.create(handle, "file").handle
        nas.kill()
        nas.start()
        client.write(file, 0, b"after the restart", Stable.FILE_SYNC)
        assert client.repeats >= 1
    assert (directory / "file").read_bytes() == b"after the restart"


def test_a_soft_client_reports_a_lost_server(nas: Nas, client: Nfs3, handle: bytes):
    client.getattr(handle)
    nas.kill()
    try:
        with pytest.raises(OSError):
            client.getattr(handle)
    finally:
        nas.start()


def test_a_call_the_server_does_not_know_is_an_rpc_error(nas: Nas):
    rpc = nfs3.Rpc("127.0.0.1", nas.port, (100003, 3))
    with pytest.raises(nfs3.RpcError):
        rpc.call(99)
    rpc.close()


def test_a_cut_reply_is_reported():
    """A reply that ends inside a field must not be taken for a shorter value."""
    reader = nfs3.Reader(memoryview(nfs3.opaque(b"0123456789")[:8]))
    with pytest.raises(nfs3.RpcError):
        reader.opaque()
