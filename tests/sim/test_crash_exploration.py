"""All workloads of up to two operations, the power cut before every single step of theirs, and
everything that the disk may then hold: what was synced is there, nothing is torn, and the flush
after the restart brings exactly what clients see into the core filer.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Awaitable, Callable

import pytest

from filer.core_filer.memory import MemoryCoreFiler
from filer.ids import InodeId
from tests.sim.disk import SimDisk
from tests.sim.write_behind_rig import Rig

INITIAL = b"initial bytes!"


class PowerCut(BaseException):
    """Not an error that anything may handle."""


class Fuse:
    """Blows before the n-th step."""

    def __init__(self, steps: int | None) -> None:
        self.steps_left = steps
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        if self.steps_left is not None and self.count > self.steps_left:
            raise PowerCut


class FusedCore:
    """A core filer with a fuse before every operation."""

    def __init__(self, core: MemoryCoreFiler, fuse: Fuse) -> None:
        self._core = core
        self._fuse = fuse

    def __getattr__(self, name: str) -> object:
        found = getattr(self._core, name)
        if name not in {"getattr", "setattr", "write", "commit", "create"}:
            return found

        async def fused(*arguments: object, **keywords: object) -> object:
            self._fuse()
            return await found(*arguments, **keywords)

        return fused


class World:
    """A rig, and what its one file may contain after a crash."""

    def __init__(self, fuse: Fuse) -> None:
        self.rig = Rig()
        self.fuse = fuse
        self.inode = InodeId(0)
        self.possible = [INITIAL]
        """The contents since the last sync, oldest first; the last is the current one."""

    async def prepare(self) -> None:
        self.inode = await self.rig.create(b"f", INITIAL)
        self.core = self.rig.core
        self.rig.core = FusedCore(self.core, self.fuse)
        self.rig.disk.before_operation = self.fuse

    def becomes(self, content: bytes) -> None:
        self.possible.append(content)

    def is_stable(self) -> None:
        del self.possible[:-1]


Operation = Callable[[World], Awaitable[None]]


def write(start: int, data: bytes) -> Operation:
    async def operation(world: World) -> None:
        old = world.possible[-1]
        padded = old + bytes(max(0, start - len(old)))
        world.becomes(padded[:start] + data + padded[start + len(data) :])
        await world.rig.write(world.inode, start, data)
    return operation


def truncate(size: int) -> Operation:
    async def operation(world: World) -> None:
        old = world.possible[-1]
        world.becomes(old[:size] + bytes(max(0, size - len(old))))
        await world.rig.set_size(world.inode, size)
    return operation


async def set_times(world: World) -> None:
    await world.rig.set_times(world.inode, mtime_ns=10**18, atime_ns=10**17)


async def sync(world: World) -> None:
    await world.rig.service.sync(world.inode)
    world.is_stable()


async def flush(world: World) -> None:
    await world.rig.service.flush()
    world.is_stable()


OPERATIONS: dict[str, Operation] = {
    "write": write(3, b"WRITE"),
    "overwrite": write(5, b"over"),
    "append": write(len(INITIAL), b"appended"),
    "write beyond": write(40, b"beyond"),
    "truncate": truncate(4),
    "extend": truncate(30),
    "times": set_times,
    "sync": sync,
    "flush": flush,
}

WORKLOADS = [(name,) for name in OPERATIONS] + list(itertools.product(OPERATIONS, repeat=2))


async def run(world: World, workload: tuple[str, ...]) -> bool:
    """Do it until it is done (True) or the fuse blows."""
    try:
        async with world.rig.running():
            for name in workload:
                await OPERATIONS[name](world)
    except PowerCut:
        return False
    except BaseExceptionGroup as group:
        _, others = group.split(PowerCut)
        if others is not None:
            raise
        return False
    return True


async def check(world: World, contents: dict[str, bytes]) -> None:
    """Restart on *contents*: the file must be in a possible state, and be flushed as such."""
    rig = world.rig
    rig.disk = SimDisk.holding(contents)
    rig.core = rig.namespace.core = copy.deepcopy(world.core)
    rig.core.lose_unstable()
    async with rig.running() as service:
        view = await rig.view(world.inode)
        assert view in world.possible
        await service.drain()
        assert rig.namespace.conflicts == []
        assert await rig.core_content(world.inode) == view


@pytest.mark.parametrize("workload", WORKLOADS, ids=" then ".join)
async def test_after_a_power_cut_at_any_step_everything_synced_is_there(workload, autojump_clock):
    state_count = 0
    for steps in itertools.count():
        world = World(Fuse(steps))
        await world.prepare()
        is_done = await run(world, workload)
        seen: set[frozenset[tuple[str, bytes]]] = set()
        for contents in world.rig.disk.crash_states():
            key = frozenset(contents.items())
            if key not in seen:
                seen.add(key)
                await check(world, contents)
        state_count += len(seen)
        if is_done:
            break
    assert state_count > steps > 0
