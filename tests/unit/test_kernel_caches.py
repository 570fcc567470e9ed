"""What the kernel cached is dropped, in all the races between a reply and a change."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from filer.ids import ROOT_INODE, InodeId
from filer.metrics import REGISTRY
from filer.vfs.kernel import FuseKernelCaches, KernelCaches, RecordingKernelCaches
from filer.vfs.lookup_counts import LookupCounts
from filer.vfs.shim import pyfuse3
from tests.support.fuse_mount import in_thread, served
from tests.support.tiny_fs import FOREVER_S, Node, TinyFs

pytestmark = pytest.mark.fuse

FILE, DIRECTORY = 0o100644, 0o40755


class Rig:
    def __init__(self, path: Path, fs: TinyFs, kernel: FuseKernelCaches, nursery: trio.Nursery):
        self.path, self.fs, self.kernel, self.nursery = path, fs, kernel, nursery

    def in_background(self, function, *args) -> Background:
        return Background(self.nursery, function, *args)

    async def size(self, name: str) -> int:
        return (await in_thread(os.stat, self.path / name)).st_size

    async def is_alive(self) -> None:
        """The event loop answers requests in another directory."""
        await in_thread(os.path.exists, self.path / "other" / "nothing")


class Background:
    """A use of the mount that is expected to take its time."""

    def __init__(self, nursery: trio.Nursery, function, *args) -> None:
        self.result: object = None
        self._done = trio.Event()

        async def run() -> None:
            try:
                self.result = await in_thread(function, *args)
            except OSError as error:
                self.result = error
            self._done.set()

        nursery.start_soon(run)

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    async def wait(self) -> object:
        await self._done.wait()
        return self.result


@contextlib.asynccontextmanager
async def rig(tmp_path: Path, counts: LookupCounts | None = None) -> AsyncIterator[Rig]:
    fs = TinyFs(counts)
    fs.make(1, b"other", DIRECTORY)
    kernel = FuseKernelCaches(fs.counts)
    async with served(tmp_path / "m", fs) as mount, trio.open_nursery() as nursery:
        await nursery.start(kernel.run)
        await in_thread(os.listdir, mount.path)
        yield Rig(mount.path, fs, kernel, nursery)
        nursery.cancel_scope.cancel()


def notifications(kind: str) -> float:
    return REGISTRY.get_sample_value("filer_kernel_invalidations_total", {"kind": kind}) or 0.0


# -- no race ---------------------------------------------------------------------------------------


async def test_changed_attributes_and_data_are_seen_at_once(tmp_path):
    async with rig(tmp_path) as r:
        node = r.fs.make(1, b"a", FILE, b"old")
        assert await in_thread((r.path / "a").read_bytes) == b"old"

        r.fs.write_behind_the_kernel(node, b"newer")
        r.kernel.attributes_changed(InodeId(node.id))

        assert await in_thread((r.path / "a").read_bytes) == b"newer"


async def test_without_a_call_the_kernel_keeps_what_it_has(tmp_path):
    """The control of all tests here: timeouts are an hour."""
    async with rig(tmp_path) as r:
        node = r.fs.make(1, b"a", FILE, b"old")
        assert await r.size("a") == 3
        r.fs.write_behind_the_kernel(node, b"newer")
        assert await r.size("a") == 3


async def test_replaced_removed_and_made_names_are_seen_at_once(tmp_path):
    async with rig(tmp_path) as r:
        r.fs.negative_timeout_s = FOREVER_S
        r.fs.make(1, b"replaced", FILE, b"1")
        r.fs.make(1, b"removed", FILE, b"1")
        assert await r.size("replaced") == 1
        assert await r.size("removed") == 1
        assert not await in_thread(os.path.exists, r.path / "made")

        for name in (b"replaced", b"removed"):
            r.fs.change("unlink", 1, name)
        r.fs.make(1, b"replaced", FILE, b"22")
        r.fs.make(1, b"made", FILE, b"333")
        for name in (b"replaced", b"removed", b"made"):
            await r.kernel.wait_name_changed(ROOT_INODE, name)

        assert await r.size("replaced") == 2
        assert await r.size("made") == 3
        assert not await in_thread(os.path.exists, r.path / "removed")
        assert sorted(await in_thread(os.listdir, r.path)) == ["made", "other", "replaced"]


async def test_data_is_dropped_even_if_no_attribute_tells(tmp_path):
    async with rig(tmp_path) as r:
        node = r.fs.make(1, b"a", FILE, b"old")
        assert await in_thread((r.path / "a").read_bytes) == b"old"

        node.data = b"new"  # same size, same mtime
        await r.kernel.wait_attributes_changed(InodeId(node.id))
        assert await in_thread((r.path / "a").read_bytes) == b"old"
        await r.kernel.wait_data_changed(InodeId(node.id))

        assert await in_thread((r.path / "a").read_bytes) == b"new"


# -- replies on their way --------------------------------------------------------------------------


async def seen_by_everybody(r: Rig, size: int) -> None:
    """A change that the kernel was not told of properly would stay unseen for an hour."""
    with trio.fail_after(10):
        while await r.size("a") != size:  # noqa: ASYNC110
            await trio.sleep(0.01)


@pytest.mark.parametrize("waiting", [True, False])
async def test_first_lookup_under_way_does_not_bring_back_old_attributes(tmp_path, waiting):
    async with rig(tmp_path) as r:
        node = r.fs.make(1, b"a", FILE, b"1")
        reply = r.fs.hold_reply("lookup", b"a")
        user = r.in_background(os.stat, r.path / "a")
        await reply.reached.wait()

        r.fs.write_behind_the_kernel(node, b"22")
        with pytest.raises(FileNotFoundError):  # the kernel does not know the inode yet
            pyfuse3.invalidate_inode(pyfuse3.InodeT(node.id), True)
        if waiting:
            waited = trio.Event()

            async def wait() -> None:
                await r.kernel.wait_attributes_changed(InodeId(node.id))
                waited.set()

            r.nursery.start_soon(wait)
            await r.is_alive()
            assert not waited.is_set()
            reply.opened.set()
            await waited.wait()
            assert await r.size("a") == 2
        else:
            r.kernel.attributes_changed(InodeId(node.id))
            reply.opened.set()
            await user.wait()
            await seen_by_everybody(r, 2)


HOG = """
import os, sys
os.sched_setaffinity(0, {0})
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
print("spinning", flush=True)
while True: pass
"""
STARVING = """
import os, sys
os.sched_setaffinity(0, {0})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
os.stat(sys.argv[1])
"""


def start(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE
    )


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
async def test_a_reply_written_to_a_starving_process_does_not_bring_back_old_attributes(tmp_path):
    async with rig(tmp_path) as r:
        node = r.fs.make(1, b"a", FILE, b"1")
        arrival = r.fs.hold("lookup", b"a")
        affinity = os.sched_getaffinity(0)
        os.sched_setaffinity(0, affinity - {0})
        user = start(STARVING, str(r.path / "a"))
        hog = None
        try:
            await arrival.reached.wait()
            hog = start(HOG)
            assert hog.stdout is not None
            assert await in_thread(hog.stdout.readline) == b"spinning\n"

            arrival.opened.set()
            while not r.fs.counts.count(node.id):  # then it is replied, in the same step
                await trio.lowlevel.checkpoint()
            r.fs.write_behind_the_kernel(node, b"22")
            with pytest.raises(FileNotFoundError):
                pyfuse3.invalidate_inode(pyfuse3.InodeT(node.id), True)
            r.kernel.attributes_changed(InodeId(node.id))
        finally:
            os.sched_setaffinity(0, affinity)
            if hog is not None:
                hog.kill()
                hog.communicate()
            await in_thread(user.communicate)

        await seen_by_everybody(r, 2)


async def test_negative_lookup_under_way_does_not_hide_a_name_made_meanwhile(tmp_path):
    async with rig(tmp_path) as r:
        r.fs.negative_timeout_s = FOREVER_S
        reply = r.fs.hold_reply("lookup", b"a")
        user = r.in_background(os.path.exists, r.path / "a")
        await reply.reached.wait()

        r.fs.make(1, b"a", FILE, b"22")
        r.kernel.name_changed(ROOT_INODE, b"a")
        reply.opened.set()

        assert await user.wait() is False
        await seen_by_everybody(r, 2)


async def test_read_under_way_does_not_bring_back_old_data(tmp_path):
    async with rig(tmp_path) as r:
        node = r.fs.make(1, b"a", FILE, b"old")
        reply = r.fs.hold_reply("read", node.id)
        user = r.in_background((r.path / "a").read_bytes)
        await reply.reached.wait()

        r.fs.write_behind_the_kernel(node, b"new")
        r.kernel.attributes_changed(InodeId(node.id))
        reply.opened.set()

        assert await user.wait() == b"old"
        assert await in_thread((r.path / "a").read_bytes) == b"new"


# -- what must never block -------------------------------------------------------------------------


async def test_dropping_data_waits_for_a_read_but_the_loop_does_not(tmp_path):
    async with rig(tmp_path) as r:
        node = r.fs.make(1, b"a", FILE, b"old")
        reply = r.fs.hold_reply("read", node.id)
        user = r.in_background((r.path / "a").read_bytes)
        await reply.reached.wait()
        node.data = b"new"

        dropped = trio.Event()

        async def drop() -> None:
            await r.kernel.wait_data_changed(InodeId(node.id))
            dropped.set()

        r.nursery.start_soon(drop)
        for _ in range(5):
            await r.is_alive()
        assert not dropped.is_set()
        assert not user.is_done

        reply.opened.set()
        await dropped.wait()
        await user.wait()  # may have seen either
        assert await in_thread((r.path / "a").read_bytes) == b"new"


async def test_dropping_a_name_waits_for_a_lookup_but_nothing_else_does(tmp_path):
    async with rig(tmp_path) as r:
        busy = r.fs.make(1, b"busy", DIRECTORY)
        free = r.fs.make(1, b"free", DIRECTORY)
        r.fs.make(free.id, b"x", FILE, b"1")
        assert await r.size("free/x") == 1
        arrival = r.fs.hold("lookup", b"slow")
        user = r.in_background(os.path.exists, r.path / "busy" / "slow")
        await arrival.reached.wait()

        dropped = trio.Event()

        async def drop() -> None:
            await r.kernel.wait_name_changed(InodeId(busy.id), b"x")
            dropped.set()

        r.nursery.start_soon(drop)
        await r.is_alive()
        r.fs.change("unlink", free.id, b"x")
        await r.kernel.wait_name_changed(InodeId(free.id), b"x")  # another directory's queue
        assert not await in_thread(os.path.exists, r.path / "free" / "x")
        assert not dropped.is_set()

        arrival.opened.set()
        await dropped.wait()
        assert await user.wait() is False


async def test_a_directory_changes_its_attributes_only_after_the_name_is_dropped(tmp_path):
    """Else an NFS server would cache the old name under the new mtime."""
    async with rig(tmp_path) as r:
        directory = r.fs.make(1, b"d", DIRECTORY)
        await in_thread(os.stat, r.path / "d")
        arrival = r.fs.hold("lookup", b"slow")
        user = r.in_background(os.path.exists, r.path / "d" / "slow")
        await arrival.reached.wait()
        asked = r.fs.requests["getattr"]

        r.fs.make(directory.id, b"x", FILE)
        r.kernel.name_changed(InodeId(directory.id), b"x")
        await in_thread(os.stat, r.path / "d")
        assert r.fs.requests["getattr"] == asked

        arrival.opened.set()
        await user.wait()
        await r.kernel.wait_name_changed(InodeId(directory.id), b"x")
        await in_thread(os.stat, r.path / "d")
        assert r.fs.requests["getattr"] == asked + 1


# -- what the kernel does not know -----------------------------------------------------------------


async def test_an_unknown_inode_is_asked_for_once(tmp_path):
    async with rig(tmp_path) as r:
        before = notifications("attributes")
        await r.kernel.wait_attributes_changed(InodeId(12345))
        assert notifications("attributes") == before + 1


async def test_after_a_takeover_an_unknown_inode_is_asked_for_several_times(tmp_path):
    async with rig(tmp_path, LookupCounts(is_complete=False)) as r:
        before = notifications("attributes")
        await r.kernel.wait_attributes_changed(InodeId(12345))
        assert notifications("attributes") == before + 8


async def test_a_retry_ends_when_the_kernel_forgets_the_inode(tmp_path):
    async with rig(tmp_path) as r:
        r.fs.counts.increment(12345)
        finished = trio.Event()

        async def wait() -> None:
            await r.kernel.wait_attributes_changed(InodeId(12345))
            finished.set()

        r.nursery.start_soon(wait)
        await r.is_alive()
        assert not finished.is_set()
        r.fs.counts.decrement(12345, 1)
        await finished.wait()


async def test_changes_before_the_start_are_told_at_the_start(tmp_path):
    fs = TinyFs()
    node = fs.make(1, b"a", FILE, b"1")
    fs.make(1, b"b", FILE, b"1")
    kernel = FuseKernelCaches(fs.counts)
    async with served(tmp_path / "m", fs) as mount, trio.open_nursery() as nursery:
        for name in "ab":
            await in_thread(os.stat, mount.path / name)
        fs.write_behind_the_kernel(node, b"22")
        fs.change("unlink", 1, b"b")
        kernel.attributes_changed(InodeId(node.id))
        kernel.name_changed(ROOT_INODE, b"b")

        await nursery.start(kernel.run)
        await kernel.wait_name_changed(ROOT_INODE, b"b")

        assert (await in_thread(os.stat, mount.path / "a")).st_size == 2
        assert not await in_thread(os.path.exists, mount.path / "b")
        nursery.cancel_scope.cancel()


async def test_the_recording_one_remembers_the_order():
    recording = RecordingKernelCaches()
    kernel: KernelCaches = recording
    kernel.name_changed(ROOT_INODE, b"a")
    await kernel.wait_data_changed(InodeId(7))
    kernel.attributes_changed(InodeId(8))
    assert recording.calls == [("name", 1, b"a"), ("data", 7), ("attributes", 8)]


def test_node_ids_are_never_reused():
    """The rig relies on it, as the filer does."""
    fs = TinyFs()
    first: Node = fs.make(1, b"a", FILE)
    fs.change("unlink", 1, b"a")
    assert fs.make(1, b"a", FILE).id != first.id
