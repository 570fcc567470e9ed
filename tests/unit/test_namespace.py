"""The namespace against a core filer in memory: belief, changes behind us, listings, orphans."""

from __future__ import annotations

import errno
import itertools
from pathlib import Path
from random import Random

import pytest
import trio

from filer.core_filer.memory import MemoryCoreFiler
from filer.errors import Refused
from filer.ids import InodeId
from filer.leases.table import StandaloneLeases
from filer.namespace.inode import Change, Inode
from filer.namespace.service import ORPHANS, Namespace
from filer.namespace.store import NameStore
from filer.namespace.table import InodeTable

VERIFY_S = 30.0


class World:
    """A namespace over a core filer in memory; ``restart`` makes a new one on the same store."""

    def __init__(self, path: Path, nursery: trio.Nursery) -> None:
        ticks = itertools.count(10**18)
        self.core = MemoryCoreFiler(wall_clock=lambda: next(ticks))
        self.path = path
        self.nursery = nursery
        self.changes: list[tuple[InodeId, Change]] = []
        self.discarded: list[InodeId] = []
        self.dirty: set[InodeId] = set()
        self.store: NameStore

    async def start(
        self, verify_s: float | None = VERIFY_S, *, kernel_is_new: bool = True,
        inodes_in_memory_max: int = 1000,
    ) -> Namespace:
        ticks = itertools.count(2 * 10**18)
        self.store = NameStore(self.path)
        table = InodeTable(
            self.store, self.core.root, await self.core.getattr(self.core.root),
            inodes_in_memory_max=inodes_in_memory_max, random=Random(1), changed=self._changed,
            overlay=lambda inode: None, is_dirty=lambda inode: inode in self.dirty)
        self.namespace = Namespace(
            self.core, self.store, table, StandaloneLeases(), verify_s=verify_s,
            directory_entries_in_memory_max=10_000, wall_clock_ns=lambda: next(ticks),
            background=self.nursery, discard=self._discard)
        await self.namespace.start(kernel_is_new=kernel_is_new)
        return self.namespace

    async def restart(self, **how) -> Namespace:
        self.store._environment.close()  # the process died: nothing was committed
        return await self.start(**how)

    def _changed(self, inode: Inode, change: Change) -> None:
        self.changes.append((inode.id, change))
        if change is Change.DATA and inode.attributes.is_directory:
            self.namespace.names_changed(inode)

    async def _discard(self, inode: Inode) -> None:
        self.discarded.append(inode.id)

    def calls(self, operation: str) -> int:
        return self.core.calls[operation]


@pytest.fixture
async def world(tmp_path, nursery):
    return World(tmp_path / "names", nursery)


async def test_a_name_is_asked_for_once_per_verify_interval(world, autojump_clock):
    world.core.behind.write("a", b"x")
    ns = await world.start()
    root = ns.table.root

    first = await ns.lookup(root, b"a")
    assert await ns.lookup(root, b"a") is first
    assert world.calls("lookup") == 1

    await trio.sleep(VERIFY_S + 1)
    assert await ns.lookup(root, b"a") is first
    # The directory was verified unchanged, so its names still hold.
    assert world.calls("lookup") == 1


async def test_a_missing_name_is_remembered_until_the_directory_changes(world, autojump_clock):
    ns = await world.start()
    root = ns.table.root
    assert await ns.lookup(root, b"a") is None
    assert await ns.lookup(root, b"a") is None
    assert world.calls("lookup") == 1

    world.core.behind.write("a", b"x")
    await trio.sleep(VERIFY_S + 1)

    found = await ns.lookup(root, b"a")
    assert found is not None
    assert found.attributes.size == 1


async def test_a_file_changed_behind_us_gets_a_new_data_version_and_is_reported(
    world, autojump_clock
):
    world.core.behind.write("a", b"old")
    ns = await world.start()
    inode = await ns.lookup(ns.table.root, b"a")
    version = inode.data_version

    world.core.behind.write("a", b"newer")
    await ns.verify(inode)
    assert inode.attributes.size == 3, "believed within the interval"
    await trio.sleep(VERIFY_S + 1)
    await ns.verify(inode)

    assert inode.attributes.size == 5
    assert inode.data_version != version
    assert (inode.id, Change.DATA) in world.changes


async def test_a_policy_without_verification_never_asks_again(world, autojump_clock):
    world.core.behind.write("a", b"old")
    ns = await world.start(verify_s=None)
    inode = await ns.lookup(ns.table.root, b"a")
    before = world.calls("getattr")

    await trio.sleep(10_000)
    await ns.verify(inode)

    assert world.calls("getattr") == before


