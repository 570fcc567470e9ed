"""kill -9 of every part of a node under write load.

The volume server: clients see a pause and no error at all.  Ganesha and the whole node: clients
wait, and every byte acknowledged as stable is there afterwards.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import NodeFactory
from tests.support.nas import Nas
from tests.support.nfs3 import Create, NfsError
from tests.support.node import Node
from tests.support.writer import Writer

pytestmark = [pytest.mark.nfs, pytest.mark.fuse]
_WRITERS = 3


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return 60 if request.config.getoption("--soak") else 6


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


class Load:
    """Writers that run in threads, each with its own connection."""

    def __init__(self, node: Node, rng: random.Random) -> None:
        root = node.root_handle()
        self.clients = [node.client(timeout_s=120) for _ in range(_WRITERS)]
        self.writers = [Writer(number, client, root, seed=rng.randrange(1 << 32))
                        for number, client in enumerate(self.clients)]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=writer.run, args=(self._stop,))
                         for writer in self.writers]

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()

    def wait_for(self, operations: int) -> None:
        for writer in self.writers:
            writer.wait_for(operations)

    def check(self, node: Node) -> None:
        with node.client() as client:
            for writer in self.writers:
                assert writer.error is None, writer.error
                writer.check(writer.read_back(client))

    def commit_and_check(self, node: Node, core: Path) -> None:
        """Through the node, and in the core filer once all is flushed."""
        for writer in self.writers:
            writer.commit()
        self.check(node)
        node.cli("flush", "/shows")
        for writer in self.writers:
            writer.check((core / writer.name).read_bytes())


def core_url(kind: str, local_core: Path, request: pytest.FixtureRequest) -> tuple[str, Path]:
    if kind == "file":
        return f"file://{local_core}", local_core
    nas: Nas = request.getfixturevalue("nas")
    return nas.url("/shows"), nas.exports["/shows"]


@pytest.mark.parametrize("kind", ["file", "nfs"])
def test_clients_see_no_error_when_the_volume_server_is_killed(
    kind: str, local_core: Path, start_node: NodeFactory, rounds: int, rng: random.Random,
    request: pytest.FixtureRequest,
):
    url, core = core_url(kind, local_core, request)
    node = start_node(url)
    load = Load(node, rng)

    with load.running():
        for _ in range(rounds):
            load.wait_for(rng.randrange(1, 60))
            node.kill("volume")
        load.wait_for(20)

    node.wait_until_serving()
    load.commit_and_check(node, core)


def test_names_change_exactly_once_when_the_volume_server_is_killed(
    node: Node, rounds: int, rng: random.Random,
):
    """A CREATE, RENAME or REMOVE that was being answered must not be done twice."""
    root = node.root_handle()
    client = node.client(timeout_s=120)
    stop = threading.Event()
    failures: list[BaseException] = []
    counted = threading.Condition()
    count = 0

    def change_names() -> None:
        nonlocal count
        try:
            while not stop.is_set():
                name = f"name-{count}"
                client.create(root, name, how=Create.GUARDED)
                client.rename(root, name, root, f"renamed-{count}")
                client.mkdir(root, f"dir-{count}")
                client.remove(root, f"renamed-{count}")
                if count % 2:
                    client.rmdir(root, f"dir-{count}")
                with counted:
                    count += 1
                    counted.notify_all()
        except BaseException as error:
            failures.append(error)
            with counted:
                counted.notify_all()

    thread = threading.Thread(target=change_names)
    thread.start()
    try:
        for _ in range(rounds):
            with counted:
                goal = count + rng.randrange(1, 20)
                assert counted.wait_for(lambda goal=goal: failures or count >= goal, 120)
            node.kill("volume")
    finally:
        stop.set()
        thread.join()
    node.wait_until_serving()
    assert failures == []
    assert sorted(client.list_names(root)) == sorted(
        b"dir-%d" % number for number in range(0, count, 2))


def test_committed_bytes_survive_when_ganesha_is_killed(
    node: Node, local_core: Path, rounds: int, rng: random.Random,
):
    load = Load(node, rng)
    with load.running():
        for _ in range(rounds):
            load.wait_for(rng.randrange(1, 60))
            node.kill("ganesha")
        load.wait_for(20)
    node.wait_until_serving()
    load.commit_and_check(node, local_core)


def test_committed_bytes_survive_when_the_whole_node_is_killed(
    local_core: Path, start_node: NodeFactory, rounds: int, rng: random.Random,
):
    """And handles of before are good after; clients simply wait."""
    node = start_node(f"file://{local_core}", policy="full")
    load = Load(node, rng)
    with load.running():
        for _ in range(max(3, rounds // 2)):
            load.wait_for(rng.randrange(1, 60))
            node.kill("node")
            node.start()
        load.wait_for(20)
    load.commit_and_check(node, local_core)


def test_a_node_that_stops_keeping_dirty_data_flushes_it_after_the_next_start(
    local_core: Path, start_node: NodeFactory, rng: random.Random,
):
    node = start_node(f"file://{local_core}", policy="read-write")
    load = Load(node, rng)
    with load.running():
        load.wait_for(40)
    for writer in load.writers:
        writer.commit()
    node.stop()
    node.start()
    load.commit_and_check(node, local_core)


def test_handles_stay_good_over_every_restart(node: Node, local_core: Path):
    (local_core / "dir" / "below").mkdir(parents=True)
    (local_core / "dir" / "below" / "file").write_bytes(b"content")
    root = node.root_handle()
    with node.client() as client:
        found = client.walk(root, "dir/below/file")
        directory = client.walk(root, "dir/below").handle

        def check() -> None:
            assert node.root_handle() == root
            assert client.read(found.handle, 0, 100).data == b"content"
            assert client.lookup(directory, "file").handle == found.handle
            assert client.walk(root, "dir/below/file").handle == found.handle

        check()
        for what in ("volume", "ganesha", "node"):
            node.kill(what)
            if what == "node":
                node.start()
            node.wait_until_serving()
            check()
        node.stop()
        node.start()
        check()


def test_a_handle_of_a_removed_file_is_stale_after_a_restart_too(node: Node):
    root = node.root_handle()
    with node.client() as client:
        handle = client.create(root, "file").handle
        client.remove(root, "file")
        for what in ("volume", "node"):
            with pytest.raises(NfsError, match="STALE"):
                client.getattr(handle)
            node.kill(what)
            if what == "node":
                node.start()
            node.wait_until_serving()
            client.create(root, f"another-{what}")
        with pytest.raises(NfsError, match="STALE"):
            client.getattr(handle)


