"""The faults that tests ask of the core filer in memory."""

from __future__ import annotations

import errno

import pytest
import trio

from filer.core_filer.base import SetAttributes
from filer.core_filer.memory import MemoryCoreFiler
from filer.errors import OutcomeUnknown, Refused


@pytest.fixture
def core() -> MemoryCoreFiler:
    return MemoryCoreFiler(wall_clock=lambda: 1_700_000_000_000_000_000)


async def test_uncommitted_writes_are_read_until_a_crash_loses_them(
    core: MemoryCoreFiler,
) -> None:
    f = (await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)).handle
    await core.write(f, 0, b"stable", stable=True)
    stable = await core.getattr(f)
    written = await core.write(f, 3, b"unstable")
    assert (await core.read(f, 0, 100)).data == b"staunstable"

    core.lose_unstable()

    assert (await core.read(f, 0, 100)).data == b"stable"
    assert (await core.getattr(f)).version == stable.version
    assert (await core.commit(f)).verifier != written.verifier


async def test_committed_writes_survive_a_crash(core: MemoryCoreFiler) -> None:
    f = (await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)).handle
    await core.write(f, 0, b"data")
    await core.commit(f)
    core.lose_unstable()
    assert (await core.read(f, 0, 100)).data == b"data"


async def test_a_truncation_after_an_unstable_write_is_itself_stable(
    core: MemoryCoreFiler,
) -> None:
    f = (await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)).handle
    await core.write(f, 0, b"0123456789", stable=True)
    await core.write(f, 0, b"xxxxx")
    await core.setattr(f, SetAttributes(size=7))
    core.lose_unstable()
    assert (await core.read(f, 0, 100)).data == b"0123456"


async def test_a_fault_hits_as_often_as_asked_and_before_anything_happens(
    core: MemoryCoreFiler,
) -> None:
    core.fail_next("create", Refused(errno.EDQUOT), times=2)
    for _ in range(2):
        with pytest.raises(Refused):
            await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)
    assert core.behind.names("/") == []
    await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)
    assert core.calls["create"] == 3


async def test_an_applied_fault_hits_after_the_operation(core: MemoryCoreFiler) -> None:
    core.fail_next("create", OutcomeUnknown("lost"), applied=True)
    with pytest.raises(OutcomeUnknown):
        await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)
    assert core.behind.names("/") == [b"f"]


async def test_held_operations_wait_at_the_gate_not_yet_applied(core: MemoryCoreFiler) -> None:
    async with trio.open_nursery() as nursery:
        with core.hold("mkdir") as gate:
            for name in (b"a", b"b"):
                nursery.start_soon(
                    lambda name=name: core.mkdir(core.root, name, mode=0o755, uid=0, gid=0)
                )
            await gate.wait_arrived(2)
            assert core.behind.names("/") == []
            assert core.state().in_flight == 2
            await core.getattr(core.root)
    assert set(core.behind.names("/")) == {b"a", b"b"}


async def test_disconnected_operations_wait_and_the_state_says_so(
    core: MemoryCoreFiler, mock_clock: trio.testing.MockClock
) -> None:
    core.disconnect("cable")
    assert core.state().unreachable_since == trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(core.getattr, core.root)
        await trio.testing.wait_all_tasks_blocked()
        state = core.state()
        assert (state.reachable, state.reason, state.in_flight) == (False, "cable", 1)
        core.reconnect()
    assert core.state().reachable


async def test_a_full_core_filer_refuses_data_and_takes_it_after_a_removal(
    core: MemoryCoreFiler,
) -> None:
    core.tree.capacity_bytes = 8192
    core.behind.write("/a", b"x" * 8192)
    f = (await core.create(core.root, b"b", mode=0o644, uid=0, gid=0)).handle
    with pytest.raises(Refused) as caught:
        await core.write(f, 0, b"y")
    assert caught.value.errno == errno.ENOSPC
    assert (await core.statfs()).free_bytes == 0
    core.behind.remove("/a")
    assert (await core.write(f, 0, b"y")).count == 1


async def test_changes_behind_are_seen_at_once_with_new_versions(core: MemoryCoreFiler) -> None:
    core.behind.mkdir("/d")
    core.behind.write("/d/f", b"one")
    f = await core.lookup(core.behind.handle("/d"), b"f")
    core.behind.write("/d/f", b"two")
    assert (await core.read(f.handle, 0, 10)).data == b"two"
    assert not f.attributes.version.same_data((await core.getattr(f.handle)).version)
    core.behind.rename("/d/f", "/g")
    assert not core.behind.exists("/d/f")
    assert core.behind.read("/g") == b"two"


async def test_a_coarse_clock_gives_two_changes_one_time(core: MemoryCoreFiler) -> None:
    core.tree.time_granularity_ns = 1_000_000_000
    core.behind.write("/f", b"one")
    before = core.behind.attributes("/f")
    core.behind.write("/f", b"two")
    assert core.behind.attributes("/f").version == before.version


async def test_a_reused_fileid_has_another_handle(core: MemoryCoreFiler) -> None:
    core.tree.reuse_fileids = True
    core.behind.write("/f", b"one")
    old, handle = core.behind.attributes("/f"), core.behind.handle("/f")
    core.behind.remove("/f")
    core.behind.write("/g", b"two")
    assert core.behind.attributes("/g").fileid == old.fileid
    with pytest.raises(Refused) as caught:
        await core.getattr(handle)
    assert caught.value.errno == errno.ESTALE


async def test_latency_passes_before_the_operation_is_applied(
    core: MemoryCoreFiler, autojump_clock: trio.testing.MockClock
) -> None:
    core.latency_s = 10.0
    started_s = trio.current_time()
    with trio.move_on_after(5):
        await core.mkdir(core.root, b"d", mode=0o755, uid=0, gid=0)
    assert core.behind.names("/") == []
    await core.mkdir(core.root, b"d", mode=0o755, uid=0, gid=0)
    assert trio.current_time() - started_s == pytest.approx(15.0)
