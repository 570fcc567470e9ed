"""How often an NFS operation enters Python: the hot path must not.

The kernel's caches answer hot operations only with stateless opens (ARCHITECTURE.md, "The FUSE
boundary"); one regression there costs every operation several requests, and nothing else would
show it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import NodeFactory
from tests.support.nfs3 import Nfs3, NfsError, SetAttributes, Stable
from tests.support.node import Node

pytestmark = [pytest.mark.nfs, pytest.mark.fuse]
MIB = 1 << 20


@pytest.fixture
def upcalls(node: Node) -> Callable[[Callable[[], object]], dict[str, int]]:
    """Run an act; the requests that entered Python for it, by operation."""

    def count(act: Callable[[], object]) -> dict[str, int]:
        before = node.metrics().upcalls()
        act()
        after = node.metrics().upcalls()
        # FORGET follows memory pressure in the kernel, not what the client does.
        return {name: after[name] - before.get(name, 0) for name in after
                if after[name] != before.get(name, 0) and name != "forget"}

    return count


@pytest.fixture
def client(node: Node):
    with node.client() as client:
        yield client


@pytest.fixture
def root(node: Node) -> bytes:
    return node.root_handle()


def test_hot_lookup_getattr_access_and_read_never_enter_python(
    local_core: Path, client: Nfs3, root: bytes, upcalls,
):
    (local_core / "dir").mkdir()
    (local_core / "dir" / "file").write_bytes(bytes(MIB))
    directory = client.lookup(root, "dir").handle
    file = client.lookup(directory, "file").handle
    client.access(directory)
    client.access(file)
    client.read(file, 0, MIB)
    client.getattr(file)

    for name, act in (
        ("GETATTR", lambda: client.getattr(file)),
        ("GETATTR of a directory", lambda: client.getattr(directory)),
        ("LOOKUP", lambda: client.lookup(directory, "file")),
        ("ACCESS", lambda: client.access(file)),
        ("READ", lambda: client.read(file, 0, MIB)),
    ):
        for _ in range(3):
            assert upcalls(act) == {}, name


def test_a_missing_name_asked_for_again_does_not_enter_python(
    client: Nfs3, root: bytes, upcalls,
):
    def miss() -> None:
        with pytest.raises(NfsError, match="NOENT"):
            client.lookup(root, "missing")

    miss()
    assert upcalls(miss) == {}


def test_a_cold_lookup_is_one_request(local_core: Path, client: Nfs3, root: bytes, upcalls):
    (local_core / "file").write_bytes(b"x")
    client.access(root)
    assert upcalls(lambda: client.lookup(root, "file")) == {"lookup": 1}


def test_a_cold_read_of_1_mib_is_a_read_and_a_getattr(
    local_core: Path, client: Nfs3, root: bytes, upcalls,
):
    for name in ("first", "file"):
        (local_core / name).write_bytes(bytes(MIB))
    # The first open of all is asked for, and answered with ENOSYS for good.
    client.read(client.lookup(root, "first").handle, 0, MIB)
    file = client.lookup(root, "file").handle
    found = upcalls(lambda: client.read(file, 0, MIB))
    assert found.keys() <= {"read", "getattr"}
    assert found["read"] == 1
    assert found.get("getattr", 0) <= 1


@pytest.mark.parametrize(("name", "most"), [
    ("CREATE", 4), ("WRITE", 2), ("COMMIT", 1), ("MKDIR", 3), ("SYMLINK", 4), ("RENAME", 4),
    ("REMOVE", 3), ("RMDIR", 2), ("SETATTR", 2), ("LINK", 4),
])
def test_a_change_costs_no_more_requests_than_it_must(
    client: Nfs3, root: bytes, upcalls, name: str, most: int,
):
    """The median of several: the first of a kind may also fill a cache."""
    directory = client.mkdir(root, "dir").handle
    files = [client.create(directory, f"file-{number}").handle for number in range(5)]
    for number in range(5):
        client.mkdir(directory, f"dir-{number}")
    acts: dict[str, Callable[[int], object]] = {
        "CREATE": lambda n: client.create(directory, f"new-{n}"),
        "WRITE": lambda n: client.write(files[n], 0, bytes(MIB)),
        "COMMIT": lambda n: client.commit(files[n]),
        "MKDIR": lambda n: client.mkdir(directory, f"new-dir-{n}"),
        "SYMLINK": lambda n: client.symlink(directory, f"symlink-{n}", "target"),
        "RENAME": lambda n: client.rename(directory, f"file-{n}", directory, f"renamed-{n}"),
        "REMOVE": lambda n: client.remove(directory, f"file-{n}"),
        "RMDIR": lambda n: client.rmdir(directory, f"dir-{n}"),
        "SETATTR": lambda n: client.setattr(files[n], SetAttributes(mode=0o600)),
        "LINK": lambda n: client.link(files[n], directory, f"link-{n}"),
    }
    if name == "COMMIT":
        for file in files:
            client.write(file, 0, bytes(MIB), Stable.UNSTABLE)
    counts = [upcalls(lambda number=number: acts[name](number)) for number in range(5)]
    print(name, counts)
    assert sorted(sum(count.values()) for count in counts)[2] <= most


def test_a_listing_read_again_costs_at_most_one_request(
    local_core: Path, client: Nfs3, root: bytes, upcalls,
):
    (local_core / "dir").mkdir()
    for number in range(2000):
        (local_core / "dir" / f"entry-{number:05d}").touch()
    directory = client.lookup(root, "dir").handle

    cold = upcalls(lambda: client.list_entries(directory))
    again = upcalls(lambda: client.list_entries(directory))

    print(cold, again)
    assert sum(cold.values()) <= 110
    assert sum(again.values()) <= 1


def test_lookups_below_a_listed_directory_do_not_enter_python(
    local_core: Path, client: Nfs3, root: bytes, upcalls,
):
    (local_core / "dir").mkdir()
    for number in range(300):
        (local_core / "dir" / f"entry-{number:05d}").touch()
    directory = client.lookup(root, "dir").handle
    entries = client.list_entries(directory)

    def stat_all() -> None:
        for entry in entries:
            client.getattr(client.lookup(directory, entry.name).handle)

    stat_all()
    assert upcalls(stat_all) == {}


def test_the_hot_path_survives_a_restart_of_the_volume_server(
    local_core: Path, start_node: NodeFactory, node: Node, client: Nfs3, root: bytes, upcalls,
):
    (local_core / "file").write_bytes(bytes(MIB))
    file = client.lookup(root, "file").handle
    node.kill("volume")
    node.wait_until_serving()
    client.getattr(file)
    client.lookup(root, "file")
    client.read(file, 0, MIB)

    assert upcalls(lambda: client.getattr(file)) == {}
    assert upcalls(lambda: client.lookup(root, "file")) == {}
    assert upcalls(lambda: client.read(file, 0, MIB)) == {}
