"""The session: stateless opens, the request's unique, fairness, hand-over within a process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from filer.fuse_connection import remove_mounts
from filer.vfs.session import FuseSession
from filer.vfs.shim import connection_info, current_unique
from tests.support.fuse_mount import handed_over, in_thread, mounted, served
from tests.support.tiny_fs import TinyFs

pytestmark = pytest.mark.fuse


def write_file(path: Path, data: bytes, flags: int = os.O_CREAT | os.O_WRONLY) -> None:
    fd = os.open(path, flags)
    try:
        assert os.write(fd, data) == len(data)
    finally:
        os.close(fd)


async def test_handlers_get_the_inode_as_file_handle(tmp_path):
    fs = TinyFs()
    async with served(tmp_path / "m", fs) as mount:
        await in_thread(write_file, mount.path / "a", b"hello")
        assert await in_thread((mount.path / "a").read_bytes) == b"hello"
        assert await in_thread(os.listdir, mount.path) == ["a"]

    assert fs.find("a").data == b"hello"


async def test_a_second_open_and_stat_of_a_file_asks_nothing(tmp_path):
    fs = TinyFs()
    fs.make(1, b"a", 0o100644, b"x" * 5000)
    async with served(tmp_path / "m", fs) as mount:
        await in_thread((mount.path / "a").read_bytes)
        await in_thread(os.stat, mount.path / "a")  # READ dirtied atime
        before = fs.requests.total()

        await in_thread(os.stat, mount.path / "a")
        fd = await in_thread(os.open, mount.path / "a", os.O_RDONLY)
        assert len(await in_thread(os.pread, fd, 5000, 0)) == 5000
        await in_thread(os.close, fd)

        assert fs.requests.total() == before


async def test_opening_with_o_trunc_truncates(tmp_path):
    fs = TinyFs()
    fs.make(1, b"a", 0o100644, b"x" * 100)
    async with served(tmp_path / "m", fs) as mount:
        await in_thread((mount.path / "a").read_bytes)  # stateless from here on

        await in_thread(write_file, mount.path / "a", b"new", os.O_WRONLY | os.O_TRUNC)

        assert fs.find("a").data == b"new"


async def test_megabytes_arrive_whole_and_in_one_request_each(tmp_path):
    fs = TinyFs()
    data = os.urandom(4 << 20)
    async with served(tmp_path / "m", fs) as mount:
        await in_thread(write_file, mount.path / "a", data)
        assert fs.find("a").data == data
        assert fs.requests["write"] == 4

        fs.make(1, b"b", 0o100644, data)
        assert await in_thread((mount.path / "b").read_bytes) == data
        assert connection_info()["max_readahead"] == 8 << 20


async def test_current_unique_is_the_handlers_own_under_concurrency(tmp_path):
    class Checking(TinyFs):
        seen: dict[bytes, int] = {}  # noqa: RUF012

        async def lookup(self, parent_inode, name, ctx):
            Checking.seen[name] = current_unique()
            return await super().lookup(parent_inode, name, ctx)

    fs = Checking()
    names = [f"f{i}".encode() for i in range(100)]
    gates = [fs.hold("lookup", name) for name in names[:50]]
    async with served(tmp_path / "m", fs) as mount, trio.open_nursery() as nursery:
        limiter = trio.CapacityLimiter(100)

        async def look(name: bytes) -> None:
            await trio.to_thread.run_sync(
                os.path.exists, os.fsencode(mount.path) + b"/" + name,
                limiter=limiter, abandon_on_cancel=True,
            )

        await in_thread(os.listdir, mount.path)
        for name in names:
            nursery.start_soon(look, name)
        for gate in gates:
            await gate.reached.wait()
            gate.opened.set()

    assert len(set(Checking.seen.values())) == 100
    assert all(unique % 2 == 0 and 0 < unique < 1 << 62 for unique in Checking.seen.values())
    # TinyFs looks at its own first line, one await deeper: still before anything else ran.
    assert {name: fs.uniques["lookup", name] for name in names} == Checking.seen


async def test_many_handlers_wait_while_others_are_answered(tmp_path):
    fs = TinyFs()
    fs.make(1, b"a", 0o100644)
    waiting = [f"w{i}" for i in range(200)]
    gates = [fs.hold("lookup", name.encode()) for name in waiting]
    async with served(tmp_path / "m", fs) as mount, trio.open_nursery() as nursery:
        limiter = trio.CapacityLimiter(200)
        for i in range(200):  # a directory each: a LOOKUP holds its directory's lock
            fs.make(1, f"d{i}".encode(), 0o40755)

        async def look(i: int) -> None:
            await trio.to_thread.run_sync(
                os.path.exists, mount.path / f"d{i}" / waiting[i],
                limiter=limiter, abandon_on_cancel=True,
            )

        for i in range(200):
            nursery.start_soon(look, i)
        for gate in gates:
            await gate.reached.wait()
        assert mount.session.handler_count == 200

        assert (await in_thread(os.stat, mount.path / "a")).st_size == 0

        for gate in gates:
            gate.opened.set()


async def test_other_tasks_run_between_requests_that_never_wait(tmp_path):
    fs = TinyFs()
    fs.make(1, b"a", 0o100644)
    stop = trio.Event()

    def hammer() -> int:
        count = 0
        while not stop.is_set():
            os.path.exists(mount.path / "none")
            count += 1
        return count

    async with served(tmp_path / "m", fs) as mount, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(in_thread, hammer)
        # Each turn of this task needs the reader to give way once.
        for _ in range(200):
            await trio.lowlevel.checkpoint()
        for _ in range(20):
            await trio.sleep(0.001)
        stop.set()

    assert fs.requests["lookup"] > 20


async def test_stop_lets_handlers_finish_and_leaves_new_requests_to_the_next_server(tmp_path):
    fs = TinyFs()
    fs.make(1, b"held", 0o100644, b"12")
    fs.make(1, b"later", 0o100644, b"123")
    held = fs.hold("lookup", b"held")
    sizes: dict[str, int] = {}

    later_is_answered = trio.Event()

    async def size(name: str) -> None:
        sizes[name] = (await in_thread(os.stat, tmp_path / "m" / name)).st_size
        if name == "later":
            later_is_answered.set()

    with mounted(tmp_path / "m") as connection:
        first = FuseSession(fs, handed_over(connection))
        async with trio.open_nursery() as users:
            async with trio.open_nursery() as servers:
                await servers.start(first.run)
                users.start_soon(size, "held")
                await held.reached.wait()

                first.stop()
                users.start_soon(size, "later")
                assert not sizes
                held.opened.set()
            assert "later" not in sizes
            first.close()

            second = FuseSession(fs, handed_over(connection, predecessors=1))
            async with trio.open_nursery() as servers:
                await servers.start(second.run)
                with trio.fail_after(20):
                    await later_is_answered.wait()
                second.stop()
            second.close()

    assert sizes == {"held": 2, "later": 3}


async def test_the_session_ends_when_the_mount_is_removed(tmp_path):
    with mounted(tmp_path / "m") as connection:
        session = FuseSession(TinyFs(), handed_over(connection))
        async with trio.open_nursery() as nursery:
            await nursery.start(session.run)
            await in_thread(os.listdir, tmp_path / "m")

            assert await in_thread(remove_mounts, str(tmp_path / "m")) == 1
        session.close()