async def test_many_readers_of_an_expired_inode_cause_one_getattr(world, autojump_clock):
    world.core.behind.write("a", b"x")
    ns = await world.start()
    inode = await ns.lookup(ns.table.root, b"a")
    await trio.sleep(VERIFY_S + 1)
    before = world.calls("getattr")
    world.core.latency_s = 0.1

    async with trio.open_nursery() as readers:
        for _ in range(20):
            readers.start_soon(ns.verify, inode)

    assert world.calls("getattr") == before + 1


async def test_an_answer_that_crossed_our_own_change_is_not_believed(world, autojump_clock):
    ns = await world.start()
    root = ns.table.root
    inode = await ns.create(root, b"a", 0o644, 1, 2, False)
    await trio.sleep(VERIFY_S + 1)
    # The GETATTR reads the old mode, then waits on its way back while a chmod passes it.
    old = await world.core.getattr(inode.handle)
    asked_at = ns.table.clock
    from filer.core_filer.base import SetAttributes

    await ns.set_attributes(inode, SetAttributes(mode=0o600))
    ns.table.observe(inode, old, asked_at)

    assert inode.attributes.mode & 0o777 == 0o600


async def test_directory_mtime_strictly_increases_with_every_change_of_ours(world, autojump_clock):
    ns = await world.start()
    root = ns.table.root
    stamps = [root.attributes.mtime_ns]
    for number in range(5):
        await ns.create(root, b"f%d" % number, 0o644, 0, 0, False)
        stamps.append(root.attributes.mtime_ns)
    await ns.rename(root, b"f0", root, b"g0", 0, False)
    stamps.append(root.attributes.mtime_ns)
    await ns.unlink(root, b"f1", False)
    stamps.append(root.attributes.mtime_ns)

    assert stamps == sorted(set(stamps))


async def test_a_listing_shows_what_is_there_and_keeps_cookies_over_a_restart(
    world, autojump_clock
):
    world.core.behind.mkdir("d")
    for number in range(300):
        world.core.behind.write(f"d/f{number:03}", b"x")
    ns = await world.start()
    directory = await ns.lookup(ns.table.root, b"d")
    names = await ns.listed(directory)
    before = list(names.since(0))
    assert len(before) == 300

    ns = await world.restart()
    directory = await ns.lookup(ns.table.root, b"d")
    calls = world.calls("readdir")
    names = await ns.listed(directory)

    assert list(names.since(0)) == before
    assert world.calls("readdir") == calls, "nothing changed: the stored listing serves"


async def test_a_foreign_change_keeps_the_cookies_of_names_that_stay(world, autojump_clock):
    world.core.behind.mkdir("d")
    for name in "abc":
        world.core.behind.write(f"d/{name}", b"")
    ns = await world.start()
    directory = await ns.lookup(ns.table.root, b"d")
    cookies = {n: c for c, n, _ in (await ns.listed(directory)).since(0)}

    world.core.behind.remove("d/b")
    world.core.behind.write("d/z", b"")
    await trio.sleep(VERIFY_S + 1)
    after = {n: c for c, n, _ in (await ns.listed(directory)).since(0)}

    assert set(after) == {b"a", b"c", b"z"}
    assert (after[b"a"], after[b"c"]) == (cookies[b"a"], cookies[b"c"])
    assert after[b"z"] > max(cookies.values())


async def test_a_foreign_name_hidden_behind_our_own_change_is_seen_after_one_interval(
    world, autojump_clock
):
    ns = await world.start()
    root = ns.table.root
    await ns.listed(root)
    world.core.behind.write("foreign", b"")
    await ns.create(root, b"ours", 0o644, 0, 0, False)  # we adopt the mtime that covers both

    await trio.sleep(VERIFY_S + 1)

    assert await ns.lookup(root, b"foreign") is not None


async def test_names_made_while_a_listing_is_under_way_are_kept(world, autojump_clock):
    for number in range(10):
        world.core.behind.write(f"f{number}", b"")
    ns = await world.start()
    root = ns.table.root
    await ns.names(root)
    with world.core.hold("readdir") as gate:
        async with trio.open_nursery() as tasks:
            tasks.start_soon(ns.listed, root)
            await gate.wait_arrived()
            await ns.unlink(root, b"f3", False)
            await ns.create(root, b"new", 0o644, 0, 0, False)
            gate.open()

    names = {name for _, name, _ in (await ns.listed(root)).since(0)}
    assert names == {b"f%d" % n for n in range(10) if n != 3} | {b"new"}


async def test_every_inode_is_found_by_id_after_kill_9(world, autojump_clock):
    world.core.behind.mkdir("d")
    world.core.behind.write("d/a", b"x")
    ns = await world.start()
    directory = await ns.lookup(ns.table.root, b"d")
    inode = await ns.lookup(directory, b"a")
    ids = directory.id, inode.id

    ns = await world.restart(kernel_is_new=False)

    again = ns.table.get(ids[1])
    assert again.handle == inode.handle
    assert (await ns.lookup(again, b"..")).id == ids[0]


async def test_memory_holds_a_bounded_number_of_inodes_and_loads_the_others_again(
    world, autojump_clock
):
    world.core.behind.mkdir("d")
    for number in range(200):
        world.core.behind.write(f"d/f{number}", b"")
    ns = await world.start(inodes_in_memory_max=50)
    directory = await ns.lookup(ns.table.root, b"d")
    ids = []
    for number in range(200):
        ids.append((await ns.lookup(directory, b"f%d" % number)).id)

    assert len(ns.table) <= 51
    assert all(ns.table.get(inode_id).id == inode_id for inode_id in ids)


async def test_names_of_many_directories_do_not_pile_up_in_memory(
    world, autojump_clock, monkeypatch
):
    monkeypatch.setattr("filer.namespace.service._DIRECTORIES_MAX", 20)
    for number in range(60):
        world.core.behind.mkdir(f"d{number}")
        world.core.behind.write(f"d{number}/f", b"x")
    ns = await world.start(inodes_in_memory_max=1000)
    seen = []
    for number in range(60):
        directory = await ns.lookup(ns.table.root, b"d%d" % number)
        seen.append(directory)
        assert await ns.lookup(directory, b"f") is not None

    assert sum(directory.directory is not None for directory in seen) <= 20
    assert await ns.lookup(seen[0], b"f") is not None


async def test_an_unlinked_file_lives_on_until_the_kernel_forgets_it(world, autojump_clock):
    world.core.behind.write("a", b"still open")
    ns = await world.start()
    root = ns.table.root
    inode = await ns.lookup(root, b"a")

    await ns.unlink(root, b"a", False)
    assert await ns.lookup(root, b"a") is None
    assert (await world.core.read(inode.handle, 0, 100)).data == b"still open"
    assert inode.attributes.nlink == 0
    assert await ns.lookup(root, ORPHANS) is None, "hidden from clients"
    assert ORPHANS not in {n for _, n, _ in (await ns.listed(root)).since(0)}

    ns.forgotten(inode.id)
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(Refused) as refused:
        await world.core.read(inode.handle, 0, 100)
    assert refused.value.errno == errno.ESTALE
    assert world.discarded == [inode.id]


async def test_a_replaced_file_lives_on_and_the_name_never_vanishes(world, autojump_clock):
    world.core.behind.write("a", b"new")
    world.core.behind.write("b", b"old, open")
    ns = await world.start()
    root = ns.table.root
    old = await ns.lookup(root, b"b")

    await ns.rename(root, b"a", root, b"b", 0, False)

    assert world.core.behind.read("b") == b"new"
    assert (await world.core.read(old.handle, 0, 100)).data == b"old, open"
    assert (await ns.lookup(root, b"b")).id != old.id
    ns.forgotten(old.id)
    await trio.testing.wait_all_tasks_blocked()
    with pytest.raises(Refused):
        await world.core.getattr(old.handle)


async def test_orphans_of_a_dead_node_are_removed_when_the_mount_is_new(world, autojump_clock):
    world.core.behind.write("a", b"x")
    ns = await world.start()
    inode = await ns.lookup(ns.table.root, b"a")
    await ns.unlink(ns.table.root, b"a", False)

    await world.restart(kernel_is_new=True)
    await trio.testing.wait_all_tasks_blocked()

    with pytest.raises(Refused):
        await world.core.getattr(inode.handle)


async def test_a_file_with_another_name_is_simply_unlinked(world, autojump_clock):
    world.core.behind.write("a", b"x")
    ns = await world.start()
    root = ns.table.root
    inode = await ns.lookup(root, b"a")
    await ns.link(inode, root, b"b", False)
    assert inode.attributes.nlink == 2

    await ns.unlink(root, b"a", False)

    assert inode.attributes.nlink == 1
    assert world.core.behind.read("b") == b"x"


async def test_rename_moves_a_directory_and_its_parent_is_the_new_one(world, autojump_clock):
    ns = await world.start()
    root = ns.table.root
    one = await ns.mkdir(root, b"one", 0o755, 0, 0, False)
    two = await ns.mkdir(root, b"two", 0o755, 0, 0, False)
    await ns.create(one, b"f", 0o644, 0, 0, False)

    await ns.rename(root, b"one", two, b"uno", 0, False)

    moved = await ns.lookup(two, b"uno")
    assert moved is one
    assert (await ns.lookup(moved, b"..")) is two
    assert await ns.lookup(root, b"one") is None
    assert await ns.lookup(moved, b"f") is not None


async def test_exchange_swaps_two_names(world, autojump_clock):
    world.core.behind.write("a", b"A")
    world.core.behind.write("b", b"B")
    ns = await world.start()
    root = ns.table.root
    a, b = await ns.lookup(root, b"a"), await ns.lookup(root, b"b")

    await ns.rename(root, b"a", root, b"b", 2, False)

    assert await ns.lookup(root, b"a") is b
    assert await ns.lookup(root, b"b") is a


async def test_noreplace_refuses_a_taken_name(world, autojump_clock):
    world.core.behind.write("a", b"")
    world.core.behind.write("b", b"")
    ns = await world.start()
    root = ns.table.root

    with pytest.raises(Refused) as refused:
        await ns.rename(root, b"a", root, b"b", 1, False)

    assert refused.value.errno == errno.EEXIST


async def test_a_set_group_id_directory_hands_its_group_down(world, autojump_clock):
    ns = await world.start()
    root = ns.table.root
    directory = await ns.mkdir(root, b"d", 0o2755, 0, 77, False)

    file = await ns.create(directory, b"f", 0o644, 5, 6, False)
    below = await ns.mkdir(directory, b"e", 0o755, 5, 6, False)

    assert file.attributes.gid == 77
    assert (below.attributes.gid, below.attributes.mode & 0o2000) == (77, 0o2000)


async def test_while_the_core_filer_is_away_what_is_known_is_served(world, autojump_clock):
    world.core.behind.write("a", b"known")
    ns = await world.start()
    root = ns.table.root
    inode = await ns.lookup(root, b"a")
    await trio.sleep(VERIFY_S + 1)
    world.core.disconnect()

    await ns.verify(inode)
    assert (await ns.lookup(root, b"a")) is inode
    assert 0 < ns.valid_for_s(inode) <= 1.0

    world.core.behind.write("a", b"changed meanwhile")
    world.core.reconnect()
    await trio.sleep(2)
    await ns.verify(inode)
    assert inode.attributes.size == len(b"changed meanwhile")


async def test_a_core_filer_that_hangs_without_a_word_is_waited_for_only_a_while(
    world, autojump_clock
):
    world.core.behind.write("a", b"known")
    ns = await world.start()
    inode = await ns.lookup(ns.table.root, b"a")
    await trio.sleep(VERIFY_S + 1)

    with world.core.hold("getattr"), trio.fail_after(10):
        await ns.verify(inode)

    assert inode.attributes.size == 5


async def test_a_file_removed_behind_us_is_stale_and_its_name_is_asked_for_again(
    world, autojump_clock
):
    world.core.behind.write("a", b"x")
    ns = await world.start()
    root = ns.table.root
    inode = await ns.lookup(root, b"a")
    world.core.behind.remove("a")
    await trio.sleep(VERIFY_S + 1)

    with pytest.raises(Refused) as refused:
        await ns.verify(inode)
    assert refused.value.errno == errno.ESTALE
    assert await ns.lookup(root, b"a") is None


async def test_a_dirty_file_does_not_take_foreign_attributes(world, autojump_clock):
    world.core.behind.write("a", b"x")
    ns = await world.start()
    inode = await ns.lookup(ns.table.root, b"a")
    world.dirty.add(inode.id)
    world.core.behind.write("a", b"foreign")
    await trio.sleep(VERIFY_S + 1)

    await ns.verify(inode)

    assert inode.attributes.size == 1


async def test_names_beyond_255_bytes_are_too_long(world, autojump_clock):
    ns = await world.start()

    with pytest.raises(Refused) as refused:
        await ns.lookup(ns.table.root, b"n" * 256)

    assert refused.value.errno == errno.ENAMETOOLONG
